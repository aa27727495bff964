"""The scores of a run, in its folder: made once for an adapter, a protocol and the encoders that judge."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coeffdiff.batch.plan import Scoring
from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.evaluate import evaluate
from coeffdiff.evaluation.protocol import Protocol
from coeffdiff.evaluation.runs import find_candidates
from coeffdiff.method.adapter_file import read_header
from coeffdiff.metrics.encoders import Encoders, encoders_for
from coeffdiff.models.fingerprints import network_fingerprint
from coeffdiff.models.loading import Loader
from coeffdiff.sampling.device import choose_device
from coeffdiff.sampling.options import Options
from coeffdiff.training.run_folder import RunFolder, lock_run
from coeffdiff.utils.atomic import atomic_write

_ASKED, _NUMBERS = "asked.json", "evaluation.json"
_MADE = {_ASKED, _NUMBERS, "evaluation.csv", "report.html", "pictures"}


@dataclasses.dataclass(frozen=True)
class Judges:
    """Encoders, with fingerprints of their weights by kind."""

    encoders: Encoders
    fingerprints: dict[str, str]


def load_judges(model_name: str, dino: str | None, clip: str | None) -> Judges:
    """See encoders_for."""
    encoders = encoders_for(model_name, dino, clip, choose_device()[0])
    there = {"dino": encoders.dino, "clip": encoders.clip}
    prints = {kind: network_fingerprint(one.network) for kind, one in there.items() if one}
    return Judges(encoders, prints)


def scores_of_run(
    run: RunFolder, scoring: Scoring, load: Loader, judges: Callable[..., Judges] = load_judges
) -> dict[str, float]:
    """The scores of a finished run; RUN/evaluation holds them with their pictures and page.

    load: of evaluate().
    Raises: ConfigError if there is such a folder that no batch has made; ResumeError if another process trains in the
        run; CoeffDiffError as evaluate() does.
    """
    folder, header = run.path / "evaluation", read_header(run.adapter)
    judged = judges(header.base_model, scoring.dino, scoring.clip)
    asked = {
        "steps": header.trained_steps,
        "protocol": dataclasses.asdict(_protocol(run, scoring)),
        "judges": judged.fingerprints,
    }
    scores = _stored(folder, asked)
    if scores is None:
        _refuse_foreign(folder)
        # A training meanwhile would sweep the folder away, and change the adapter
        with lock_run(run), atomic_write(folder) as making:
            _evaluate(run, scoring, making, load, judged.encoders)
            (making / _ASKED).write_text(json.dumps(asked) + "\n", encoding="utf-8")
        scores = _stored(folder, asked)
    assert scores is not None
    return scores


def _protocol(run: RunFolder, scoring: Scoring) -> Protocol:
    """With the prompts themselves, since a file of them may change."""
    [candidate] = find_candidates(
        [(str(run.path), None)],
        images=None,
        prompts=scoring.prompts,
        limit=scoring.limit,
        protocol=lambda chosen: Protocol(
            chosen, scoring.pictures, scoring.drift_pictures, options=_options(scoring)
        ),
    )
    return candidate.protocol


def _options(scoring: Scoring) -> Options:
    return Options(steps=scoring.denoising_steps, guidance=scoring.guidance, batch_size=scoring.batch_size)


def _evaluate(run: RunFolder, scoring: Scoring, output: Path, load: Loader, encoders: Encoders) -> None:
    evaluate(
        [(str(run.path), None)],
        output,
        options=_options(scoring),
        prompts=scoring.prompts,
        limit=scoring.limit,
        pictures=scoring.pictures,
        drift_pictures=scoring.drift_pictures,
        load=load,
        judges=lambda *_: encoders,
    )


def _stored(folder: Path, asked: dict[str, Any]) -> dict[str, float] | None:
    """The scores that are there; None if they were asked for otherwise, or cannot be read."""
    try:
        before = json.loads((folder / _ASKED).read_text(encoding="utf-8"))
        results = json.loads((folder / _NUMBERS).read_text(encoding="utf-8"))
        scores: dict[str, float] = results["runs"][0]["scores"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return scores if before == json.loads(json.dumps(asked)) else None


def _refuse_foreign(folder: Path) -> None:
    """Raises: ConfigError for a folder that would be replaced, and holds what no batch has made."""
    if not folder.exists():
        return
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else {folder.name}
    others = there if _ASKED not in there else there - _MADE
    if others:
        raise ConfigError(
            f"{folder} holds what this batch has not made ({', '.join(sorted(others)[:3])}), so the new scores "
            "cannot go there; move it away, then the same command scores this subject."
        )
