"""One training of a few-shot classifier: an arm on a copy of the encoder, a linear head on its features.

The encoder is in eval mode throughout, so that its own dropout is off in every arm; alpha's dropout is on in training.
The head starts at zero. AdamW, cosine to zero. All that is drawn comes from the seed, whatever ran before.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coeffdiff.errors import NonFiniteLoss
from coeffdiff.method.coefficients import Coefficients
from coeffdiff.tasks.arms import put_arm, trained_numbers
from coeffdiff.tasks.encoder import Encoder, Inputs, Pooling, chosen, features
from coeffdiff.tasks.examples import Example
from coeffdiff.utils.seeding import generator_for, stable_seed

EVALUATED = 64  # examples at a time


@dataclass(frozen=True)
class Recipe:
    """How every arm trains. lora_targets: see put_arm."""

    steps: int = 150
    batch_size: int = 32
    rank: int = 4
    lora_targets: tuple[str, ...] | None = None
    dropout: float = 0.1


@dataclass(frozen=True)
class Trained:
    """network, head: as trained.  scores: accuracy (mean over classes) and loss on the examples to judge by.
    numbers: trained ones by part.  mean_abs_alpha: None without alpha.  seconds: of the training alone."""

    network: Any
    head: nn.Linear
    scores: dict[str, float | None]
    numbers: dict[str, int]
    mean_abs_alpha: float | None
    seconds: float


def train_few_shot(
    encoder: Encoder,
    arm: str,
    rates: dict[str, float],
    recipe: Recipe,
    seed: int | str,
    shots: Sequence[Example],
    judged: Sequence[Example],
) -> Trained:
    """Train an arm on the shots and score it on other examples. The encoder itself stays as it is.

    Raises: what put_arm raises; NonFiniteLoss for a training that diverged.
    """
    begun = time.monotonic()
    device = next(encoder.network.parameters()).device
    inputs, labels = encoder.inputs(shots), _labels(shots).to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(stable_seed("few-shot", seed))
        head = _head(encoder.width, int(labels.max()) + 1).to(device)
        network, groups = put_arm(
            copy.deepcopy(encoder.network), arm, rates=rates, heads=[head], rank=recipe.rank,
            lora_targets=recipe.lora_targets, dropout=recipe.dropout, seed=stable_seed("few-shot", seed),
        )  # fmt: skip
        seen = _features_of(network, inputs, encoder.pooling, device, fixed=arm == "linear")
        alphas = [module for module in network.modules() if isinstance(module, Coefficients)]
        _train_mode(alphas, True)
        _fit(lambda rows: head(seen(rows)), labels, groups, recipe, seed)
        _train_mode(alphas, False)
    seconds = time.monotonic() - begun
    scores = score(network, head, encoder.inputs(judged), _labels(judged), encoder.pooling)
    if scores["loss"] is None:
        # The last step diverged; NaN in place of answers was taken for the first class
        raise NonFiniteLoss("The loss is not finite after the last step: the learning rates are too high.")
    moved = torch.cat([layer.displacement().flatten() for layer in alphas]).mean().item() if alphas else None
    return Trained(network, head, scores, trained_numbers(groups), moved, seconds)


@torch.no_grad()
def score(
    network: Any, head: nn.Module, inputs: Inputs, labels: Tensor, pooling: Pooling
) -> dict[str, float | None]:
    """accuracy: the mean over the classes that occur in labels; loss: mean cross entropy, None if it is not finite."""
    device = next(head.parameters()).device
    order = _by_length(inputs, len(labels))
    parts = [
        head(features(network, chosen(inputs, rows, device), pooling)).cpu()
        for rows in order.split(EVALUATED)
    ]
    logits, labels = torch.cat(parts), labels[order]
    right = (logits.argmax(dim=1) == labels).double()
    loss = F.cross_entropy(logits, labels).item()
    return {
        "accuracy": torch.stack([right[labels == label].mean() for label in labels.unique()]).mean().item(),
        "loss": loss if math.isfinite(loss) else None,
    }


def _fit(
    logits: Callable[[Tensor], Tensor],
    labels: Tensor,
    groups: list[dict[str, Any]],
    recipe: Recipe,
    seed: Any,
) -> None:
    """recipe.steps of AdamW, each on the next rows of a shuffled epoch. Raises: NonFiniteLoss."""
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    count = min(recipe.batch_size, len(labels))
    waiting = torch.empty(0, dtype=torch.long)
    epoch = 0
    for step in range(1, recipe.steps + 1):
        while len(waiting) < count:
            order = torch.randperm(len(labels), generator=generator_for("few-shot", seed, epoch))
            waiting, epoch = torch.cat([waiting, order]), epoch + 1
        rows, waiting = waiting[:count], waiting[count:]
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(logits(rows), labels[rows])
        if not math.isfinite(value := loss.item()):
            raise NonFiniteLoss(f"The loss became {value} in step {step}: the learning rates are too high.")
        loss.backward()
        optimizer.step()
        schedule.step()


def _features_of(
    network: Any, inputs: Inputs, pooling: Pooling, device: torch.device, *, fixed: bool
) -> Callable[[Tensor], Tensor]:
    """Rows -> features. fixed: of a frozen network, whose features are computed once."""
    if not fixed:
        return lambda rows: features(network, chosen(inputs, rows, device), pooling)
    count = len(next(iter(inputs.values())))
    with torch.no_grad():
        known = torch.cat(
            [
                features(network, chosen(inputs, rows, device), pooling)
                for rows in torch.arange(count).split(EVALUATED)
            ]
        )
    return lambda rows: known[rows]


def _head(width: int, classes: int) -> nn.Linear:
    head = nn.Linear(width, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _train_mode(alphas: Sequence[Coefficients], on: bool) -> None:
    for layer in alphas:
        layer.train(on)


def _by_length(inputs: Inputs, count: int) -> Tensor:
    """All rows, short texts together, so that little is padded."""
    mask = inputs.get("attention_mask")
    return torch.arange(count) if mask is None else mask.sum(dim=1).argsort(stable=True)


def _labels(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([example.label for example in examples])
