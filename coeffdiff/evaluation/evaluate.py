"""evaluate(): adapters scored, with files of all of it; the page is report.py."""

from __future__ import annotations

import datetime
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from coeffdiff import __version__
from coeffdiff.config.fields import EVALUATION_FIRST_SEED
from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.prompts import Prompts
from coeffdiff.evaluation.protocol import ONE_PROCESS, OPTIONS, THUMBNAIL, Evaluation, Protocol, Seen
from coeffdiff.evaluation.report import RunPage
from coeffdiff.evaluation.runs import Candidate, find_candidates
from coeffdiff.evaluation.scoring import asked_for, jpeg_bytes, score_adapter
from coeffdiff.evaluation.tables import write_results
from coeffdiff.hosts.diffusers import check_architecture, load_adapter
from coeffdiff.metrics.encoders import Encoders, encoders_for
from coeffdiff.models import opening
from coeffdiff.models.architecture import unet_on_meta
from coeffdiff.models.loading import load_pipeline
from coeffdiff.models.source import Backbone
from coeffdiff.sampling.device import choose_device, prepare_device, refuse_offload
from coeffdiff.sampling.options import Offload, Options, Precision, check_options
from coeffdiff.sampling.prompts import length_warnings
from coeffdiff.utils.console import print_info, progress
from coeffdiff.utils.distributed import DistributedContext
from coeffdiff.utils.grids import fitted
from coeffdiff.utils.writable import refuse_unwritable


