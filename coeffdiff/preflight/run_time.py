"""How long a training run will take here: its operations at measured speeds."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import UNet2DConditionModel

from coeffdiff.pocket.sizes import unet_config
from coeffdiff.preflight.costs import LOADING_BYTES_A_SECOND, LOADING_SECONDS
from coeffdiff.preflight.dry_run import Learned, make_learnable, real_step, train_step
from coeffdiff.preflight.ledger import TOKENS
from coeffdiff.preflight.run_ledgers import RunLedgers
from coeffdiff.preflight.stopwatch import Stopwatch
from coeffdiff.preflight.workload import Workload
from coeffdiff.utils.console import quiet_libraries


def run_seconds(
    work: Workload,
    ledgers: RunLedgers,
    device: torch.device,
    budget_seconds: float,
    *,
    may_try_step: bool,
) -> tuple[dict[str, float], float]:
    """Seconds of each phase, and of one optimizer step.

    budget_seconds: for measuring. may_try_step: a step is small enough to be run once or twice, if there is time.
    """
    watch = Stopwatch(device, budget_seconds)
    watch.seconds_per_call = overhead_per_call(device, work.learned)
    # Operators were timed one after the other, each with its weights in a cache. In a step they come from memory:
    # forward, backward, and as often again as something is computed again
    cold = min(ledgers.weights["unet"], ledgers.unet_bytes) * watch.seconds_to_fetch()
    micro = watch.seconds(ledgers.step) + (2 + work.checkpointing) * cold
    if may_try_step and 5 * micro < budget_seconds:
        run, _ = real_step(
            ledgers.unet_config, work.learned, device=device, dtype=work.dtype, **work.step_arguments
        )
        micro = watch.best(run, 3 * micro)
    micro += watch.seconds(ledgers.teaching) + cold if ledgers.teaching else 0.0
    # AdamW and clipping pass over all that is learned some twenty times; their calls are in the overhead
    a_step = work.accumulate * micro + 20 * 4 * ledgers.trained / watch.bytes_per_second
    text_flops = 2 * TOKENS * ledgers.text_numbers
    if ledgers.texts:
        a_step += work.accumulate * (
            watch.seconds(ledgers.texts) + 2 * ledgers.text_bytes * watch.seconds_to_fetch()
        )
    elif work.learns_token:  # forward, and back through what is frozen
        a_step += work.accumulate * 2 * work.rows * text_flops / watch.flops_per_second

    # A photo's work grows with its pixels; the ledger is of the largest
    areas = [width * height for width, height in work.sizes]
    largest = work.augmentations * sum(areas) / max(areas)
    seconds = {
        "loading": LOADING_SECONDS + sum(ledgers.weights.values()) / LOADING_BYTES_A_SECOND,
        "encoding": largest * watch.seconds(ledgers.encoding)
        + work.texts * text_flops / watch.flops_per_second,
        "training": work.steps * a_step,
    }
    if ledgers.drawing and ledgers.decoding:
        one = work.picture_steps * watch.seconds(ledgers.drawing) + watch.seconds(ledgers.decoding)
        seconds["pictures"] = work.pictures * one
    return seconds, a_step


def overhead_per_call(device: torch.device, learned: Learned) -> float:
    """What Python, autograd and the optimizer add to an operator: a step of a tiny UNet, less its operators.

    It has the same modules, adapters and operators as a large one, of each few, and so little in them that only
    calls take time.
    """
    learned = replace(learned, rank=learned.rank and 4, blocks=None)
    config = unet_config("tiny") | {"layers_per_block": 1, "transformer_layers_per_block": 1}
    with quiet_libraries(), torch.device("meta"):
        shapes = UNet2DConditionModel(**config)
    side, through_text = shapes.config.sample_size, learned.rank is None and learned.targets is None
    run, parameters = real_step(
        shapes.config, learned, batch=1, rows=side, columns=side, device=device, through_text=through_text
    )
    optimizer = torch.optim.AdamW(parameters, lr=0.0)

    def step() -> None:
        run()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    counted = train_step(
        shapes,
        make_learnable(shapes, learned),
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
