"""What `caption` and `mask` share: options, the photos, and what is said of those that are left as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from coeffdiff.cli.options import PATH
from coeffdiff.errors import ConfigError
from coeffdiff.utils.console import print_info, progress

if TYPE_CHECKING:
    from coeffdiff.config.schema import SubjectSettings
    from coeffdiff.data.photos import Photo, PhotoSet
    from coeffdiff.labelling.places import Places

PhotoFolder = Annotated[Path, typer.Argument(help="Folder with the photos.", **PATH | {"metavar": "DIR"})]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps. (default: the fastest)")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace those that are there already.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be written, and write nothing.")]
PhotosAtATime = Annotated[int, typer.Option(min=1, help="Photos at a time.")]


def read_folder(
    folder: Path,
    token: str | None,
    class_word: str | None,
    *,
    masks: Literal["auto"] | bool,
    offer: bool = True,
) -> tuple[PhotoSet, SubjectSettings]:
    """The photos, and token and class word.

    Args:
        masks: see read_photos.
        offer: take what is not given from the folder's name in kohya's layout.
    Raises: ConfigError, PhotoError.
    """
    from coeffdiff.config.loading import load_settings
    from coeffdiff.config.tree import with_values
    from coeffdiff.data.photos import count_files, offered_values, read_photos
    from coeffdiff.utils.launch_environment import forget_launch

    forget_launch()
    flags = {"subject.images": str(folder), "subject.token": token, "subject.class_word": class_word}
    settings = load_settings(None, flags)
    if offer:
        settings = with_values(settings, offered_values(settings.subject))
    with progress("reading photos", count_files(folder)) as bar:
        photos = read_photos(folder, masks, on_file=bar)
    return photos, settings.subject


def print_left(photos: PhotoSet, places: Places) -> None:
    """A line for each file that is no photo, for each note on them, and for each photo that is left as it is."""
    for skipped in photos.skipped:
        print_info(f"left out {skipped.path.name}: {skipped.reason}")
    for note in photos.notes:
        print_info(f"note     {note}")
    alike: dict[str, list[Photo]] = {}
    for kept in places.kept:
        alike.setdefault(kept.reason, []).append(kept.photo)
    for reason, kept_photos in alike.items():
        print_info(f"kept     {counted(kept_photos, len(photos.photos))}: {reason}")


def refuse_read_only(places: Places) -> None:
    """Raises: ConfigError, before a model is loaded, if nothing can be written beside the photos."""
    from coeffdiff.utils.output_folder import why_unwritable

    folder = places.new[0].file.parent
    if reason := why_unwritable(folder):
        raise ConfigError(
            f"The folder {folder} cannot be written: {reason}. Copy the photos to a folder of yours, or see with "
            "--dry-run what would be written."
        )


def smaller(batch_size: int, device: str) -> list[str]:
    """The options that are left where memory does not suffice."""
    return ["--batch-size 1"] * (batch_size > 1) + ["--device cpu"] * (device != "cpu")


def as_tree(photos: PhotoSet, places: Places, written: list[dict[str, Any]]) -> dict[str, Any]:
    """For --json: what was written, what was kept and left out, and why."""
    return {
        "written": written,
        "kept": [{"photo": kept.photo.path.name, "reason": kept.reason} for kept in places.kept],
        "left_out": [{"name": skipped.path.name, "reason": skipped.reason} for skipped in photos.skipped],
        "notes": photos.notes,
    }


def counted(photos: Sequence[Photo], of: int) -> str:
    """ "2 of 5 photos (a.jpg, b.jpg)"."""
    from coeffdiff.data.captions import named, printable_name

    return f"{len(photos)} of {of} photos ({named([printable_name(photo.path) for photo in photos])})"
