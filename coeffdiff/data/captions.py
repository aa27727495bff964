"""The captions in a folder of photos, in this tool's files and those of others.

In this order, the first with any text counts:
    photo.txt, photo.jpg.txt, photo.caption, photo.jpg.caption    beside photo.jpg
    metadata.jsonl, metadata.csv    a line with `file_name` and `text`, as in the Hub's image folders

Captions inside pictures (EXIF, XMP) are not read: no trainer of this field writes or reads them there, and what
cameras and generators leave in these fields ("OLYMPUS DIGITAL CAMERA", lists of sampler settings) is no caption.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from coeffdiff.errors import PhotoError
from coeffdiff.utils.text import has_surrogates

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")
MAX_CAPTION_BYTES = 20_000  # the model reads 77 tokens
MAX_METADATA_BYTES = 50_000_000
_NAMED = 5  # of many files, the first so many are named
_MARKS = (  # UTF-32 first: its mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
)


def decode_text(data: bytes) -> tuple[str, str]:
    """A text file's text and encoding: "UTF-8", "UTF-16" or "UTF-32" by its byte-order mark, or "Windows-1252".

    Raises: ValueError, the end of a sentence on the file, for anything else.
    """
    for mark, codec, name in _MARKS:
        if data.startswith(mark):
            try:
                return data.decode(codec), name
            except UnicodeDecodeError:
                raise ValueError(f"begins like {name} text, but is none") from None
    if b"\0" in data:
        raise ValueError("is not UTF-8 text")
    try:
        return data.decode("utf-8"), "UTF-8"
    except UnicodeDecodeError:
        pass
    if not data.decode("utf-8", "ignore").isascii():  # the rest of it is UTF-8 for certain
        raise ValueError("is damaged UTF-8 text")
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        text = ""
    # In other alphabets nearly every letter is beyond ASCII, and each would become a wrong one
    letters = [c for c in text if not c.isascii() or c.isalpha()]
    if sum(not c.isascii() for c in letters) * 2 > len(letters) or not text:
        raise ValueError("is neither UTF-8 nor Windows-1252 text")
    return text, "Windows-1252"


def companion_of(path: Path) -> str | None:
    """The photo that a caption file belongs to: its stem, or its whole name; None for a file of another kind."""
    return path.stem if path.suffix.lower() in CAPTION_SUFFIXES else None


@dataclass
class Captions:
    """The captions of a folder's photos.

    files: caption files by the name or stem of their photo. metadata: file of lines -> photo -> text.
    notes: sentences on what the user may not expect, complete after `close`.
    """

    files: dict[str, list[Path]] = field(default_factory=dict)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _encoded: dict[str, list[str]] = field(default_factory=dict)  # encoding other than UTF-8 -> files

    @classmethod
    def of(cls, entries: Iterable[Path], photos: Collection[str]) -> Captions:
        """entries: all files of a folder. photos: the names of those that may be photos."""
        captions = cls()
        entries = list(entries)
        for suffix in CAPTION_SUFFIXES:
            for path in entries:
                if path.suffix.lower() == suffix:
                    captions.files.setdefault(path.stem, []).append(path)
        for name in METADATA:
            for path in entries:
                if path.name == name:
                    captions._read_metadata(path, photos)
        return captions

    def caption(self, photo: Path) -> str | None:
        """The photo's caption on one line, or None. A file that cannot be read is noted and passed over."""
        texts: list[tuple[str, str]] = []  # file and caption, in order of precedence
        faults = []
        for path in self.files_of(photo):
            try:
                text = _one_line(self._text(path, MAX_CAPTION_BYTES))
            except PhotoError as reason:
                faults.append(f"{printable_name(path)} {reason}")
                continue
            if text:
                texts.append((printable_name(path), text))
        for source, captions in self.metadata.items():
            if text := _one_line(captions.get(photo.name, "")):
                texts.append((source, text))
        name = printable_name(photo)
        for fault in faults:
            instead = texts[0][0] if texts else "the templates"
            self.notes.append(f"{fault}; {name} is captioned from {instead}.")
        others = [source for source, text in texts[1:] if text != texts[0][1]]
        if others:
            self.notes.append(f"{name} is captioned by {texts[0][0]}, and not by {', '.join(others)}.")
        return texts[0][1] if texts else None

    def files_of(self, photo: Path) -> list[Path]:
        """The photo's caption files in order of precedence, readable or not."""
        beside = [*self.files.get(photo.stem, ()), *self.files.get(photo.name, ())]
        return sorted(beside, key=lambda path: CAPTION_SUFFIXES.index(path.suffix.lower()))

    def close(self) -> tuple[str, ...]:
        """All notes, each encoding other than UTF-8 in one of them."""
        encodings = []
        for encoding, names in self._encoded.items():
            verb = "is" if len(names) == 1 else "are"
            encodings.append(f"{named(names)} {verb} not UTF-8, and read as {encoding}.")
        return (*self.notes, *encodings)

    def _text(self, path: Path, most: int) -> str:
        """Raises: PhotoError, the end of a sentence on the file."""
        try:
            if not path.is_file():  # reading a pipe would wait forever
                raise PhotoError("is not an ordinary file")
            if path.stat().st_size > most:
                raise PhotoError(f"is larger than {most // 1000} kB")
            text, encoding = decode_text(path.read_bytes())
        except OSError as error:
            raise PhotoError(f"cannot be read ({error.strerror or error})") from None
        except ValueError as error:
            raise PhotoError(str(error)) from None
        if "\0" in text:
            raise PhotoError("is not UTF-8 text")
        if encoding != "UTF-8":
            self._encoded.setdefault(encoding, []).append(printable_name(path))
        return text

    def _read_metadata(self, path: Path, photos: Collection[str]) -> None:
        try:
            text = self._text(path, MAX_METADATA_BYTES)
            rows = _json_rows(text) if path.suffix == ".jsonl" else _csv_rows(text)
        except PhotoError as reason:
            self.notes.append(f"{printable_name(path)} {reason}; no caption is taken from it.")
            return
        captions: dict[str, str] = {}
        odd: list[str] = []
        unknown: list[str] = []
        without_text: list[str] = []
        for number, row in rows:
            name, caption = row.get("file_name"), row.get("text")
            if not isinstance(name, str) or not name or not _is_text(name):
                odd.append(str(number))
                continue
            name = str(PurePosixPath(name))
            if name not in photos:
                unknown.append(printable_name(Path(name)))
            elif not isinstance(caption, str) or not caption.strip() or not _is_text(caption):
                without_text.append(printable_name(Path(name)))
            else:
                captions[name] = caption
        self.metadata[path.name] = captions
        if odd:
            lines = f"line {odd[0]}" if len(odd) == 1 else f"lines {named(odd)}"
            self.notes.append(f"{path.name}: {lines} gave no file_name, and no caption.")
        if unknown:
            self.notes.append(f"{path.name}: {named(unknown)} {_match(unknown)} no photo in this folder.")
        if without_text:
            self.notes.append(f"{path.name} has no text for {named(without_text)}.")


def named(names: list[str]) -> str:
    """The first names with commas between them, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def printable_name(path: Path) -> str:
    """A file's name, printable on any terminal even if it holds control characters or is no valid text."""
    return path.name if path.name.isprintable() else ascii(path.name)[1:-1]


def _match(names: list[str]) -> str:
    return "matches" if len(names) == 1 else "match"


def _is_text(text: str) -> bool:
    return "\0" not in text and not has_surrogates(text)


def _one_line(text: str) -> str | None:
    return " ".join(text.split()) or None


def _json_rows(text: str) -> list[tuple[int, dict[str, object]]]:
    """The objects of JSON Lines with the numbers of their lines; {} for a line that is no object."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            rows.append((number, row if isinstance(row, dict) else {}))
    return rows


def _csv_rows(text: str) -> list[tuple[int, dict[str, object]]]:
    """Raises: PhotoError, the end of a sentence on the file, if there is no column of names."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        rows: list[tuple[int, dict[str, object]]] = [(reader.line_num, dict(row)) for row in reader]
        heads = reader.fieldnames or ()
    except csv.Error as error:
        raise PhotoError(f"is no CSV ({error})") from None
    if "file_name" not in heads:
        raise PhotoError("has no column file_name")
    return rows
