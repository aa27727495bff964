"""classify(): arms side by side in few-shot classification, on the same shots of the same seeds.

Each arm tries equally many rates on the validation split, with seeds of their own; the best are trained with every seed
and scored on the test split, which nothing else sees. Each training is a cell in a folder and is not repeated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coeffdiff.evaluation.cells import CellFolder
from coeffdiff.evaluation.facts import device_name
from coeffdiff.sampling.device import choose_device
from coeffdiff.tasks.arms import lora_layers
from coeffdiff.tasks.classify_plan import Plan, check_plan
from coeffdiff.tasks.classify_report import summarize
from coeffdiff.tasks.classify_work import Work
from coeffdiff.tasks.encoder import load_encoder
from coeffdiff.tasks.examples import Examples, class_folders, read_examples
from coeffdiff.tasks.splits import split_examples
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.console import print_info, progress
from coeffdiff.utils.output_folder import refuse_unwritable


def classify(plan: Plan, output: Path, pack_as: str | None = None, *, keep: bool = False) -> dict[str, Any]:
    """Train what is missing and write classification.json; returns what that holds (see classify_report.summarize).

    Args:
        output: folder of the cells and results; trainings that are in it are not repeated.
        pack_as: the cells are packed into cells/`pack_as`.jsonl at the end.
        keep: every trained classifier that is tested goes into a folder below trained/ (see saving.py); one whose
            cell is there already is then trained again.
    Raises: CoeffDiffError with one sentence; trainings that are finished stay.
    """
    check_plan(plan)
    refuse_unwritable(output)
    examples = _read(plan)
    split = split_examples(examples, max(plan.shots), plan.test, plan.validation if plan.tries > 1 else 0)
    device, _ = choose_device("fp32")
    work = Work(
        plan,
        examples,
        split,
        load_encoder(plan.model, examples.items[0], device),
        CellFolder(output / "cells"),
        output / "trained" if keep else None,
    )
    if any("lora" in arm for arm in plan.arms):
        lora_layers(work.encoder.network, plan.recipe.lora_targets)  # now, not after an hour of other arms
    _say(work)
    with progress("trainings", work.trainings) as bar:
        for done, label in enumerate(work.all(), 1):
            bar(done, label)
    results = summarize(work.facts(), work.finished, plan.arms)
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(output / "classification.json") as unfinished:
        unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if pack_as:
        work.cells.pack(pack_as, work.keys)
    return results


def _read(plan: Plan) -> Examples:
    """The examples, with a bar where there are class folders to read."""
    if not plan.data.is_dir():
        return read_examples(plan.data, plan.text_column, plan.label_column)
    with progress("reading", len(class_folders(plan.data))) as bar:
        return read_examples(plan.data, on_class=bar)


def _say(work: Work) -> None:
    examples, split = work.examples, work.split
    for note in examples.notes[:10]:
        print_info(f"note     {note}")
    if len(examples.notes) > 10:
        print_info(f"note     {len(examples.notes) - 10} more were left out.")
    pool = [len(part) for part in split.pool]
    print_info(
        f"data     {len(examples.items)} {examples.kind} of {len(examples.classes)} classes: {len(split.test)} to test "
        f"on, {len(split.validation)} to tune rates on, {min(pool)} or more of each class to draw shots from",
        f"model    {work.encoder.name}, {type(work.encoder.network).__name__} on {device_name(work.device)}, "
        f"{'the first token' if work.encoder.pooling == 'first' else 'the mean over tokens'} as features",
    )
