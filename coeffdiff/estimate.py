"""What training and sampling will take, before they begin: memory, time and disk; no opinion on what is too much.

Memory and work are counted by dryrun.py on the model's real architecture, time is what its operations take here. What
cannot be counted are a few measured constants, which stand below.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from coeffdiff import backbone, dryrun
from coeffdiff.config import Settings
from coeffdiff.console import quiet_libraries
from coeffdiff.data.photos import Photo, captions_for, view_of
from coeffdiff.method.injection import unwrapped
from coeffdiff.pocket.sizes import unet_config
from coeffdiff.sampling import Options, needs_upcast, picture_size


def expected_seconds(pipe: Any, options: Options, pictures: int, device: torch.device | str) -> float:
    """How long so many pictures will take where nothing else runs: the operations of UNet and VAE, as they take here
    (measured in 0.4 s of work, or as long as the longest of them).

    Left out: the text encoders, offloading, what alpha and LoRA add, and what Python adds to operators, which shows
    where a step takes milliseconds.
    """
    if not pictures:
        return 0.0
    width, height = picture_size(pipe, options)
    rows, columns = height // pipe.vae_scale_factor, width // pipe.vae_scale_factor
    device, batch = torch.device(device), min(options.batch_size, pictures)
    vae_dtype = torch.float32 if needs_upcast(pipe.vae) else pipe.vae.dtype
    unet, vae = _outline(unwrapped(pipe.unet), pipe.unet.dtype), _outline(pipe.vae, vae_dtype)
    on = {"rows": rows, "columns": columns, "device": "cuda" if device.type == "cuda" else "cpu"}
    drawing = dryrun.denoise_step(unet, batch=batch * (2 if options.guidance > 1 else 1), **on)
    decoding = dryrun.decode_picture(vae, **on)
    # Two, since the VAE may compute in another dtype
    watch, other = dryrun.Stopwatch(device, 0.3), dryrun.Stopwatch(device, 0.1)
    # Operators are timed with their weights in a cache
    cold = dryrun.bytes_of(unet) * watch.seconds_to_fetch()
    calls = math.ceil(pictures / batch) * _calls_of_the_unet(pipe.scheduler, options.steps)
    return calls * (watch.seconds(drawing) + cold) + pictures * other.seconds(decoding)


def _outline(network: Any, dtype: torch.dtype) -> Any:
    """A network of the same architecture without numbers."""
    with torch.device("meta"), quiet_libraries():
        return type(network).from_config(network.config).to(dtype)


def _calls_of_the_unet(scheduler: Any, steps: int) -> int:
    """Second-order schedulers call it twice a step."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


