"""What an evaluation records beside the scores: device, versions, protocol, and each run's own facts."""

from __future__ import annotations

import datetime
import platform
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from coeffdiff import __version__
from coeffdiff.evaluation.protocol import Protocol
from coeffdiff.evaluation.runs import Candidate
from coeffdiff.metrics.encoders import Encoders


def run_facts(
    candidate: Candidate, scale: float, encoders: Encoders, base_model: str, seconds: float
) -> dict[str, Any]:
    header, subject = candidate.header, candidate.subject
    return {
        "run": candidate.label + ("" if candidate.scale is None else f":{candidate.scale:g}"),
        "subject": subject.name,
        "token": subject.token,
        "class_word": subject.class_word,
        "kind": header.described,
        "base_model": base_model,
        "trained_steps": header.trained_steps,
        "scale": scale,
        "encoders": encoders.names(),
        "prompts": candidate.protocol.prompts.name,
        "seconds": round(seconds, 1),
    }


def evaluation_facts(
    device: torch.device, dtype: torch.dtype, processes: int, protocol: Protocol
) -> dict[str, Any]:
    """What holds for all runs of an evaluation."""
    from_console = "coeffdiff" in Path(sys.argv[0]).parts[-2:]
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["coeffdiff", *sys.argv[1:]]) if from_console else "",
        "device": device_name(device),
        "precision": str(dtype).removeprefix("torch."),
        "processes": processes,
        "versions": {"coeffdiff": __version__, "torch": str(torch.__version__)},
        "protocol": {
            "pictures_a_prompt": protocol.pictures,
            "drift_pictures_a_prompt": protocol.drift_pictures,
            "first_seed": protocol.first_seed,
            **vars(protocol.options),
        },
    }


def device_name(device: torch.device) -> str:
    """The device's name in reports: a GPU's model, or a CPU's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    model = _processor() if device.type == "cpu" else ""
    return f"{device.type.upper()}{model and f' ({model})'}, {threads} thread{'s' * (threads > 1)}"


def _processor() -> str:
    """The CPU's model: from the kernel's list on Linux, where Python does not know it."""
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor()