def evaluate(
    runs: Sequence[tuple[str, float | None]],
    output: Path,
    *,
    options: Options = OPTIONS,
    images: Path | None = None,
    prompts: str = "auto",
    limit: int | None = None,
    pictures: int = 4,
    drift_pictures: int = 2,
    first_seed: int = EVALUATION_FIRST_SEED,
    model: str | None = None,
    model_config: str | None = None,
    vae: str | None = None,
    precision: Precision = "auto",
    offload: Offload = "none",
    dino: str | None = None,
    clip: str | None = None,
    team: DistributedContext = ONE_PROCESS,
) -> Evaluation:
    """Score runs (folder, and scale or None for the adapter's own) one after the other, and write what came out.

    Raises: CoeffDiffError with one sentence, before anything is written for all that can be known then.
    """
    begun = time.monotonic()

    def protocol(chosen: Prompts) -> Protocol:
        return Protocol(chosen, pictures, drift_pictures, first_seed, options)

    # 1. What is asked for, checked before anything is slow or written
    candidates = find_candidates(runs, images=images, prompts=prompts, limit=limit, protocol=protocol)
    if not candidates:
        raise ConfigError("There is nothing to evaluate: name a run folder.")
    device, dtype = choose_device(precision, None if team is ONE_PROCESS else team.device)
    refuse_offload(device, offload)
    bases = _bases(candidates, opening.Asked(model, model_config, vae), dtype)
    for base, there in bases:
        shapes = unet_on_meta(base)
        outline = load_pipeline(base, dtype=dtype, parts=())
        check_options(outline, options)
        for line in opening.differences([one.trained for _, one in there], base, dtype):
            print_info(f"hint     {line}")
        for _, candidate in there:
            check_architecture(shapes, candidate.header, candidate.adapter)
            asked = asked_for(candidate.protocol, candidate.subject.token, candidate.subject.class_word)
            for prompt in dict.fromkeys(one.prompt for one in asked):
                for warning in length_warnings(prompt, outline):
                    print_info(f"hint     {warning}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is not empty; name another --output. Nothing was changed.")
    names = dict.fromkeys(base.name for base, _ in bases)
    team.from_main(lambda: refuse_unwritable(output))
    encoders = {name: encoders_for(name, dino, clip, device) for name in names}
    team.gather(None)  # here at the latest, what one of them lacks ends all

    # 2. Model by model, adapter by adapter
    pages: dict[int, RunPage] = {}
    for base, there in bases:
        judges = encoders[base.name]
        shared = f" in {team.size} processes" if team.size > 1 else ""
        print_info(f"model    {base.name} on {device.type}, {str(dtype).removeprefix('torch.')}{shared}")
        if base.vae:
            print_info(f"vae      {opening.where(base.vae[0])}")
        print_info(f"scores   by {' and '.join(judges.names().values())}")
        pipe = load_pipeline(base, dtype=dtype)
        before: dict[tuple[str, int], Seen] = {}
        for number, candidate in there:
            adapter = load_adapter(pipe, candidate.adapter, candidate.scale)
            prepare_device(pipe, device, offload)
            chosen = candidate.protocol
            print_info(
                f"run      {candidate.label} at scale {adapter.scale:g}: {len(chosen.prompts.subject)} prompts "
                f"({chosen.prompts.name}), pictures of each: {pictures}"
            )
            folder = output / "pictures" / f"{number:02d}-{Path(candidate.label).resolve().name}"
            took = time.monotonic()
            asked = asked_for(chosen, candidate.subject.token, candidate.subject.class_word)
            unseen = [one for one in asked if one.group != "subject" and (one.prompt, one.seed) not in before]
            with progress("evaluating", len(asked) + len(unseen)) as bar:
                scored = score_adapter(
                    pipe,
                    candidate.subject,
                    chosen,
                    judges,
                    base=before,
                    folder=folder,
                    details=opening.recipe(base),
                    team=team,
                    on_progress=bar,
                )
            facts = _facts(candidate, adapter.scale, judges, base.name, time.monotonic() - took)
            photos = [
                jpeg_bytes(fitted(p.open(), THUMBNAIL, smoothly=True)) for p in candidate.subject.photos
            ]
            pages[number] = RunPage(
                facts | scored.data, scored.thumbnails, candidate.run, candidate.adapter, photos
            )
            adapter.remove()
            if offload == "sequential":  # or the next adapter would find a UNet without weights
                pipe.remove_all_hooks()
    in_order = [pages[number] for number in sorted(pages)]

    # 3. Files
    results = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["coeffdiff", *sys.argv[1:]])
        if "coeffdiff" in Path(sys.argv[0]).parts[-2:]
        else "",
        "device": device_name(device),
        "precision": str(dtype).removeprefix("torch."),
        "processes": team.size,
        "versions": {"coeffdiff": __version__, "torch": str(torch.__version__)},
        "protocol": _protocol_facts(candidates[0].protocol),
        "seconds": round(time.monotonic() - begun, 1),
        "runs": [page.data for page in in_order],
    }
    evaluation = Evaluation(
        output, output / "evaluation.json", output / "evaluation.csv", output / "report.html", results
    )
    team.from_main(lambda: write_results(evaluation, in_order))
    return evaluation


def _bases(
    candidates: Sequence[Candidate], asked: opening.Asked, dtype: torch.dtype
) -> list[tuple[Backbone, list[tuple[int, Candidate]]]]:
    """Each base model, opened as its adapters' runs opened it, with those and their numbers from 1 on."""
    found: dict[str, tuple[Backbone, list[tuple[int, Candidate]]]] = {}
    for number, candidate in enumerate(candidates, 1):
        base = opening.open_base([candidate.trained], asked, dtype)
        _, there = found.setdefault(repr(base), (base, []))
        there.append((number, candidate))
    return list(found.values())


def _facts(
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


def _protocol_facts(protocol: Protocol) -> dict[str, Any]:
    plain = replace(protocol).options
    return {
        "pictures_a_prompt": protocol.pictures,
        "drift_pictures_a_prompt": protocol.drift_pictures,
        "first_seed": protocol.first_seed,
        **vars(plain),
    }


def device_name(device: torch.device) -> str:
    """As reports name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    model = _processor() if device.type == "cpu" else ""
    return f"{device.type.upper()}{model and f' ({model})'}, {threads} thread{'s' * (threads > 1)}"


def _processor() -> str:
    """The CPU's model; where Python does not know it, as on Linux, from the kernel's own list."""
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor()
