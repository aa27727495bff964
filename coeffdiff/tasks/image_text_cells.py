"""The cells of an image-text comparison: one arm, at its rates and with its seed, tuned and scored once.

A finished cell is a small JSON file, found by a hash of all that decides it, and is not computed again.
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from coeffdiff import __version__
from coeffdiff.errors import ConfigError, NonFiniteLoss
from coeffdiff.evaluation.cells import Cell, CellFolder
from coeffdiff.evaluation.facts import device_name
from coeffdiff.hosts.any_model.any_module import attached
from coeffdiff.tasks.arms import PARTS, put_arm, trained_numbers
from coeffdiff.tasks.image_text_data import FILE, ImageTextData
from coeffdiff.tasks.image_text_model import ImageText
from coeffdiff.tasks.image_text_pictures import Tower
from coeffdiff.tasks.image_text_training import few, score, tune
from coeffdiff.utils.hashing import hash_of, hash_tensors

FROZEN = "frozen"  # the model as it is
ARMS = (FROZEN, *PARTS)


@dataclass(frozen=True)
class TuningPlan:
    """What is equal in all cells.

    steps, batch_size: of the tuning.  questions: drawn of each task to train on, anew with each seed; 0: all.
    rank: of LoRA.  dropout: on alpha.
    """

    steps: int = 300
    batch_size: int = 32
    questions: int = 0
    rank: int = 4
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("questions", 0), ("rank", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name.replace('_', ' ')} must be at least {least}, not {getattr(self, name)}."
                )


class Bench:
    """A model, its questions and the features of their pictures, on which cells are computed.

    The model given stays as it is.
    """

    def __init__(
        self, model: ImageText, tower: Tower, features: Tensor, data: ImageTextData, plan: TuningPlan
    ) -> None:
        self.model, self.features, self.data, self.plan = model, features, data, plan
        digest = hashlib.blake2b(f"{tower.grid}".encode(), digest_size=8)
        for network in (model, tower.network):
            hash_tensors(digest, sorted(network.state_dict().items()))
        # Files and not features, whose last digits depend on the number of threads
        for file in (data.folder / FILE, *data.pictures):
            digest.update(hashlib.blake2b(file.read_bytes()).digest())
        self.print = digest.hexdigest()

    def cell(
        self,
        folder: CellFolder,
        arm: str,
        rates: Mapping[str, float],
        seed: int,
        split: str,
        on_step: Callable[[int, float], None] | None = None,
    ) -> Cell:
        """The cell of an arm, from the folder or computed and written there. split: what is scored."""
        plan = asdict(self.plan) if arm != FROZEN else {}
        key = hash_of("image-text 1", self.print, plan, arm, dict(rates), seed, split)
        if (known := folder.read(key)) is not None:
            return known
        begun = time.monotonic()
        cell: Cell = {"arm": arm, "rates": dict(rates), "seed": seed, "split": split, **plan}
        try:
            cell |= self._tuned(arm, rates, seed, split, on_step)
        except NonFiniteLoss as error:
            cell["failed"] = str(error)
        cell["seconds"] = round(time.monotonic() - begun, 1)
        cell["made"] = _made(self.model)
        folder.write(key, f"{arm}-{split}-s{seed}", cell)
        return cell

    def _tuned(
        self,
        arm: str,
        rates: Mapping[str, float],
        seed: int,
        split: str,
        on_step: Callable[[int, float], None] | None,
    ) -> dict[str, Any]:
        plan, model = self.plan, copy.deepcopy(self.model)
        facts: dict[str, Any] = {"numbers": {}}
        if arm != FROZEN:
            _, groups = put_arm(
                model.language,
                arm,
                rates=rates,
                heads=[model.projection],
                rank=plan.rank,
                dropout=plan.dropout,
                seed=seed,
            )
            facts["numbers"] = trained_numbers(groups)
            tune(
                model,
                groups,
                self.features,
                few(self.data.splits["train"], plan.questions, seed),
                steps=plan.steps,
                batch_size=plan.batch_size,
                seed=seed,
                on_step=on_step,
            )
            if "coeff" in PARTS[arm]:
                alphas = [layer.alpha.detach().abs().mean() for layer in attached(model.language).values()]
                facts["mean_abs_alpha"] = round(float(torch.stack(alphas).mean()), 5)
        found = score(model, self.features, self.data.splits[split])
        if arm != FROZEN and not math.isfinite(found.loss):  # the last step diverged; its answers say nothing
            raise NonFiniteLoss("The loss is not finite after the last step; lower the learning rates.")
        return facts | {
            "accuracy": {task: round(share, 6) for task, share in found.accuracy.items()},
            "f1": {task: round(share, 6) for task, share in found.f1.items()},
            "questions_scored": dict(found.counts),
            "mean_accuracy": round(found.mean, 6),
            "loss": round(found.loss, 6),
        }


def _made(model: ImageText) -> dict[str, str]:
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(model.projection.linear.weight.device),
        "coeffdiff": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
