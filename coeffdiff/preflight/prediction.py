"""What a training run will take: memory, time and disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coeffdiff.config.schema import Settings
from coeffdiff.data.photos import Photo
from coeffdiff.data.templates import captions_for
from coeffdiff.models.architecture import missing_networks, network_on_meta, vae_factor
from coeffdiff.preflight.costs import (
    GPU_WORKSPACE,
    HEAP_FACTOR,
    HEAP_SCRATCH,
    LIBRARIES_BYTES,
    TRIED_BYTES,
    adapters_kept,
    buckets,
    checkpoints_kept,
    count_numbers,
    learned,
    optimizer_bytes,
    overhead_per_call,
    pictures_of,
    text_activations,
)
from coeffdiff.preflight.dry_run import (
    bytes_of,
    decode_picture,
    denoise_step,
    encode_photo,
    make_learnable,
    real_step,
    train_step,
)
from coeffdiff.preflight.ledger import TOKENS, Ledger
from coeffdiff.preflight.stopwatch import Stopwatch
from coeffdiff.utils.torch_setup import DTYPES

_NETWORKS = ("text_encoder", "text_encoder_2", "vae", "unet")


_TOKEN_BUT_NO_NAME = "token"  # captions differ in number, not in cost, by what the token is


@dataclass(frozen=True)
class Prediction:
    """What a run will take. Bytes, seconds; sums over all steps and pictures.

    phases: the most memory of the device in each: encoding, training, pictures. On a CPU that is this process's
    resident memory, on a GPU what tensors hold there.
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
    run = _Run(settings, base, photos, device)
    phases, ram = run.memory(process_bytes)
    seconds: dict[str, float] = {}
    seconds_a_step = 0.0
    if budget_seconds:
        own = phases["training"] - (process_bytes if run.kind == "cpu" else 0)
        seconds, seconds_a_step = run.time(budget_seconds, may_be_tried=own < TRIED_BYTES)
    return Prediction(device.type, run.trained, phases, ram, seconds, seconds_a_step, run.disk())


