"""Captions of photos, written as soon as they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from coeffdiff.data.photos import Photo
from coeffdiff.labelling.captioner import Captioner
from coeffdiff.labelling.places import Place
from coeffdiff.labelling.wording import with_subject
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.output_folder import write_errors


@dataclass(frozen=True)
class Captioned:
    photo: Photo
    file: Path
    text: str


def write_captions(
    places: Sequence[Place],
    captioner: Captioner,
    token: str,
    class_word: str | None,
    *,
    batch_size: int,
    dry_run: bool = False,
    on_photo: Callable[[int], None] = lambda done: None,
) -> tuple[list[Captioned], list[Photo]]:
    """A caption for each place, each batch written before the next is begun; and the photos that it says nothing of.

    Args:
        token, class_word: see with_subject.
        dry_run: nothing is written.
        on_photo: called with the number of photos that are done.
    Raises: PhotoError for a photo that has changed since it was read, ConfigError for a file that cannot be written.
    """
    written, silent = [], []
    for begin in range(0, len(places), batch_size):
        batch = places[begin : begin + batch_size]
        texts = captioner.captions([place.photo.open() for place in batch])
        for place, text in zip(batch, texts, strict=True):
            if not text:
                silent.append(place.photo)
                continue
            caption = with_subject(text, token, class_word)
            if not dry_run:
                with write_errors(str(place.file)), atomic_write(place.file) as temporary:
                    temporary.write_text(caption + "\n", encoding="utf-8", newline="\n")
            written.append(Captioned(place.photo, place.file, caption))
        on_photo(begin + len(batch))
    return written, silent
