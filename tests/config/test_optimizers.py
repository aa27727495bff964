"""Optimizers by name: they step and continue exactly, or one sentence says why not."""

from __future__ import annotations

import importlib.util
import sys
import types
from functools import partial

import pytest
import torch
from torch import nn

from coeffdiff.config import optimizers
from coeffdiff.config.optimizers import check_optimizer, make_optimizer
from coeffdiff.errors import ConfigError

CPU = torch.device("cpu")


def stand_in(monkeypatch, step) -> None:
    """bitsandbytes with an AdamW8bit whose step is `step`."""

    class AdamW8bit(torch.optim.SGD):
        def step(self):
            return step(self)

    module = types.ModuleType("bitsandbytes")
    module.__version__ = "9.9"
    module.optim = types.ModuleType("bitsandbytes.optim")
    module.optim.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module.optim)
    monkeypatch.setattr(optimizers, "_version", lambda package: "9.9")


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
        ConfigError,
        match=r"training.optimizer adamw8bit needs bitsandbytes: pip install 'coeffdiff\[bnb\]'\. Use",
    ):
        check_optimizer("adamw8bit", CPU)


def test_8_bits_that_do_not_run_here_are_refused(monkeypatch):
    """A library without kernels for this device fails at a step, not at its import; or it does nothing at all."""

    def fails(_optimizer):
        raise NotImplementedError("Could not run 'bitsandbytes::optimizer_update'.\nmany\nlines")

    stand_in(monkeypatch, fails)
    expected = r"adamw8bit of bitsandbytes 9\.9 cannot take a step on cpu: Could not run 'bitsandbytes::optimizer_update'\. Use"
    with pytest.raises(ConfigError, match=expected) as error:
        check_optimizer("adamw8bit", CPU)
    assert "\n" not in str(error.value)
    stand_in(monkeypatch, lambda _optimizer: None)
    with pytest.raises(ConfigError, match="takes a step on cpu that changes nothing"):
        check_optimizer("adamw8bit", CPU)


def begin(name, arguments=None, rates=(0.02, 0.01), decay=0.1):
    """An alpha and a matrix of LoRA, and their optimizer."""
    generator = torch.Generator().manual_seed(0)
    alpha, matrix = (nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((10, 10), (64, 128)))
    groups = [{"params": [alpha], "lr": rates[0], "weight_decay": 0.0}]
    groups += [{"params": [matrix], "lr": rates[1], "weight_decay": decay}]
    return make_optimizer(name, groups, arguments), alpha, matrix


