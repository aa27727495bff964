"""Labelled examples: a folder of class folders of pictures, or a CSV file of texts."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from coeffdiff.data.photos import Photo, Skipped, read_photos
from coeffdiff.errors import ConfigError

Kind = Literal["images", "texts"]
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Example:
    """A picture or a text, and the index of its class. digest: of its content."""

    label: int
    digest: str
    text: str | None = None
    photo: Photo | None = None

    def content(self) -> str | Image.Image:
        """The text, or the RGB picture. Raises: PhotoError if its file has changed since it was read."""
        return self.photo.open() if self.photo else str(self.text)


@dataclass(frozen=True)
class Examples:
    """classes are sorted by name; notes are sentences on what was left out."""

    kind: Kind
    classes: tuple[str, ...]
    items: tuple[Example, ...]
    notes: tuple[str, ...] = ()

    def of_class(self, label: int) -> list[int]:
        """The indices of a class's examples."""
        return [index for index, item in enumerate(self.items) if item.label == label]


def read_examples(
    data: Path,
    text_column: str = "text",
    label_column: str = "label",
    on_class: Callable[[int], None] = lambda done: None,
) -> Examples:
    """The examples of a folder or file, those with the same content once, or not at all if their classes differ.

    Args:
        data: a folder that has a folder of pictures for each class; or a .csv or .tsv file in UTF-8 whose first line
            names its columns.
        on_class: called with the number of class folders that have been read.
    Raises: ConfigError for what is neither, one class only, or a file that cannot be read; PhotoError for a class
        without a usable picture.
    """
    if data.is_dir():
        return _unambiguous(_read_pictures(data, on_class))
    if not data.exists():
        raise ConfigError(f"There is no {data}; give a folder of class folders, or a CSV file of texts.")
    if data.suffix.lower() not in _SEPARATORS:
        raise ConfigError(
            f"{data} is neither a folder of class folders of pictures nor a .csv or .tsv file of texts."
        )
    return _unambiguous(_read_texts(data, text_column, label_column))


def _read_pictures(folder: Path, on_class: Callable[[int], None]) -> Examples:
    names = class_folders(folder)
    if len(names) < 2:
        raise ConfigError(
            f"{folder} has {len(names) or 'no'} class folder{'s' * (len(names) != 1)}; at least two are needed, each "
            "with the pictures of a class and named after it."
        )
    items: list[Example] = []
    notes: list[str] = []
    for label, name in enumerate(names):
        found = read_photos(folder / name, masks=False, wanted="the pictures of that class")
        items += [Example(label, photo.digest, photo=photo) for photo in found.photos]
        notes += [
            f"{name}/{skip.path.name} is left out: {skip.reason}." for skip in _worth_saying(found.skipped)
        ]
        on_class(label + 1)
    return Examples("images", tuple(names), tuple(items), tuple(notes))


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones and __MACOSX are no classes."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _worth_saying(skipped: Iterable[Skipped]) -> list[Skipped]:
    return [one for one in skipped if not one.path.name.startswith(".")]


def _read_texts(file: Path, text_column: str, label_column: str) -> Examples:
    rows = _rows(file, text_column, label_column)
    whole = [(text.strip(), label.strip()) for text, label in rows if text.strip() and label.strip()]
    classes = sorted({label for _, label in whole})
    if len(classes) < 2:
        found = f"one label only, {classes[0]}" if classes else "no row with a text and a label"
        raise ConfigError(f"{file} has {found}; at least two classes are needed.")
    notes = []
    if absent := len(rows) - len(whole):
        notes.append(
            f"{absent} of {len(rows)} rows are left out: they have no {text_column} or no {label_column}."
        )
    index = {name: label for label, name in enumerate(classes)}
    items = [
        Example(index[label], hashlib.sha256(text.encode()).hexdigest(), text=text) for text, label in whole
    ]
    return Examples("texts", tuple(classes), tuple(items), tuple(notes))


def _rows(file: Path, text_column: str, label_column: str) -> list[tuple[str, str]]:
    """The two columns of every row; what a short row lacks is empty."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, delimiter=_SEPARATORS[file.suffix.lower()])
            columns = reader.fieldnames or []
            for wanted in (text_column, label_column):
                if wanted not in columns:
                    raise ConfigError(
                        f"{file} has no column {wanted!r}; its first line names "
                        f"{', '.join(map(repr, columns)) or 'none'}. --text-column and --label-column choose others."
                    )
            return [(row[text_column] or "", row[label_column] or "") for row in reader]
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}): save it as UTF-8."
        ) from None
    except csv.Error as error:
        raise ConfigError(f"{file} cannot be read as CSV: {error}.") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from None


def _unambiguous(examples: Examples) -> Examples:
    """Without repetitions, which could be trained on and tested on, and without contents of two classes."""
    labels: dict[str, set[int]] = {}
    for item in examples.items:
        labels.setdefault(item.digest, set()).add(item.label)
    once = {item.digest: item for item in examples.items if len(labels[item.digest]) == 1}
    notes = list(examples.notes)
    torn = sum(len(labels[item.digest]) > 1 for item in examples.items)
    if torn:
        notes.append(f"{torn} {examples.kind} are left out: the same content stands in several classes.")
    if repeated := len(examples.items) - torn - len(once):
        notes.append(f"{repeated} {examples.kind} are left out: the same content came before.")
    return Examples(examples.kind, examples.classes, tuple(once.values()), tuple(notes))


def enough_of_each(examples: Examples, needed: int, why: str) -> None:
    """Raises: ConfigError for a class with fewer than `needed` examples."""
    for label, name in enumerate(examples.classes):
        if (count := len(examples.of_class(label))) < needed:
            one = "text" if examples.kind == "texts" else "picture"
            raise ConfigError(
                f"The class {name!r} has {count} {one}{'s' * (count != 1)}, and {why} takes {needed}: add some, leave "
                "the class out, or ask for fewer --shots."
            )
