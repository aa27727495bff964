"""Predict what a training run takes: memory, time and disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coeffdiff.config.schema import Settings
from coeffdiff.data.photos import Photo
from coeffdiff.models.architecture import missing_networks
from coeffdiff.preflight.costs import GPU_WORKSPACE, HEAP_FACTOR, HEAP_SCRATCH, LIBRARIES_BYTES
from coeffdiff.preflight.ledger import Ledger
from coeffdiff.preflight.run_ledgers import RunLedgers, run_ledgers
from coeffdiff.preflight.run_time import run_seconds
from coeffdiff.preflight.workload import Workload, workload_of

TRIED_BYTES = 2**30  # what a step may hold to be run once or twice where it is only to be predicted


@dataclass(frozen=True)
class Prediction:
    """What a run will take. Bytes, seconds; sums over all steps and pictures.

    phases: the most memory of the device in each: encoding, training, pictures; on a CPU also loading, where quantized
    weights are read. On a CPU that is this process's resident memory, on a GPU what tensors hold there.
    ram_bytes: the most memory of the machine; on a CPU the same as the peak.
    seconds: of loading, encoding, training, pictures; empty where time was not asked for.
    disk: cache, checkpoints, adapter, pictures, download.
    """

    device: str
    trained: int
    phases: dict[str, int]
    ram_bytes: int
    seconds: dict[str, float]
    seconds_a_step: float
    disk: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase])


def predict(
    settings: Settings,
    base: Any,
    photos: Sequence[Photo],
    device: torch.device,
    *,
    process_bytes: int,
    budget_seconds: float = 0.0,
) -> Prediction:
    """What training with these settings will take.

    Args:
        settings: without "auto". base: from find_backbone.
        process_bytes: what this process holds now, libraries included; only a CPU's peak contains it.
        budget_seconds: for measuring how fast operations are here; 0: no time is predicted.
    """
    work = workload_of(settings, base, photos)
    ledgers = run_ledgers(work, base, device)
    phases, ram = _memory(ledgers, process_bytes, on_gpu=device.type == "cuda")
    seconds: dict[str, float] = {}
    seconds_a_step = 0.0
    if budget_seconds:
        own = phases["training"] - (process_bytes if device.type != "cuda" else 0)
        may_try_step = own < TRIED_BYTES
        seconds, seconds_a_step = run_seconds(
            work, ledgers, device, budget_seconds, may_try_step=may_try_step
        )
    disk = _disk(work, ledgers, missing_networks(base, work.dtype))
    return Prediction(device.type, ledgers.trained, phases, ram, seconds, seconds_a_step, disk)


def _memory(ledgers: RunLedgers, process_bytes: int, *, on_gpu: bool) -> tuple[dict[str, int], int]:
    """Prediction.phases and ram_bytes."""
    text, vae = ledgers.text_bytes, ledgers.weights["vae"]
    text_as_read = sum(ledgers.weights.values()) - vae - ledgers.weights["unet"]

    def most(resident: int, ledger: Ledger | None = None, own: int = 0) -> int:
        """Resident weights and, on top of those that a ledger counted itself (own), what passed through them."""
        passing = ledger.peak_bytes - own if ledger else 0
        if on_gpu:
            return resident + passing + (GPU_WORKSPACE if passing else 0)
        scratch = ledger.scratch_bytes if ledger else 0
        heap = round(HEAP_FACTOR * passing + HEAP_SCRATCH * scratch)
        return process_bytes + LIBRARIES_BYTES + resident + heap

    in_step = ledgers.unet_bytes + ledgers.beside_unet
    phases = {
        "encoding": max(most(text if on_gpu else text + vae), most(vae, ledgers.encoding, vae)),
        "training": most(in_step, ledgers.step, in_step),
    }
    if ledgers.drawing and ledgers.decoding:
        phases["training"] += 0 if on_gpu else vae  # it waits for the pictures
        resident = ledgers.unet_bytes + ledgers.states + ledgers.text_kept + vae
        phases["pictures"] = max(
            most(resident, ledgers.drawing, ledgers.unet_bytes), most(resident, ledgers.decoding, vae)
        )
    if on_gpu:  # every network is read into the machine's memory before it moves
        return phases, process_bytes + ledgers.reading_bytes
    if ledgers.text_bytes < text_as_read:  # quantized: what a file holds may be more than what stays of it
        phases["loading"] = most(ledgers.reading_bytes)
    return phases, max(phases.values())


def _disk(work: Workload, ledgers: RunLedgers, missing: Sequence[str]) -> dict[str, int]:
    """Prediction.disk. missing: names of networks that have to be downloaded."""
    weights, views = 4 * ledgers.trained, len(work.sizes) * work.augmentations
    kept = work.checkpoints + 1  # one more while it is written
    picture = 2 * 3 * work.resolution**2  # alone, and in the grid
    return {
        "cache": views * (8 * 4 * work.latent_rows * work.latent_columns + 500),
        # What is learned twice: to go on from, and as an adapter
        "checkpoints": kept * (2 * weights + ledgers.states),
        "adapter": (1 + work.adapters) * (weights + 2**16),
        "pictures": work.pictures * picture,
        "download": sum(ledgers.weights[name] for name in missing),
    }
