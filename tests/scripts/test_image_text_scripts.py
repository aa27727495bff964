"""What makes the small image-text model and its questions; and the table that its cells say."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import image_text_world as world
from coeffdiff.evaluation.cells import CellFolder
from coeffdiff.pocket.world import sample_scene
from coeffdiff.tasks.image_text_data import read_questions
from coeffdiff.tasks.image_text_model import read_notes
from coeffdiff.tasks.image_text_results import as_markdown, gathered

EVIDENCE = Path(__file__).parents[2] / "scripts" / "evidence"


def asked(name: str) -> list[tuple[str, world.Question]]:
    return [told for i in range(len(SCENES)) for told in world.SETS[name](SCENES, i, random.Random(i))]


SCENES = [sample_scene(i) for i in range(400)]


def test_the_tasks_are_new_questions_in_known_words():
    """No question of a task is asked in pre-training, and every word of theirs is a word there."""
    before, new = asked("pretraining"), asked("tasks")
    assert not {question for _, (_, question, _) in before} & {question for _, (_, question, _) in new}
    spoken = [{word for _, (_, q, a) in part for word in f"{q} {a}".split()} for part in (before, new)]
    assert spoken[1] <= spoken[0] == set(world.words())


@pytest.mark.parametrize("name", sorted(world.SETS))
def test_answers_are_true(name):
    """Worked out again from the scenes by other means; yes and no are about equally frequent."""
    answers = {"yes": 0, "no": 0}
    for task, (pictures, question, answer) in asked(name):
        first, *others = (SCENES[i] for i in pictures)
        if answer in answers and task != "patterned":  # five patterns of six are one
            answers[answer] += 1
        if task in ("same", "nlvr"):
            field = question.split()[-1].replace("place", "setting")
            assert answer == ("yes" if getattr(first, field) == getattr(others[0], field) else "no")
        elif task == "gqa":
            parts = (first.pattern, first.colour, first.kind, first.setting)
            assert sum(f" {part}" in question for part in parts) >= 3
            assert (answer == "yes") == question.endswith(" ".join(parts))
        elif task == "which":
            shown = (first, others[0])[answer == "second"]
            assert question.endswith((f"kind {shown.kind}", f"colour {shown.colour}"))
    assert 0.8 < answers["yes"] / answers["no"] < 1.25


def test_a_model_is_made_from_nothing(tmp_path, forked):
    """Both scripts as the user runs them, for two steps; the folder knows its tower, the record what was done."""
    arguments = ("work", "--questions", "pretraining", "--count", "6", "--heldout", "2")
    done = forked("evidence/image_text_world.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    known = read_questions(tmp_path / "work", needed=("train", "test"))
    assert len(known.pictures) == 8 and {len(known.splits[name]) >= 16 for name in ("train", "test")} == {
        True
    }
    done = forked(
        "evidence/pretrain_image_text.py", "work", "model", "--steps", "2", "--batch-size", "4", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert read_notes(str(tmp_path / "model")).tower == "pocket-clip"
    record = json.loads((tmp_path / "model" / "pretraining.json").read_text())
    assert json.loads(done.stdout) == record and record["questions"] == len(known.splits["train"])
    done = forked("evidence/pretrain_image_text.py", "absent", "model", cwd=tmp_path)
    assert (
        done.returncode == 2
        and done.stderr == "There is no folder absent; name one with questions.jsonl in it.\n"
    )


def test_the_table_is_what_the_cells_say():
    """As it stands in the evidence's README."""
    cells = CellFolder(EVIDENCE / "image_text" / "cells").all().values()
    assert as_markdown(gathered(cells)) in (EVIDENCE / "README.md").read_text(encoding="utf-8")