def walk(optimizer, alpha, matrix, steps):
    """Towards ones and zeros."""
    for _ in range(steps):
        ((alpha - 1) ** 2).sum().add((matrix**2).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([alpha.detach().flatten(), matrix.detach().flatten()])


def continued(begun, file, steps=3):
    """After `steps` steps, a checkpoint and as many steps more."""
    optimizer, alpha, matrix = begun()
    walk(optimizer, alpha, matrix, steps)
    torch.save({"optimizer": optimizer.state_dict()}, file)
    halfway = alpha.detach().clone(), matrix.detach().clone()
    optimizer, alpha, matrix = begun()
    with torch.no_grad():
        alpha.copy_(halfway[0])
        matrix.copy_(halfway[1])
    optimizer.load_state_dict(torch.load(file, weights_only=True)["optimizer"])
    return walk(optimizer, alpha, matrix, steps)


@pytest.mark.parametrize(
    ("name", "arguments", "rate", "kind"),
    [
        ("prodigy", {"d_coef": 2.0}, 1.0, "prodigyopt.prodigy.Prodigy"),
        ("lion", {"betas": [0.95, 0.98]}, 0.01, "lion_pytorch.lion_pytorch.Lion"),
        ("adafactor", {}, 0.01, "transformers.optimization.Adafactor"),
        ("nadam", {"betas": [0.9, 0.99]}, 0.01, "torch.optim.nadam.NAdam"),
        ("sgd", {"momentum": 0.9}, 0.01, "torch.optim.sgd.SGD"),
        ("muon", {}, 0.01, "torch.optim.Muon"),
    ],
)
def test_named_optimizers_learn_and_continue_exactly(tmp_path, name, arguments, rate, kind):
    """Six steps bring both tensors nearer to their aims; three, a checkpoint and three more are the same six."""
    if name in ("prodigy", "lion"):
        pytest.importorskip(kind.split(".")[0])
    check_optimizer(name, CPU, arguments, 0.1)
    begun = partial(begin, name, arguments, (rate, rate))
    optimizer, alpha, matrix = begun()
    assert f"{type(optimizer).__module__}.{type(optimizer).__name__}" == kind
    for argument, value in arguments.items():
        assert optimizer.param_groups[1][argument] == (tuple(value) if isinstance(value, list) else value)
    before = (alpha - 1).norm(), matrix.norm()
    whole = walk(optimizer, alpha, matrix, 6)
    assert (alpha - 1).norm() < before[0] and matrix.norm() < before[1]
    assert torch.equal(continued(begun, tmp_path / "optimizer.pt"), whole)


@pytest.mark.parametrize(
    ("name", "arguments", "decay", "said"),
    [
        ("adanw", {}, 0.0, "no training.optimizer adanw. Did you mean adamw?"),
        ("magic", {}, 0.0, "no training.optimizer magic. Known are adadelta, adafactor,"),
        ("lbfgs", {}, 0.0, "no training.optimizer lbfgs"),
        ("adamw", {"beta": 0.9}, 0.0, "adamw takes no beta. Did you mean betas?"),
        ("sgd", {"warp": 1}, 0.0, "sgd takes no warp. It takes momentum, dampening,"),
        ("adamw", {"betas": 0.9}, 0.0, "Look at training.optimizer_args, which are {'betas': 0.9}."),
        ("adamw", {"lr": 1.0}, 0.0, "cannot have lr: that is method.lora.learning_rate"),
        ("adamw", {"weight_decay": 1.0}, 0.0, "cannot have weight_decay: that is method.lora.weight_decay"),
        ("adafactor", {"relative_step": True}, 0.0, "cannot have relative_step"),
        ("rprop", {}, 0.1, "rprop has no weight decay: set method.lora.weight_decay=0"),
    ],
)
def test_what_is_no_optimizer_is_refused(name, arguments, decay, said):
    with pytest.raises(ConfigError) as error:
        check_optimizer(name, CPU, arguments, decay)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["prodigy", "lion"])
def test_what_is_not_installed_is_named(monkeypatch, name):
    for module in ("prodigyopt", "lion_pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'coeffdiff\[optimizers\]'\."):
        check_optimizer(name, CPU)


def test_a_tensor_that_it_cannot_take_is_refused_at_once():
    """Muon takes matrices alone, and DoRA trains vectors."""
    with pytest.raises(ConfigError, match=r"training\.optimizer muon cannot be had: "):
        make_optimizer("muon", [{"params": [nn.Parameter(torch.ones(3))], "lr": 0.1, "weight_decay": 0.0}])


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
def test_8_bits_step_and_continue_exactly(tmp_path):
    """LoRA's matrices get 8-bit moments, alphas keep float32; 3 steps, stored and loaded as a checkpoint is, then 3
    more give the parameters of 6; and they go where AdamW in float32 goes."""
    check_optimizer("adamw8bit", CPU)

    optimizer, alpha, matrix = begin("adamw8bit")
    whole = walk(optimizer, alpha, matrix, 6)
    assert optimizer.state[matrix]["state1"].dtype == torch.uint8
    assert optimizer.state[alpha]["state1"].dtype == torch.float32
    assert torch.equal(continued(partial(begin, "adamw8bit"), tmp_path / "optimizer.pt"), whole)
    torch.testing.assert_close(walk(*begin("adamw"), 6), whole, atol=0.02, rtol=0)
