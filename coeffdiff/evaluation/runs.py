"""The adapters to evaluate, each with the photos of its run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from coeffdiff.data.photos import read_photos
from coeffdiff.errors import AdapterError, ConfigError, PhotoError
from coeffdiff.evaluation.prompts import (
    LISTING,
    Listing,
    Prompts,
    choose_prompts,
    parse_listing,
    read_listing,
)
from coeffdiff.evaluation.protocol import Asked, Protocol, Subject, asked_for
from coeffdiff.hosts.hub.address import hub_address, origin_of
from coeffdiff.hosts.hub.lookup import resolve_adapter
from coeffdiff.method.adapter_file import read_header
from coeffdiff.method.adapter_header import AdapterHeader, NamedSubject
from coeffdiff.method.adapter_paths import run_of
from coeffdiff.models import opening
from coeffdiff.training.run_folder import RunFolder


@dataclass(frozen=True)
class Candidate:
    """An adapter to evaluate, or one subject of several that it has, with its photos and prompts."""

    label: str
    adapter: Path
    scale: float | None
    header: AdapterHeader
    run: RunFolder | None
    subject: Subject
    protocol: Protocol

    @property
    def asked(self) -> list[Asked]:
        """Every picture to be made, in order."""
        return asked_for(self.protocol, self.subject.token, self.subject.class_word)

    @property
    def trained(self) -> opening.Trained:
        return opening.Trained(self.adapter, self.header)


def find_candidates(
    runs: Sequence[tuple[str, float | None]],
    *,
    images: Path | None,
    prompts: str,
    limit: int | None,
    protocol: Callable[[Prompts], Protocol],
) -> list[Candidate]:
    """Adapters with their photos and prompts.

    Args:
        runs: run or adapter folders, or repositories of the Hub, and scales.
        images: photos, or a data set in DreamBooth's layout; None: those of each run.
        prompts: a list's name or a file, see choose_prompts.  limit: at most this many prompts.
        protocol: makes a protocol of the chosen prompts.
    Raises: CoeffDiffError for the first adapter that lacks something.
    """
    found: list[Candidate] = []
    for label, scale in runs:
        adapter = resolve_adapter(label)
        if twin := next((one for one in found if one.scale == scale and one.adapter.samefile(adapter)), None):
            raise AdapterError(
                f"{label} and {twin.label} are the same adapter at the same scale; give it once, or with another "
                "scale behind it (RUN:0.6)."
            )
        header = read_header(adapter)
        its_run = run_of(adapter)
        run = RunFolder(its_run) if its_run else None
        label = origin_of(adapter) if Path(label).is_file() or hub_address(label) else label
        for named, own in zip(header.named, _own_folders(run, header, needed=images is None), strict=True):
            called = label if len(header.named) == 1 else f"{label} ({named.token})"
            if images is None or len(header.named) == 1:
                folder = photo_folder(own, images, called)
            else:
                folder = _one_of_folders(images, own.name if own else named.token, called)
            subject, listing = _read_subject(folder, named)
            chosen = choose_prompts(
                prompts,
                base_model=header.base_model,
                class_word=subject.class_word,
                listing=listing,
                limit=limit,
            )
            found.append(Candidate(called, adapter, scale, header, run, subject, protocol(chosen)))
    return found


def _own_folders(run: RunFolder | None, header: AdapterHeader, needed: bool) -> list[Path | None]:
    """The folder of photos that a run names for each subject of its adapter; None where it names none.

    needed: whether a run whose settings cannot be read is an error. Raises: ConfigError then.
    """
    try:
        folders = {subject.token: subject.images for subject in run.settings().each_subject} if run else {}
    except ConfigError:
        if needed:
            raise
        folders = {}
    return [folders.get(named.token) for named in header.named]


def _read_subject(folder: Path, named: NamedSubject) -> tuple[Subject, Listing | None]:
    """Photos, masks and words of an adapter's subject, and the data set's listing, if it has one."""
    photos = read_photos(folder).photos
    listing = read_listing(folder)
    class_word = named.class_word or (listing.classes.get(folder.name) if listing else None)
    masks = [photo.open_mask() for photo in photos]
    return Subject(folder.name, photos, masks, named.token, class_word), listing


def _one_of_folders(images: Path, name: str, label: str) -> Path:
    """The folder of one of several subjects in `images`. Raises: ConfigError if it is not there."""
    if not (images / name).is_dir():
        raise ConfigError(
            f"{label} is one of several subjects, so --images has to hold a folder for each, and {images} holds no "
            f"{name}."
        )
    return images / name


def photo_folder(own: Path | None, images: Path | None, label: str) -> Path:
    """The run's own photos; or `images`: a folder of photos, or a data set in DreamBooth's layout with a folder of the
    same name as the run's.

    own: the folder that the run names, if there is a run.
    Raises: ConfigError if the data set has no such folder, or no folder is known; PhotoError if it is gone.
    """
    if images is None:
        if own is None:
            raise ConfigError(
                f"{label} does not say which photos it was trained on; name them with --images."
            )
        if not own.is_dir():
            raise PhotoError(
                f"The photos of {label} are no longer in {own}; name their folder with --images."
            )
        return own
    if not (images / LISTING).is_file():
        return images
    classes = parse_listing(images / LISTING).classes
    there = sorted(f.name for f in images.iterdir() if f.is_dir() and f.name in classes)
    if own is None or own.name not in there:
        named = f"its photos were in a folder {own.name!r}" if own else "it does not name its photos"
        raise ConfigError(
            f"{images} holds the subjects {', '.join(there) or '(none)'}, and none of them is that of {label}: "
            f"{named}. Name the subject's own folder with --images."
        )
    return images / own.name
