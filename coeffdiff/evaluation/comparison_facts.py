"""What a cell of a comparison holds beside its scores: costs of an adapter, places seen, what failed."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from coeffdiff.evaluation.inspection import inspect_adapter
from coeffdiff.evaluation.protocol import Protocol, Scored
from coeffdiff.method.families import text_encoders_of
from coeffdiff.pocket import POCKET, WEIGHTS
from coeffdiff.pocket.judges import QUESTIONS, trusted_judges
from coeffdiff.training.step_log import read_log


def adapter_costs(adapter: Path, pipe: Any) -> dict[str, Any]:
    """What an adapter in its run's folder takes to keep and took to make. pipe: the base model."""
    inspected, lines = inspect_adapter(adapter), list(read_log(adapter.parent / "log.jsonl"))
    widths = [encoder.config.hidden_size for encoder in text_encoders_of(pipe)]
    vectors = inspected.header.vectors * sum(widths)
    cost = {
        "parameters": inspected.alpha_parameters + inspected.lora_parameters + vectors,
        "adapter_bytes": sum(n for name, n in inspected.files.items() if name.endswith(".safetensors")),
        "seconds_a_step": round(statistics.median(line["seconds"] for line in lines), 4),
        "peak_gib": max(line["peak_gib"] for line in lines),
    }
    if inspected.deviations:
        entries = torch.cat([deviation.flatten().abs() for deviation in inspected.deviations.values()])
        cost["mean_abs_alpha"] = round(float(entries.mean()), 5)
    return {"cost": cost}


def place_scores(base_model: str, protocol: Protocol, pictures: Path) -> dict[str, float]:
    """On pocket: in how many of the pictures in a folder its judges see the place that the prompt names."""
    if base_model != POCKET or protocol.prompts.name != "pocket":
        return {}
    asked = [
        next(place for place in QUESTIONS["setting"] if template.endswith(place))
        for template in protocol.prompts.subject
        for _ in range(protocol.pictures)
    ]
    seen = trusted_judges(WEIGHTS).see("setting", [Image.open(f) for f in sorted(pictures.glob("*.png"))])
    return {"place": statistics.fmean(a == b for a, b in zip(seen, asked, strict=True))}


def scored_facts(scored: Scored) -> dict[str, Any]:
    """The details of scores that fit into a small file."""
    return {"photos": scored.data["photos"], "pictures": scored.data["pictures"]}


def failed_facts(error: Exception) -> dict[str, Any]:
    return {"failed": str(error), "scores": {}}
