"""One training loop for all pocket networks: it resumes, averages the weights, and keeps the curve."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from coeffdiff.errors import TrainingError
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.console import progress
from coeffdiff.utils.torch_setup import has_bf16

Losses = Mapping[str, Tensor]
SAVE_SECONDS = 120.0
LINE_STEPS = 50


@dataclass(frozen=True)
class Plan:
    """How long and how fast.

    steps: optimizer steps in all.  rate: of AdamW, after `warmup` steps and before the last `cooldown` share of
    all steps, over which it falls to zero.  average: decay of the exponential average of the weights.
    """

    steps: int
    rate: float
    warmup: int = 200
    cooldown: float = 0.2
    weight_decay: float = 0.01
    average: float = 0.999
    clip: float = 1.0

    def rate_at(self, step: int, start: int = 0) -> float:
        """The rate of step `step`, counted from 0; it rises from `start`, where AdamW knows nothing yet."""
        rising = (step - start + 1) / max(1, self.warmup)
        falling = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return self.rate * max(0.0, min(1.0, rising, falling))


def faster_precision(device: str) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    if device.startswith("cuda"):
        return torch.bfloat16 if has_bf16() else torch.float32
    native = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if device == "cpu" and native else torch.float32


def mixed(device: str, dtype: torch.dtype) -> AbstractContextManager[None]:
    return torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype != torch.float32)


def fit(
    name: str,
    folder: Path,
    network: nn.Module,
    loss: Callable[[int], Losses],
    plan: Plan,
    *,
    device: str,
    start: int = 0,
    seconds: float = 0.0,
) -> tuple[nn.Module, float]:
    """Train `network` on `loss` and return the average of its weights, and the seconds that all its steps took.

    Args:
        name: of the checkpoint `folder/name.pt` and of the curve `folder/name.jsonl`; a checkpoint that is there is
            continued from, and a finished one is only read.
        loss: step -> named losses, whose sum is minimised; must depend on nothing but the step and the weights,
            and run itself under `mixed`.
        start, seconds: steps that the network and its average already have where there is no later checkpoint, and
            what they took.
    Raises: TrainingError when the loss is no longer a number; the last checkpoint stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network = network.to(device).train()
    average = AveragedModel(network, multi_avg_fn=_averaging(plan.average))
    # Norms and biases are not pulled towards zero.
    flat = [p for p in network.parameters() if p.requires_grad and p.ndim < 2]
    rest = [p for p in network.parameters() if p.requires_grad and p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "weight_decay": plan.weight_decay}, {"params": flat, "weight_decay": 0.0}],
        lr=plan.rate,
        betas=(0.9, 0.99),
        fused=True,
    )
    checkpoint, curve = folder / f"{name}.pt", folder / f"{name}.jsonl"
    step = start
    average.n_averaged.fill_(start)  # what was averaged before counts as such
    state = torch.load(checkpoint, map_location="cpu", weights_only=True) if checkpoint.exists() else None
    if state is not None and state["step"] >= start:
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, start, seconds = state["step"], state.get("start", 0), state["seconds"]
    del state
    _cut_curve(curve, step)

    def save() -> None:
        state = {
            "network": network.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "start": start,
            "seconds": seconds + time.monotonic() - begun,
        }
        with atomic_write(checkpoint, durable=True) as unfinished:
            torch.save(state, unfinished)

    begun = saved = time.monotonic()
    sums: dict[str, float] = {}
    counted, loaded = 0, step
    with progress(name, plan.steps) as bar:
        bar(step)
        while step < plan.steps:
            for group in optimizer.param_groups:
                group["lr"] = plan.rate_at(step, start)
            losses = loss(step)
            total = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), plan.clip)
            if not math.isfinite(float(norm.detach())):
                raise TrainingError(f"{name}: step {step + 1} gave a gradient that is no number.")
            optimizer.step()
            average.update_parameters(network)
            step += 1
            counted += 1
            for part, value in {**losses, "norm": norm}.items():
                sums[part] = sums.get(part, 0.0) + float(value.detach())
            if step % LINE_STEPS == 0 or step == plan.steps:
                line = {part: round(value / counted, 5) for part, value in sums.items()}
                took = round(seconds + time.monotonic() - begun, 1)
                with curve.open("a") as handle:
                    handle.write(json.dumps({"step": step, **line, "seconds": took}) + "\n")
                bar(step, "  ".join(f"{part} {value:.4f}" for part, value in line.items()))
                sums, counted = {}, 0
            if time.monotonic() - saved > SAVE_SECONDS and step % LINE_STEPS == 0:
                save()
                saved = time.monotonic()
        if not checkpoint.exists() or step > loaded:
            save()
    return average.module.eval(), seconds + time.monotonic() - begun


def _averaging(decay: float) -> Callable[..., None]:
    """An exponential average that forgets its beginnings: after n steps it spans the last tenth of them at most."""

    @torch.no_grad()
    def update(averages: list[Tensor], weights: list[Tensor], count: Tensor) -> None:
        keep = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averages, weights, 1.0 - keep)

    return update


def read_average(name: str, folder: Path, network: nn.Module) -> tuple[int, float]:
    """Put the averaged weights of a checkpoint into `network`, and return its steps and what they took in seconds.

    Raises: TrainingError if there is no checkpoint.
    """
    checkpoint = folder / f"{name}.pt"
    if not checkpoint.exists():
        raise TrainingError(f"There is no checkpoint {checkpoint}.")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    weights = {key.removeprefix("module."): value for key, value in state["average"].items()}
    del weights["n_averaged"]
    network.load_state_dict(weights)
    return state["step"], state["seconds"]


def _cut_curve(curve: Path, step: int) -> None:
    """Drop the lines of steps that will be run again."""
    if curve.exists():
        kept = [line for line in curve.read_text().splitlines() if _step_of(line) <= step]
        with atomic_write(curve) as unfinished:
            unfinished.write_text("".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    """The step of a line, infinite for one that was cut off in writing."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf
