"""The scores of a run, in its folder: made once for an adapter and a way of scoring."""

from __future__ import annotations

import json
import shutil
from typing import Any

from coeffdiff.batch.plan import Scoring
from coeffdiff.config.nested import as_tree
from coeffdiff.evaluation.evaluate import evaluate
from coeffdiff.method.adapter_file import read_header
from coeffdiff.sampling.options import Options
from coeffdiff.training.run_folder import RunFolder
from coeffdiff.utils.atomic import atomic_write


def scores_of_run(run: RunFolder, scoring: Scoring, **how: Any) -> dict[str, float]:
    """The scores of a finished run; RUN/evaluation holds them with their pictures and page.

    how: load and judges of evaluate().
    """
    folder = run.path / "evaluation"
    asked = {"steps": read_header(run.adapter).trained_steps, "scoring": as_tree(scoring)}
    file = folder / "asked.json"  # comes last
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8")) != asked:
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted try, or of another adapter
        evaluate(
            [(str(run.path), None)],
            folder,
            options=Options(
                steps=scoring.denoising_steps, guidance=scoring.guidance, batch_size=scoring.batch_size
            ),
            prompts=scoring.prompts,
            limit=scoring.limit,
            pictures=scoring.pictures,
            drift_pictures=scoring.drift_pictures,
            dino=scoring.dino,
            clip=scoring.clip,
            **how,
        )
        with atomic_write(file) as unfinished:
            unfinished.write_text(json.dumps(asked) + "\n", encoding="utf-8")
    results = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    scores: dict[str, float] = results["runs"][0]["scores"]
    return scores