# --- a training run --------------------------------------------------------------------------------------------

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
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
        training, dtype = settings.training, _DTYPES[settings.training.precision]
        self.settings, self.base, self.photos, self.device, self.dtype = settings, base, photos, device, dtype
        self.kind = "cuda" if device.type == "cuda" else "cpu"
        self.narrow = None if training.precision == "no" else dtype
        networks = {name: backbone.network_on_meta(base, name, dtype) for name in _NETWORKS}
        self.encoders, self.unet = [networks[name] for name in _NETWORKS[:2]], networks["unet"]
        self.weights = {name: dryrun.bytes_of(network) for name, network in networks.items()}
        self.text = self.weights["text_encoder"] + self.weights["text_encoder_2"]

        factor, self.sizes = backbone.vae_factor(base), buckets(settings, base, photos)
        self.width, self.height = max(self.sizes, key=lambda size: size[0] * size[1])
        self.rows, self.columns = self.height // factor, self.width // factor
        side, batch = int(training.resolution) // factor, int(training.batch_size)
        self.seen = 2 * batch if settings.prior.weight else batch  # each with a row of its class

        parameters = dryrun.make_learnable(self.unet, learned(settings))
        self.held = dryrun.bytes_of(self.unet)  # with what is learned
        self.trained = sum(parameter.numel() for parameter in parameters)
        self.states = optimizer_bytes(settings, parameters)
        self.in_step = self.states  # what a step finds besides the UNet
        if settings.learns_token:
            rows_learned = settings.method.token.vectors * sum(e.config.hidden_size for e in self.encoders)
            self.trained += rows_learned
            self.states += 8 * rows_learned
            self.in_step += 8 * rows_learned + sum(
                dryrun.bytes_of(e) + text_activations(e, self.seen, self.narrow) for e in self.encoders
            )

        def denoised(batch: int, rows: int, columns: int) -> dryrun.Ledger:
            return dryrun.denoise_step(self.unet, batch=batch, rows=rows, columns=columns, device=self.kind)

        self.step = dryrun.train_step(
            self.unet, parameters, device=self.kind, held=self.in_step, **self.step_settings
        )
        taught = bool(settings.prior.weight) and settings.prior.images is None
        self.teaching = denoised(batch, self.rows, self.columns) if taught else None
        self.encoding = dryrun.encode_photo(
            networks["vae"], rows=self.rows, columns=self.columns, device=self.kind
        )
        self.drawing = self.decoding = None
        if settings.validation.prompts:
            self.drawing = denoised(2 if settings.validation.guidance > 1 else 1, side, side)
            self.decoding = dryrun.decode_picture(networks["vae"], rows=side, columns=side, device=self.kind)

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

        def most(resident: int, ledger: dryrun.Ledger | None = None, own: int = 0) -> int:
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
        watch = dryrun.Stopwatch(self.device, budget_seconds)
        watch.seconds_per_call = overhead_per_call(self.device, learned(settings))
        # Operators were timed one after the other, each with its weights in a cache. In a step they come from memory:
        # forward, backward, and as often again as something is computed again
        cold = self.weights["unet"] * watch.seconds_to_fetch()
        micro = watch.seconds(self.step) + (2 + bool(training.gradient_checkpointing)) * cold
        if may_be_tried and 5 * micro < budget_seconds:
            run, _ = dryrun.real_step(
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
        text_flops = 2 * dryrun.TOKENS * sum(_numbers(encoder) for encoder in self.encoders)
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
        kept = _checkpoints(settings) + 1  # one more while it is written
        picture = 2 * 3 * int(settings.training.resolution) ** 2  # alone, and in the grid
        missing = backbone.missing_networks(self.base, self.dtype)
        return {
            "cache": views * (8 * 4 * self.rows * self.columns + 500),
            # What is learned twice: to go on from, and as an adapter
            "checkpoints": kept * (2 * weights + self.states),
            "adapter": (1 + _kept_adapters(settings)) * (weights + 2**16),
            "pictures": pictures_of(settings) * picture,
            "download": sum(self.weights[name] for name in missing),
        }


# Measured on Linux with glibc, one thread, pocket at batch 1 to 16, 128 and 256 px (scripts/bench/check.py): how far
# the heap grows for each byte that tensors of a step hold at once, and for each byte of an operator's buffers, which
# come and go between tensors that stay. glibc gives little of that back before the end.
HEAP_FACTOR, HEAP_SCRATCH = 1.6, 2.2
LIBRARIES_BYTES = 50 * 2**20  # what they load and keep once they are used
TRIED_BYTES = 2**30  # what a step may hold to be run once or twice where it is only to be predicted
# Workspaces of cuBLAS and cuDNN. Not measured: no GPU was at hand.
GPU_WORKSPACE = 256 * 2**20
# Building four networks and reading their weights, which lie in the system's cache or on a fast disk.
LOADING_SECONDS, LOADING_BYTES_A_SECOND = 1.0, 1e9


def learned(settings: Settings) -> dryrun.Learned:
    """settings.method in dryrun's plain values."""
    method = settings.method
    return dryrun.Learned(
        rank=method.lora.rank if "lora" in method.kind else None,
        lora_targets=tuple(method.lora.targets),
        dora=method.lora.dora,
        targets=method.coeff.targets if "coeff" in method.kind else None,
        blocks=tuple(method.coeff.blocks) if method.coeff.blocks else None,
        backend=method.coeff.backend,
        mixes=method.coeff.mixes,
    )


def text_activations(encoder: Any, batch: int, narrow: torch.dtype | None) -> int:
    """Bytes that a text encoder keeps for its backward, by the count of Korthikanti et al. 2022 (arXiv 2205.05198,
    section 4.1): 34 s b h + 5 a s^2 b for each layer in half precision, twice that in float32."""
    config, tokens = encoder.config, dryrun.TOKENS
    layer = 34 * tokens * batch * config.hidden_size + 5 * config.num_attention_heads * tokens**2 * batch
    return config.num_hidden_layers * layer * (1 if narrow else 2)


def optimizer_bytes(settings: Settings, parameters: Sequence[Any]) -> int:
    """AdamW's two moments of every trained number: float32, or a byte each where adamw8bit narrows them.

    It leaves tensors of fewer than 4,096 numbers wide, and keeps a float32 for every 256 of others (bitsandbytes).
    """
    eight = settings.training.optimizer == "adamw8bit"
    return sum(
        2 * n + 2 * 4 * -(-n // 256) if eight and n >= 4096 else 2 * 4 * n
        for n in (parameter.numel() for parameter in parameters)
    )


def buckets(settings: Settings, base: Any, photos: Sequence[Photo]) -> list[tuple[int, int]]:
    """The (width, height) at which each photo is trained."""
    resolution = int(settings.training.resolution)
    step = backbone.bucket_step(base, resolution)
    where: dict[str, Any] = {"resolution": resolution, "step": step, "crop": settings.photos.crop}
    return [view_of(photo, **where, flip=False, seed=0, augmentation=0).size for photo in photos]


def pictures_of(settings: Settings) -> int:
    """How many validation pictures a run makes: every so many steps, and at the end."""
    validation, steps = settings.validation, int(settings.training.steps)
    times = 1 + ((steps - 1) // validation.every if validation.every else 0)
    return times * len(validation.prompts) * len(validation.seeds)


def _checkpoints(settings: Settings) -> int:
    training = settings.training
    made = -(-int(training.steps) // training.checkpoint_every) if training.checkpoint_every else 1
    return min(made, training.keep_checkpoints)


def _kept_adapters(settings: Settings) -> int:
    every = settings.training.keep_adapters_every
    return int(settings.training.steps) // every if every else 0


def _numbers(network: Any) -> int:
    return sum(weight.numel() for weight in network.parameters())


def overhead_per_call(device: torch.device, what: dryrun.Learned) -> float:
    """What Python, autograd and the optimizer add to an operator: a step of a tiny UNet, less its operators.

    It has the same modules, adapters and operators as a large one, of each few, and so little in them that only
    calls take time.
    """
    what = replace(what, rank=what.rank and 4, blocks=None)
    config = unet_config("tiny") | {"layers_per_block": 1, "transformer_layers_per_block": 1}
    with quiet_libraries(), torch.device("meta"):
        shapes = UNet2DConditionModel(**config)
    side, through_text = shapes.config.sample_size, what.rank is None and what.targets is None
    run, parameters = dryrun.real_step(
        shapes.config, what, batch=1, rows=side, columns=side, device=device, through_text=through_text
    )
    optimizer = torch.optim.AdamW(parameters, lr=0.0)

    def step() -> None:
        run()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    counted = dryrun.train_step(
        shapes,
        dryrun.make_learnable(shapes, what),
        batch=1,
        rows=side,
        columns=side,
        device="cpu",
        narrow=None,
        checkpointing=False,
        through_text=through_text,
    )
    watch = dryrun.Stopwatch(device, 0.1)
    whole = watch.best(step, 0.1)
    return max(0.0, whole - watch.seconds(counted)) / counted.calls
