"""Runs the command line and keeps the gradients that the first optimizer step sees: GRADIENTS.pt ARGUMENTS..."""

from __future__ import annotations

import os
import sys

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from coeffdiff.cli.root import main
from coeffdiff.training import run_summary


def keep_first_gradients(file: str) -> None:
    def before_step(optimizer: Optimizer, *_: object) -> None:
        learned = [p for group in optimizer.param_groups for p in group["params"]]
        if len(learned) == 1:  # optimizers are tried on one tensor before a run
            return
        gradients = [p.grad.clone() for p in learned if p.grad is not None]
        if os.environ.get("RANK", "0") == "0" and not os.path.exists(file):  # noqa: PTH110
            torch.save(dict(enumerate(gradients)), file)

    register_optimizer_step_pre_hook(before_step)


if __name__ == "__main__":
    run_summary.TIMING_SECONDS = 0.0  # what is timed before a run makes optimizer steps of its own
    keep_first_gradients(sys.argv.pop(1))
    main()
