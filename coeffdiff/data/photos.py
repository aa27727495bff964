"""The photos of a folder: read, checked, with their captions and masks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from coeffdiff.config.schema import SubjectSettings
from coeffdiff.data.captions import METADATA, Captions, companion_of, printable_name
from coeffdiff.data.decoding import (
    KINDS,
    SUFFIXES,
    SYSTEM_FILE,
    alpha_channel,
    alpha_of_file,
    brightness_of,
    colour_fault,
    decode_again,
    decode_image,
    read_image_file,
    to_rgb,
)
from coeffdiff.data.layout import folder_label, photo_folder
from coeffdiff.data.mask_images import MASK_SUFFIX, Mask, check_mask, read_mask
from coeffdiff.data.masks import Masks
from coeffdiff.errors import PhotoError
from coeffdiff.utils.console import print_info


@dataclass(frozen=True)
class Photo:
    """A photo that was decoded once without complaint; its pixels stay on disk.

    digest is the sha256 (hex) of the file's bytes; width and height are upright, in pixels; caption is its own
    caption on one line, placeholders not yet filled; subject counts the run's subjects from 0.
    """

    path: Path
    digest: str
    width: int
    height: int
    caption: str | None = None
    mask: Mask | None = None
    subject: int = 0

    @property
    def identity(self) -> str:
        """Of its content, caption, mask and subject, wherever the files lie."""
        of_subject = f" subject {self.subject + 1}" if self.subject else ""
        return self.digest + (self.caption or "") + (self.mask.digest if self.mask else "") + of_subject

    def open(self) -> Image.Image:
        """The picture: RGB, 8 bits, sRGB, upright, transparent parts on white, an animation's first frame.

        Raises: PhotoError if the file vanished or changed since it was checked.
        """
        image = decode_again(self.path, self.digest, to_rgb)
        assert image is not None
        return image

    def open_mask(self) -> Image.Image | None:
        """The mask: 8-bit grey in the size of the upright photo, 255 on the subject; None without one.

        Raises: PhotoError if its file vanished or changed since it was checked.
        """
        if self.mask is None:
            return None
        return decode_again(
            self.mask.path, self.mask.digest, alpha_channel if self.mask.path == self.path else brightness_of
        )


@dataclass(frozen=True)
class Skipped:
    """A file that is no photo, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class PhotoSet:
    """photos are sorted by file name; notes are sentences on what the user may not expect."""

    photos: tuple[Photo, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()


NO_PHOTOS = PhotoSet((), ())


def read_photos(
    folder: Path,
    masks: bool | Literal["auto"] = "auto",
    wanted: str = "three to six of the subject",
    on_file: Callable[[int], None] = lambda done: None,
) -> PhotoSet:
    """Every usable photo of a folder, sorted by name; other files are listed with the reason, and never touched.

    Each file is decoded in full, so that a truncated one is found now and not in the middle of a run.
    Subfolders are not entered, but for one in kohya's layout (see layout.py); links to photos are followed.

    Args:
        masks: "auto" takes those that are there, True requires one for every photo, False ignores them.
        wanted: what to put into a folder without photos, for the error.
        on_file: called with the number of files that have been read.
    Raises: PhotoError if there is no such folder, it cannot be listed, it holds no usable photo, or a mask is
        missing or unusable: a photo with a broken mask is not trained without it.
    """
    given = Path(folder)
    folder = photo_folder(given, holds_pictures)
    entries = _entries(folder)
    mask_files = Masks(entries, SUFFIXES)
    pictures = [path for path in entries if path.suffix.lower() in SUFFIXES and path not in mask_files]
    names = {path.name for path in pictures}
    stems = names | {path.stem for path in pictures}
    captions = Captions.of(entries, names)
    photos: dict[str, Photo] = {}  # by digest
    skipped: list[Skipped] = []
    notes = _notes_on_layout(given, folder)
    for number, path in enumerate(entries, 1):
        on_file(number)
        if (mask_files.owner(path) or companion_of(path)) in stems or path.name in METADATA:
            continue
        try:
            read = _read_picture(path, mask_files, photos, with_alpha=bool(masks))
        except PhotoError as reason:
            skipped.append(Skipped(path, str(reason)))
            continue
        if fault := colour_fault(read.data):
            notes.append(f"{printable_name(path)} {fault}; its colours are taken as they are.")
        mask = _mask_of(path, read, mask_files.of(path)) if masks else None
        photos[read.digest] = Photo(path, read.digest, read.width, read.height, captions.caption(path), mask)
    if not photos:
        raise PhotoError(_nothing_usable(folder, skipped, wanted))
    if masks is True:
        _refuse_missing_masks(list(photos.values()), folder)
    return PhotoSet(tuple(photos.values()), tuple(skipped), (*notes, *captions.close()))


def count_files(folder: Path) -> int:
    """How many files read_photos looks at; 0 where there is no such folder. Raises: PhotoError."""
    inner = photo_folder(Path(folder), holds_pictures)
    return len(list(inner.iterdir())) if inner.is_dir() else 0


def offered_values(subject: SubjectSettings) -> dict[str, str]:
    """Token and class word that the settings lack and the folder's name in kohya's layout has, by dotted name.

    Raises: PhotoError if there are several such folders.
    """
    if subject.images is None or (subject.token and subject.class_word):
        return {}
    label = folder_label(photo_folder(subject.images, holds_pictures))
    if label is None:
        return {}
    offered = {}
    if not subject.token:
        offered["subject.token"] = label.token
    if not subject.class_word and label.class_word:
        offered["subject.class_word"] = label.class_word
    if offered:
        values = " and ".join(f"{name} {value}" for name, value in offered.items())
        print_info(f"offered  {values}, by the name of the folder {label.folder}")
    return offered


@dataclass(frozen=True)
class _Picture:
    """A decoded file. Sizes are upright, in pixels; alpha: its alpha channel, if that hides anything."""

    data: bytes
    digest: str
    width: int
    height: int
    alpha: Image.Image | None


def _read_picture(path: Path, masks: Masks, before: Mapping[str, Photo], *, with_alpha: bool) -> _Picture:
    """Read and decode a file in full. Raises: PhotoError, a reason without the name.

    before: photos that were read before, by digest.
    with_alpha: whether to look at the alpha channel of a photo without a mask of its own.
    """
    data = read_image_file(path, masks)
    digest = hashlib.sha256(data).hexdigest()
    if digest in before:
        raise PhotoError(f"same picture as {printable_name(before[digest].path)}")
    width, height = decode_image(data).size
    alpha = alpha_of_file(data) if with_alpha and not masks.of(path) else None
    return _Picture(data, digest, width, height, alpha)


def _mask_of(path: Path, picture: _Picture, mask_file: Path | None) -> Mask | None:
    """Raises: PhotoError for a mask that cannot be used."""
    if picture.alpha is not None:
        check_mask(printable_name(path), "it is transparent all over", picture.alpha)
        return Mask(path, picture.digest)
    return read_mask(mask_file, path, (picture.width, picture.height)) if mask_file else None


def _refuse_missing_masks(photos: Sequence[Photo], folder: Path) -> None:
    bare = [printable_name(photo.path) for photo in photos if photo.mask is None]
    if bare:
        raise PhotoError(
            f"training.masked_loss is true, but {len(bare)} of {len(photos)} photos in {folder} have no mask "
            f"({', '.join(bare[:5])}{', ...' if len(bare) > 5 else ''}). Put photo{MASK_SUFFIX} beside each, "
            "or set training.masked_loss=auto."
        )


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except FileNotFoundError:
        raise PhotoError(f"There is no folder {folder}; give the one that holds the photos.") from None
    except NotADirectoryError:
        raise PhotoError(f"{folder} is a file; give the folder that holds the photos.") from None
    except OSError as error:
        raise PhotoError(f"The folder {folder} cannot be read ({error.strerror or error}).") from None


def _notes_on_layout(given: Path, folder: Path) -> list[str]:
    """A note for a folder in kohya's layout."""
    label = folder_label(folder)
    if label is None:
        return []
    name = printable_name(folder)
    fact = f"The photos are those of {name} in {given}, kohya's layout"
    if given == folder:
        fact = f"{name} is named as in kohya's layout"
    return [f"{fact}; that each is to be seen {label.repeats} times is ignored, training.steps decides."]


def _nothing_usable(folder: Path, skipped: Iterable[Skipped], wanted: str) -> str:
    named = [s for s in skipped if s.reason != SYSTEM_FILE]
    if not named:
        return f"There are no photos in {folder}; put {wanted} there ({KINDS})."
    sentence = f"{folder} holds no usable photo; left out: "
    sentence += ", ".join(f"{printable_name(s.path)} ({s.reason})" for s in named[:5])
    sentence += f" and {len(named) - 5} more." if len(named) > 5 else "."
    below = next((s.path for s in named if holds_pictures(s.path)), None)
    return f"{sentence} There are pictures in {below}: give that folder." if below else sentence


def holds_pictures(folder: Path) -> bool:
    """Whether files with a picture's suffix lie in it."""
    try:
        return any(p.suffix.lower() in SUFFIXES and not p.name.startswith(".") for p in folder.iterdir())
    except OSError:  # not a folder, or one that may not be read
        return False
