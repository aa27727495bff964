"""Whether a run that is to be continued still is the same run: photos and models are known by content, not by place.

What settings may differ is resuming.settings_to_resume's; a checkpoint says what the photos and weights were.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coeffdiff.config.nested import as_tree, flattened
from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import with_values
from coeffdiff.data.photos import NO_PHOTOS, Photo, PhotoSet
from coeffdiff.errors import ResumeError
from coeffdiff.models.fingerprints import LABELS, changed
from coeffdiff.models.source import Backbone
from coeffdiff.training.checkpoints import Checkpoint
from coeffdiff.training.run_folder import RunFolder

# setting -> what lies there, and how another place is named
_PLACES = {
    "subject.images": ("its photos", "--images DIR"),
    "prior.images": ("its pictures of the class", "--set prior.images=DIR"),
    "model.name": ("its base model", "--model DIR"),
    "model.vae": ("its VAE", "--set model.vae=DIR"),
    "model.config": ("its base model's configs", "--set model.config=DIR"),
}
_ALSO_PATHS = ("photos.cache", "validation.dino", "validation.clip", "output")


def with_absolute_paths(settings: Settings) -> Settings:
    """The same, so that it can be read in another working directory; names of the hub and "auto" stay."""
    flat = flattened(as_tree(settings))
    found: dict[str, Any] = {}
    for name in (*_PLACES, *_ALSO_PATHS):
        value = flat[name]
        is_path = name.endswith(".images") or name in ("photos.cache", "output")
        if value is None or value == "auto" or (name == "model.name" and value == "pocket"):
            continue
        path = Path(value).expanduser()
        if is_path or path.exists():
            found[name] = os.path.abspath(path)  # noqa: PTH100  (resolve() would follow links that may be turned)
    if settings.subjects:
        found["subjects"] = [_absolute(entry) for entry in flat["subjects"]]
    return with_values(settings, found)


def _absolute(entry: dict[str, Any]) -> dict[str, Any]:
    """One of several subjects, with its folders as absolute paths."""
    folders = {name: entry[name] for name in ("images", "prior_images") if entry[name] is not None}
    return entry | {name: os.path.abspath(Path(folder).expanduser()) for name, folder in folders.items()}  # noqa: PTH100


def check_places(run: RunFolder, settings: Settings) -> None:
    """Raises: ResumeError where a folder of the run's has gone, with the option that names where it is now."""
    flat = flattened(as_tree(settings))
    places = [(name, flat[name], *said) for name, said in _PLACES.items()]
    for subject in flat["subjects"]:
        for name, what in (("images", "the photos"), ("prior_images", "the pictures of the class")):
            said = (f"{what} of {subject['token']}", "--subjects FILE")
            places.append((f"subjects.{name}.images", subject[name], *said))
    for name, value, what, option in places:
        sure = value is not None and (name.endswith(".images") or Path(value).is_absolute())
        if sure and not Path(value).expanduser().exists():
            here = "" if Path(value).is_absolute() else f" (looked in {Path.cwd()})"
            raise ResumeError(
                f"{run.path} took {what} from {value}, which is not there any more{here}. Name where they are now "
                f"with {option}; it is their content that has to be the same."
            )


def photos_as_begun(
    run: RunFolder, known: Sequence[str], photos: PhotoSet, class_pictures: PhotoSet | None
) -> tuple[PhotoSet, PhotoSet | None]:
    """The photos in the order that the run began with, whatever they and their folder are called now.

    known: the identities that its checkpoint has.
    Raises: ResumeError if they, their captions or masks are others.
    """
    count = len(photos.photos)
    pictures = class_pictures or NO_PHOTOS
    first = _in_order(photos.photos, known[:count])
    second = _in_order(pictures.photos, known[count:])
    if first is None or second is None:
        raise _other_photos(run, known, (*photos.photos, *pictures.photos))
    return replace(photos, photos=first), replace(class_pictures, photos=second) if class_pictures else None


def _in_order(photos: Sequence[Photo], identities: Sequence[str]) -> tuple[Photo, ...] | None:
    """The photos in the order of these identities; None unless they are exactly these."""
    left = list(photos)
    ordered = []
    for identity in identities:
        number = next((i for i, photo in enumerate(left) if photo.identity == identity), None)
        if number is None:
            return None
        ordered.append(left.pop(number))
    return None if left else tuple(ordered)


def _other_photos(run: RunFolder, known: Sequence[str], found: Sequence[Photo]) -> ResumeError:
    missing = len(set(known) - {photo.identity for photo in found})
    new = [photo.path.name for photo in found if photo.identity not in known]
    what = [f"{missing} of {len(known)} are gone or changed"] if missing else []
    what += [f"new or changed: {', '.join(new[:5])}{', ...' if len(new) > 5 else ''}"] if new else []
    option = "--subjects" if any(photo.subject for photo in found) else "--images"
    return ResumeError(
        f"The photos, masks or captions have changed since {run.path} began "
        f"({'; '.join(what) or f'there were {len(known)} and now there are {len(found)}'}). Put them back, name "
        f"where they are now with {option}, or start a new run."
    )


def check_weights(run: RunFolder, before: Mapping[str, str], now: Mapping[str, str], base: Backbone) -> None:
    """Raises: ResumeError if a network or the noise schedule is another than when the run began."""
    other = changed(before, now)
    if not other:
        return
    name = other[0]
    where = base.vae[0].name if name == "vae" and base.vae else base.name
    also = f" (and {', '.join(f'the {LABELS[one]}' for one in other[1:])})" if other[1:] else ""
    option = "--set model.vae" if name == "vae" and base.vae else "--model"
    raise ResumeError(
        f"The {LABELS[name]}{also} of {where} is another than when {run.path} began: was {before[name]}, now "
        f"{now[name]}. Name the one that it began with with {option}, or start a new run."
    )


def check_division(run: RunFolder, checkpoint: Checkpoint, settings: Settings, processes: int) -> None:
    """Raises: ResumeError unless a step takes as many samples as before, however they are divided."""
    training, before = settings.training, checkpoint.samples_a_step
    batch, accumulate = int(training.batch_size), int(training.accumulate)
    now = batch * accumulate * processes
    if now == before:
        return
    fits = next(
        ((b, before // (b * processes)) for b in range(batch, 0, -1) if before % (b * processes) == 0), None
    )
    way = (
        f"Pass --set training.batch_size={fits[0]} --set training.accumulate={fits[1]} to take as many."
        if fits
        else f"No batch size divides {before} among {processes} processes; start another number of them."
    )
    raise ResumeError(
        f"{run.path} took {before} samples a step over all processes, this launch would take {now} (batch {batch} x "
        f"{accumulate} accumulated x {processes} process{'es' if processes > 1 else ''}). {way}"
    )


def check_steps(run: RunFolder, step: int, steps: int) -> None:
    """Raises: ResumeError if the run has made all that is asked for, or more."""
    if step > steps:
        raise ResumeError(
            f"{run.path} is at step {step} already, and {steps} are asked for. Ask for more than {step} with --steps."
        )
    if step == steps and run.finished:
        raise ResumeError(f"{run.path} has finished its {step} steps; ask for more with --steps.")


def introduction(run: RunFolder, step: int, steps: int) -> str:
    """Where it goes on, in a line."""
    if not step:
        return f"resume   {run.path} after step 0, as there is no checkpoint yet"
    if step == steps:
        return f"resume   {run.path} after step {step}, its last: nothing is left to train, the adapter is written"
    return f"resume   {run.path} after step {step} of {steps}"
