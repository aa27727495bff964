"""The optimizers: 8 bits where they run, one sentence where they do not."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from coeffdiff.errors import ConfigError
from coeffdiff.training.optimizer import check_optimizer, make_optimizer

CPU = torch.device("cpu")


def stand_in(monkeypatch, step) -> None:
    """bitsandbytes with an AdamW8bit whose step is `step`."""

    class AdamW8bit(torch.optim.SGD):
        def step(self):
            return step(self)

    module = types.ModuleType("bitsandbytes")
    module.__version__ = "9.9"
    module.optim = types.SimpleNamespace(AdamW8bit=AdamW8bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)


def test_adamw_is_torchs_and_needs_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_optimizer("adamw", CPU)
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": 0.5, "weight_decay": 0.25}]
    optimizer = make_optimizer("adamw", groups)
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.5, 0.25)


def test_8_bits_without_bitsandbytes_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(
        ConfigError, match=r"adamw8bit needs bitsandbytes: pip install 'coeffdiff\[bnb\]'\. Use"
    ):
        check_optimizer("adamw8bit", CPU)


def test_8_bits_that_do_not_run_here_are_refused(monkeypatch):
    """A library without kernels for this device fails at a step, not at its import; or it does nothing at all."""

    def fails(_optimizer):
        raise NotImplementedError("Could not run 'bitsandbytes::optimizer_update'.\nmany\nlines")

    stand_in(monkeypatch, fails)
    expected = (
        r"bitsandbytes 9\.9 cannot take a step on cpu: Could not run 'bitsandbytes::optimizer_update'\. Use"
    )
    with pytest.raises(ConfigError, match=expected) as error:
        check_optimizer("adamw8bit", CPU)
    assert "\n" not in str(error.value)
    stand_in(monkeypatch, lambda _optimizer: None)
    with pytest.raises(ConfigError, match="takes a step on cpu that changes nothing"):
        check_optimizer("adamw8bit", CPU)


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
def test_8_bits_step_and_continue_exactly(tmp_path):
    """LoRA's matrices get 8-bit moments, alphas keep float32; 3 steps, stored and loaded as a checkpoint is, then 3
    more give the parameters of 6; and they go where AdamW in float32 goes."""
    check_optimizer("adamw8bit", CPU)

    def begin(name="adamw8bit"):
        generator = torch.Generator().manual_seed(0)
        alpha, matrix = (
            nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((10, 10), (64, 128))
        )
        groups = [{"params": [alpha], "lr": 0.02, "weight_decay": 0.0}]
        groups += [{"params": [matrix], "lr": 0.01, "weight_decay": 0.1}]
        return make_optimizer(name, groups), alpha, matrix

    def walk(optimizer, alpha, matrix, steps):
        for _ in steps:
            ((alpha - 1) ** 2).sum().add((matrix**2).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([alpha.detach().flatten(), matrix.detach().flatten()])

    optimizer, alpha, matrix = begin()
    whole = walk(optimizer, alpha, matrix, range(6))
    assert optimizer.state[matrix]["state1"].dtype == torch.uint8
    assert optimizer.state[alpha]["state1"].dtype == torch.float32
    optimizer, alpha, matrix = begin()
    walk(optimizer, alpha, matrix, range(3))
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "optimizer.pt")
    halfway = alpha.detach().clone(), matrix.detach().clone()
    optimizer, alpha, matrix = begin()
    with torch.no_grad():
        alpha.copy_(halfway[0])
        matrix.copy_(halfway[1])
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True)["optimizer"])
    assert torch.equal(walk(optimizer, alpha, matrix, range(3)), whole)
    torch.testing.assert_close(walk(*begin("adamw"), range(6)), whole, atol=0.02, rtol=0)
