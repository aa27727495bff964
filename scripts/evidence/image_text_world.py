"""Write pictures of pocket's world with questions and answers, as `coeffdiff image-text` reads them.

python scripts/evidence/image_text_world.py work/pretraining --questions pretraining --count 6000 --heldout 300
python scripts/evidence/image_text_world.py work/tasks --questions tasks --count 1500 --heldout 500 --validation 250

`pretraining` asks for kind, colour and place, of one picture or of one of two, and whether there is a pattern, wants
captions, and compares kinds and colours. `tasks` are four kinds of questions that are not among those, named after the
data sets whose kind they are:

    vqa      which pattern has it?                            (so far patterns stood in captions alone)
    gqa      is it a striped red mug in the snow?             (all at once; "no" is wrong in one of the four)
    nlvr     do both pictures show the same pattern / place?  (two pictures; so far kinds and colours)
    caption  kind, colour, pattern and place in a fixed order (so far captions were free)

No two splits, and no two sets, share a scene; all words of the tasks are words of the pre-training.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from coeffdiff.pocket.world import (
    COLOURS,
    KINDS,
    PATTERNS,
    SETTINGS,
    Scene,
    article,
    caption,
    render,
    sample_scene,
    vocabulary,
)
from coeffdiff.pocket.world.subjects.photos import picture_of
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.paths import path_argument
from coeffdiff.utils.seeding import stable_seed

ANSWERS = {"kind": tuple(KINDS), "colour": tuple(COLOURS), "pattern": tuple(PATTERNS), "setting": SETTINGS}
NOUNS = {"kind": "kind", "colour": "colour", "pattern": "pattern", "setting": "place"}
CHUNK = 120  # pictures drawn at a time
QUESTION_WORDS = (
    "what is it which where kind colour pattern place has does it have a do both pictures show the same in first "
    "second picture describe yes no"
)
Question = tuple[list[int], str, str]  # the pictures' numbers, the question, the answer


def words() -> list[str]:
    """Every word of all questions and answers, sorted."""
    return sorted({*vocabulary(), *QUESTION_WORDS.split()})


def pretraining(scenes: Sequence[Scene], i: int, rng: random.Random) -> Iterator[tuple[str, Question]]:
    """Up to nine questions that begin with picture i."""
    scene, j = scenes[i], _other(scenes, i, rng)
    yield "caption", ([i], "describe it", caption(scene, rng.random()).replace(",", ""))
    yield "kind", ([i], "what is it", scene.kind)
    yield "colour", ([i], "what colour is it", str(scene.colour))
    yield "place", ([i], "where is it", scene.setting)
    yield "patterned", ([i], "does it have a pattern", _yes(scene.pattern != "plain"))
    name = rng.choice(("kind", "colour", "setting"))
    said = getattr(scene, name) if rng.random() < 0.5 else _wrong(scene, name, rng)
    yield (
        "is it",
        ([i], f"is it {article(said) if name == 'kind' else said}", _yes(said == getattr(scene, name))),
    )
    which, asked = rng.choice((0, 1)), rng.choice(("kind", "colour", "setting"))
    told = str(getattr(scenes[(i, j)[which]], asked))
    yield "one of two", ([i, j], f"what {NOUNS[asked]} is in the {('first', 'second')[which]} picture", told)
    name = rng.choice(("kind", "colour"))
    yield "same", _same(scenes, i, name, rng)
    name = rng.choice(("kind", "colour"))
    if getattr(scene, name) != getattr(scenes[j], name):
        told = str(getattr(scenes[(i, j)[which]], name))
        yield "which", ([i, j], f"which picture has the {name} {told}", ("first", "second")[which])


def tasks(scenes: Sequence[Scene], i: int, rng: random.Random) -> Iterator[tuple[str, Question]]:
    """The four new questions that begin with picture i."""
    scene = scenes[i]
    yield "vqa", ([i], "which pattern has it", scene.pattern)
    said = {name: str(getattr(scene, name)) for name in ANSWERS}
    right = rng.random() < 0.5
    if not right:
        wrong = rng.choice(tuple(ANSWERS))
        said[wrong] = _wrong(scene, wrong, rng)
    thing = article(f"{said['pattern']} {said['colour']} {said['kind']}")
    yield "gqa", ([i], f"is it {thing} {said['setting']}", _yes(right))
    yield "nlvr", _same(scenes, i, rng.choice(("pattern", "setting")), rng)
    all_parts = f"{scene.kind} {scene.colour} {scene.pattern} {scene.setting}"
    yield "caption", ([i], "describe kind colour pattern place", all_parts)


SETS: dict[str, Callable[..., Iterator[tuple[str, Question]]]] = {"pretraining": pretraining, "tasks": tasks}


def write_world(folder: Path, questions: str, splits: dict[str, int], told: Callable[[int], None]) -> None:
    """Pictures 128 px wide (JPEG, quality 95) and questions.jsonl; pictures that are there are not drawn again.

    splits: name -> number of pictures.
    """
    lines: list[dict[str, Any]] = []
    done = 0
    for split, count in splits.items():
        seeds = [stable_seed("image-text", questions, split, i) for i in range(count)]
        scenes = [sample_scene(seed) for seed in seeds]
        names = [f"images/{split}-{i:05d}.jpg" for i in range(count)]
        for begin in range(0, count, CHUNK):
            _draw(folder, names[begin : begin + CHUNK], scenes[begin : begin + CHUNK])
            told(done := done + len(names[begin : begin + CHUNK]))
        for i, seed in enumerate(seeds):
            for task, (numbers, question, answer) in SETS[questions](scenes, i, random.Random(seed)):
                images = [names[number] for number in numbers]
                lines.append(
                    {"images": images, "question": question, "answer": answer, "task": task, "split": split}
                )
    with atomic_write(folder / "questions.jsonl") as unfinished:
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _draw(folder: Path, names: Sequence[str], scenes: Sequence[Scene]) -> None:
    if all((folder / name).exists() for name in names):
        return
    for name, image in zip(names, render(scenes)[0], strict=True):
        with atomic_write(folder / name) as unfinished, unfinished.open("wb") as file:
            picture_of(image).save(file, "JPEG", quality=95)


def _same(scenes: Sequence[Scene], i: int, name: str, rng: random.Random) -> Question:
    """Picture i and another: the same by half."""
    right = rng.random() < 0.5
    value = getattr(scenes[i], name)
    others = [j for j, other in enumerate(scenes) if j != i and (getattr(other, name) == value) == right]
    j = rng.choice(others) if others else _other(scenes, i, rng)
    return [i, j], f"do both pictures show the same {NOUNS[name]}", _yes(getattr(scenes[j], name) == value)


def _other(scenes: Sequence[Scene], i: int, rng: random.Random) -> int:
    return (i + rng.randrange(1, len(scenes))) % len(scenes)


def _wrong(scene: Scene, name: str, rng: random.Random) -> str:
    return str(rng.choice([value for value in ANSWERS[name] if value != getattr(scene, name)]))


def _yes(right: bool) -> str:
    return "yes" if right else "no"


def main() -> int:
    from coeffdiff.utils.console import progress

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=path_argument)
    parser.add_argument("--questions", choices=sorted(SETS), required=True)
    parser.add_argument("--count", type=int, default=1500, help="pictures to train on")
    parser.add_argument("--validation", type=int, default=0, help="pictures to choose rates on")
    parser.add_argument("--heldout", type=int, default=500, help="pictures to test on")
    chosen = parser.parse_args()
    counts = {"train": chosen.count, "validation": chosen.validation, "test": chosen.heldout}
    with progress("drawing", sum(counts.values())) as bar:
        write_world(chosen.folder, chosen.questions, {name: n for name, n in counts.items() if n}, bar)
    return 0


if __name__ == "__main__":
    sys.exit(main())