class _Run:
    """A run as it will be: its networks without numbers, and ledgers of what passes through them."""

    def __init__(self, settings: Settings, base: Any, photos: Sequence[Photo], device: torch.device) -> None:
        training, dtype = settings.training, DTYPES[settings.training.precision]
        self.settings, self.base, self.photos, self.device, self.dtype = settings, base, photos, device, dtype
        self.kind = "cuda" if device.type == "cuda" else "cpu"
        self.narrow = None if training.precision == "no" else dtype
        networks = {name: network_on_meta(base, name, dtype) for name in _NETWORKS}
        self.encoders, self.unet = [networks[name] for name in _NETWORKS[:2]], networks["unet"]
        self.weights = {name: bytes_of(network) for name, network in networks.items()}
        self.text = self.weights["text_encoder"] + self.weights["text_encoder_2"]

        factor, self.sizes = vae_factor(base), buckets(settings, base, photos)
        self.width, self.height = max(self.sizes, key=lambda size: size[0] * size[1])
        self.rows, self.columns = self.height // factor, self.width // factor
        side, batch = int(training.resolution) // factor, int(training.batch_size)
        self.seen = 2 * batch if settings.prior.weight else batch  # each with a row of its class

        parameters = make_learnable(self.unet, learned(settings))
        self.held = bytes_of(self.unet)  # with what is learned
        self.trained = sum(parameter.numel() for parameter in parameters)
        self.states = optimizer_bytes(settings, parameters)
        self.in_step = self.states  # what a step finds besides the UNet
        if settings.learns_token:
            rows_learned = settings.method.token.vectors * sum(e.config.hidden_size for e in self.encoders)
            self.trained += rows_learned
            self.states += 8 * rows_learned
            self.in_step += 8 * rows_learned + sum(
                bytes_of(e) + text_activations(e, self.seen, self.narrow) for e in self.encoders
            )

        def denoised(batch: int, rows: int, columns: int) -> Ledger:
            return denoise_step(self.unet, batch=batch, rows=rows, columns=columns, device=self.kind)

        self.step = train_step(
            self.unet, parameters, device=self.kind, held=self.in_step, **self.step_settings
        )
        taught = bool(settings.prior.weight) and settings.prior.images is None
        self.teaching = denoised(batch, self.rows, self.columns) if taught else None
        self.encoding = encode_photo(networks["vae"], rows=self.rows, columns=self.columns, device=self.kind)
        self.drawing = self.decoding = None
        if settings.validation.prompts:
            self.drawing = denoised(2 if settings.validation.guidance > 1 else 1, side, side)
            self.decoding = decode_picture(networks["vae"], rows=side, columns=side, device=self.kind)

    @property
    def step_settings(self) -> dict[str, Any]:
        """Of a training step, for train_step and real_step."""
        return {
            "batch": self.seen,
            "rows": self.rows,
            "columns": self.columns,
            "narrow": self.narrow,
            "checkpointing": bool(self.settings.training.gradient_checkpointing),
            "through_text": self.settings.learns_token,
        }

    def memory(self, process_bytes: int) -> tuple[dict[str, int], int]:
        """Prediction.phases and ram_bytes."""
        on_gpu, vae = self.kind == "cuda", self.weights["vae"]

        def most(resident: int, ledger: Ledger | None = None, own: int = 0) -> int:
            """Resident weights and, on top of those that a ledger counted itself (own), what passed through them."""
            passing = ledger.peak_bytes - own if ledger else 0
            if on_gpu:
                return resident + passing + (GPU_WORKSPACE if passing else 0)
            scratch = ledger.scratch_bytes if ledger else 0
            heap = round(HEAP_FACTOR * passing + HEAP_SCRATCH * scratch)
            return process_bytes + LIBRARIES_BYTES + resident + heap

        phases = {
            "encoding": max(most(self.text if on_gpu else self.text + vae), most(vae, self.encoding, vae)),
            "training": most(self.held + self.in_step, self.step, self.held + self.in_step),
        }
        if self.drawing and self.decoding:
            phases["training"] += 0 if on_gpu else vae  # it waits for the pictures
            resident = self.held + self.states + vae
            phases["pictures"] = max(
                most(resident, self.drawing, self.held), most(resident, self.decoding, vae)
            )
        if on_gpu:  # every network is read into the machine's memory before it moves
            return phases, process_bytes + max(self.text + vae, self.weights["unet"] + vae)
        return phases, max(phases.values())

    def time(self, budget_seconds: float, *, may_be_tried: bool) -> tuple[dict[str, float], float]:
        """Prediction.seconds and seconds_a_step."""
        settings, training, validation = self.settings, self.settings.training, self.settings.validation
        watch = Stopwatch(self.device, budget_seconds)
        watch.seconds_per_call = overhead_per_call(self.device, learned(settings))
        # Operators were timed one after the other, each with its weights in a cache. In a step they come from memory:
        # forward, backward, and as often again as something is computed again
        cold = self.weights["unet"] * watch.seconds_to_fetch()
        micro = watch.seconds(self.step) + (2 + bool(training.gradient_checkpointing)) * cold
        if may_be_tried and 5 * micro < budget_seconds:
            run, _ = real_step(
                self.unet.config,
                learned(settings),
                device=self.device,
                dtype=self.dtype,
                **self.step_settings,
            )
            micro = watch.best(run, 3 * micro)
        micro += watch.seconds(self.teaching) + cold if self.teaching else 0.0
        # AdamW and clipping pass over all that is learned some twenty times; their calls are in the overhead
        a_step = int(training.accumulate) * micro + 20 * 4 * self.trained / watch.bytes_per_second
        text_flops = 2 * TOKENS * sum(count_numbers(encoder) for encoder in self.encoders)
        if settings.learns_token:  # forward, and back through what is frozen
            a_step += int(training.accumulate) * 2 * self.seen * text_flops / watch.flops_per_second

        captions = {
            text
            for photo in self.photos
            for text in captions_for(photo, settings.subject.templates, _TOKEN_BUT_NO_NAME, None)
        }
        texts = len(captions) + 2 * len(validation.prompts)
        views = [size for size in self.sizes for _ in range(int(settings.photos.augmentations))]
        # A photo's work grows with its pixels
        area = sum(w * h for w, h in views) / (self.width * self.height)
        seconds = {
            "loading": LOADING_SECONDS + sum(self.weights.values()) / LOADING_BYTES_A_SECOND,
            "encoding": area * watch.seconds(self.encoding) + texts * text_flops / watch.flops_per_second,
            "training": int(training.steps) * a_step,
        }
        if self.drawing and self.decoding:
            one = validation.steps * watch.seconds(self.drawing) + watch.seconds(self.decoding)
            seconds["pictures"] = pictures_of(settings) * one
        return seconds, a_step

    def disk(self) -> dict[str, int]:
        """Prediction.disk."""
        settings, weights = self.settings, 4 * self.trained
        views = len(self.sizes) * int(settings.photos.augmentations)
        kept = checkpoints_kept(settings) + 1  # one more while it is written
        picture = 2 * 3 * int(settings.training.resolution) ** 2  # alone, and in the grid
        missing = missing_networks(self.base, self.dtype)
        return {
            "cache": views * (8 * 4 * self.rows * self.columns + 500),
            # What is learned twice: to go on from, and as an adapter
            "checkpoints": kept * (2 * weights + self.states),
            "adapter": (1 + adapters_kept(settings)) * (weights + 2**16),
            "pictures": pictures_of(settings) * picture,
            "download": sum(self.weights[name] for name in missing),
        }


# Building four networks and reading their weights, which lie in the system's cache or on a fast disk.
LOADING_SECONDS, LOADING_BYTES_A_SECOND = 1.0, 1e9
