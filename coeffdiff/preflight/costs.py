"""Measured constants and counts that predictions are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from coeffdiff.config.schema import Settings
from coeffdiff.data.photos import Photo
from coeffdiff.data.views import view_of
from coeffdiff.models.architecture import bucket_step
from coeffdiff.pocket.sizes import unet_config
from coeffdiff.preflight.dry_run import Learned, make_learnable, real_step, train_step
from coeffdiff.preflight.ledger import TOKENS
from coeffdiff.preflight.stopwatch import Stopwatch
from coeffdiff.utils.console import quiet_libraries

# Measured on Linux with glibc, one thread, pocket at batch 1 to 16, 128 and 256 px (scripts/bench/check.py): how far
# the heap grows for each byte that tensors of a step hold at once, and for each byte of an operator's buffers, which
# come and go between tensors that stay. glibc gives little of that back before the end.
HEAP_FACTOR, HEAP_SCRATCH = 1.6, 2.2


LIBRARIES_BYTES = 50 * 2**20  # what they load and keep once they are used


TRIED_BYTES = 2**30  # what a step may hold to be run once or twice where it is only to be predicted


# Workspaces of cuBLAS and cuDNN. Not measured: no GPU was at hand.
GPU_WORKSPACE = 256 * 2**20


def learned(settings: Settings) -> Learned:
    """settings.method in dryrun's plain values."""
    method = settings.method
    return Learned(
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
    config, tokens = encoder.config, TOKENS
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
    step = bucket_step(base, resolution)
    where: dict[str, Any] = {"resolution": resolution, "step": step, "crop": settings.photos.crop}
    return [view_of(photo, **where, flip=False, seed=0, augmentation=0).size for photo in photos]


def pictures_of(settings: Settings) -> int:
    """How many validation pictures a run makes: every so many steps, and at the end."""
    validation, steps = settings.validation, int(settings.training.steps)
    times = 1 + ((steps - 1) // validation.every if validation.every else 0)
    return times * len(validation.prompts) * len(validation.seeds)


def checkpoints_kept(settings: Settings) -> int:
    training = settings.training
    made = -(-int(training.steps) // training.checkpoint_every) if training.checkpoint_every else 1
    return min(made, training.keep_checkpoints)


def adapters_kept(settings: Settings) -> int:
    every = settings.training.keep_adapters_every
    return int(settings.training.steps) // every if every else 0


def count_numbers(network: Any) -> int:
    return sum(weight.numel() for weight in network.parameters())


def overhead_per_call(device: torch.device, what: Learned) -> float:
    """What Python, autograd and the optimizer add to an operator: a step of a tiny UNet, less its operators.

    It has the same modules, adapters and operators as a large one, of each few, and so little in them that only
    calls take time.
    """
    what = replace(what, rank=what.rank and 4, blocks=None)
    config = unet_config("tiny") | {"layers_per_block": 1, "transformer_layers_per_block": 1}
    with quiet_libraries(), torch.device("meta"):
        shapes = UNet2DConditionModel(**config)
    side, through_text = shapes.config.sample_size, what.rank is None and what.targets is None
    run, parameters = real_step(
        shapes.config, what, batch=1, rows=side, columns=side, device=device, through_text=through_text
    )
    optimizer = torch.optim.AdamW(parameters, lr=0.0)

    def step() -> None:
        run()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    counted = train_step(
        shapes,
        make_learnable(shapes, what),
        batch=1,
        rows=side,
        columns=side,
        device="cpu",
        narrow=None,
        checkpointing=False,
        through_text=through_text,
    )
    watch = Stopwatch(device, 0.1)
    whole = watch.best(step, 0.1)
    return max(0.0, whole - watch.seconds(counted)) / counted.calls
