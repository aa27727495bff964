"""Questions about pictures: a folder with questions.jsonl, a line for each question.

{"image": "images/1.jpg", "question": "which pattern has it", "answer": "striped", "task": "vqa"}
{"images": ["images/1.jpg", "images/2.jpg"], "question": "same place", "answer": "no", "task": "nlvr", "split": "test"}

Paths are relative to the folder. Without "task" all questions are one task. Either every line has a "split" (train,
validation, test) or none has, and then pictures are divided 70 : 15 : 15, so that no picture is in two splits.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coeffdiff.errors import ConfigError, PhotoError
from coeffdiff.tasks.image_text_model import MOST_PICTURES
from coeffdiff.utils.seeding import stable_seed

FILE = "questions.jsonl"
SPLITS = {"train": 0.70, "validation": 0.15, "test": 0.15}
_KEYS = ("image", "images", "question", "answer", "task", "split")


@dataclass(frozen=True)
class Question:
    """pictures: rows of ImageTextData.pictures."""

    pictures: tuple[int, ...]
    text: str
    answer: str
    task: str


@dataclass(frozen=True)
class ImageTextData:
    """pictures: every file that a question shows, once.  splits: train, validation and test."""

    folder: Path
    pictures: tuple[Path, ...]
    splits: Mapping[str, tuple[Question, ...]]

    @property
    def tasks(self) -> tuple[str, ...]:
        """In alphabetical order."""
        return tuple(sorted({question.task for part in self.splits.values() for question in part}))


def read_questions(folder: Path, needed: Sequence[str] = tuple(SPLITS)) -> ImageTextData:
    """The questions of a folder.

    needed: splits that may not be empty.
    Raises: ConfigError for a file that is missing, not UTF-8 or has a line that is no question, each with its number;
        PhotoError for a picture that is not there.
    """
    numbers: dict[Path, int] = {}
    questions, splits = [], []
    for where, line in _lines(folder):
        paths, text, answer, task, split = _parsed(where, line)
        for path in paths:
            if not (folder / path).is_file():
                raise PhotoError(f"{where}: there is no picture {folder / path}.")
        rows = tuple(numbers.setdefault(folder / path, len(numbers)) for path in paths)
        questions.append(Question(rows, text, answer, task))
        splits.append(split)
    if None in splits and any(splits):
        raise ConfigError(
            f"{folder / FILE} has {len(splits) - splits.count(None)} lines with a split and {splits.count(None)} "
            "without; give one to all lines or to none."
        )
    chosen = splits if any(splits) else _divided(questions)
    parts = {
        name: tuple(q for q, split in zip(questions, chosen, strict=True) if split == name) for name in SPLITS
    }
    _check_splits(folder, parts, needed, given=any(splits))
    return ImageTextData(folder, tuple(numbers), parts)


def _lines(folder: Path) -> list[tuple[str, str]]:
    """Lines that are not blank, each after its place."""
    file = folder / FILE
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}; name one with {FILE} in it.")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f'{folder} has no {FILE}; write a line such as {{"image": "1.jpg", "question": "what is it", '
            '"answer": "a mug"}} for each question.'
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{file}, line {line} is not UTF-8; save the file as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from None
    # Not splitlines(), which also breaks at characters that JSON allows inside of texts
    lines = [(f"{file}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"{file} is empty; write a line for each question.")
    return lines


def _parsed(where: str, line: str) -> tuple[list[str], str, str, str, str | None]:
    """Pictures, question, answer, task and split of one line."""
    try:
        told = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}.") from None
    except RecursionError:  # a thousand brackets
        raise ConfigError(f"{where} is no question: nested too deeply.") from None
    if not isinstance(told, dict):
        raise ConfigError(f"{where} is no JSON object in braces.")
    if unknown := sorted(set(told) - set(_KEYS)):
        raise ConfigError(f"{where} has an unknown key {unknown[0]!r}; there are {', '.join(_KEYS)}.")
    question, answer = (_text(where, told, name) for name in ("question", "answer"))
    task = _text(where, told, "task") if "task" in told else "questions"
    split = told.get("split")
    if split is not None and split not in tuple(SPLITS):  # a list, which cannot be hashed, is none either
        raise ConfigError(f"{where} has a split {split!r}; there are {', '.join(SPLITS)}.")
    return _images(where, told), question, answer, task, split


def _text(where: str, told: Mapping[str, Any], name: str) -> str:
    if name not in told:
        raise ConfigError(f"{where} has no {name}.")
    value = told[name]
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where} has {name}: {json.dumps(value)[:60]}, and a text is wanted.")
    return " ".join(value.split())


def _images(where: str, told: Mapping[str, Any]) -> list[str]:
    if ("image" in told) == ("images" in told):
        raise ConfigError(f"{where} needs an image, or a list of images, and not both.")
    images = told.get("images", [told.get("image")])
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise ConfigError(f"{where} names pictures by something else than texts.")
    if not 1 <= len(images) <= MOST_PICTURES:
        raise ConfigError(f"{where} has {len(images)} pictures; a question has 1 to {MOST_PICTURES}.")
    return images


def _divided(questions: Sequence[Question]) -> list[str]:
    """A split for each question; pictures that one question shows together stay together."""
    group: dict[int, int] = {}

    def first(picture: int) -> int:
        while group.setdefault(picture, picture) != picture:
            group[picture] = group[group[picture]]
            picture = group[picture]
        return picture

    for question in questions:
        for picture in question.pictures:
            group[first(picture)] = first(question.pictures[0])
    groups = sorted({first(question.pictures[0]) for question in questions})
    random.Random(stable_seed("splits")).shuffle(groups)
    of, begin = {}, 0.0
    for name, share in SPLITS.items():
        end = begin + share
        for one in groups[round(begin * len(groups)) : round(end * len(groups))]:
            of[one] = name
        begin = end
    return [of[first(question.pictures[0])] for question in questions]


def _check_splits(
    folder: Path, parts: Mapping[str, Sequence[Question]], needed: Sequence[str], given: bool
) -> None:
    for name in needed:
        if not parts[name]:
            why = (
                "give it some lines"
                if given
                else "there are too few pictures that no question shows together, so give each line a split"
            )
            raise ConfigError(f"{folder / FILE} has no questions to {_USES[name]} (split {name}): {why}.")
    trained = {question.task for question in parts["train"]}
    for name in ("validation", "test"):
        if lacking := sorted({question.task for question in parts[name]} - trained):
            raise ConfigError(
                f"{folder / FILE} has questions of the task {lacking[0]} in the split {name}, but none to train on."
            )


_USES = {"train": "train on", "validation": "choose learning rates on", "test": "test on"}
