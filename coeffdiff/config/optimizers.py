"""Optimizers by name: those that trainers of the field know, and all of torch.optim."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from coeffdiff.errors import ConfigError
from coeffdiff.utils.text import first_line

_INSTEAD = "Use training.optimizer=adamw: adapters are small, and its moments with them"
# name -> module, class, what pip installs and the extra that has it
_ELSEWHERE = {
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", "bitsandbytes", "bnb"),
    "prodigy": ("prodigyopt", "Prodigy", "prodigyopt", "optimizers"),
    "lion": ("lion_pytorch", "Lion", "lion-pytorch", "optimizers"),
    "adafactor": ("transformers.optimization", "Adafactor", "transformers", ""),
}
# Ours where a class's own would not do; training.optimizer_args goes before them
_DEFAULTS: dict[str, dict[str, Any]] = {
    # The rates are those of the settings, not of a schedule of its own
    "adafactor": {"relative_step": False, "scale_parameter": False, "warmup_init": False},
}
_HAS_ITS_OWN_SETTING = {
    "lr": "method.lora.learning_rate and its like",
    "weight_decay": "method.lora.weight_decay",
    "params": "what method.kind says",
}


def make_optimizer(
    name: str, groups: list[dict[str, Any]], arguments: dict[str, Any] | None = None
) -> torch.optim.Optimizer:
    """The optimizer that training.optimizer names, over groups with their own lr and weight_decay.

    arguments: training.optimizer_args. Raises: ConfigError for what the class refuses, such as Muon a vector.
    """
    given = {
        key: tuple(value) if isinstance(value, list) else value for key, value in (arguments or {}).items()
    }
    kind = optimizer_class(name)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Prodigy prints that weight decay is decoupled
            optimizer: torch.optim.Optimizer = kind(groups, **_DEFAULTS.get(name, {}) | given)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason = first_line(error).rstrip(".")
        raise ConfigError(f"training.optimizer {name} cannot be had: {reason}. {_advice(given)}.") from None
    return optimizer


def check_optimizer(
    name: str, device: torch.device, arguments: dict[str, Any] | None = None, weight_decay: float = 0.0
) -> None:
    """Let the optimizer take a step on this device.

    weight_decay: of LoRA, 0 where none is trained.
    Raises: ConfigError if there is no such optimizer, it is not installed, does not take these arguments or fails.
    """
    arguments = arguments or {}
    kind = optimizer_class(name)
    _refuse_arguments(name, kind, arguments, weight_decay)
    package = _ELSEWHERE.get(name, ("", "", "torch", ""))[2]
    whose = f"{package} {_version(package)}"
    # adamw8bit alone has kernels of its own; the others are torch's operators, on any device
    if name != "adamw8bit":
        device = torch.device("cpu")
    # A library without kernels for this device fails at the first step, not at its import
    trial = nn.Parameter(torch.ones(64, 64, device=device))
    trial.grad = torch.ones_like(trial)
    try:
        group = {"params": [trial], "lr": 0.5, "weight_decay": weight_decay}
        make_optimizer(name, [group], arguments).step()
        moved = bool((trial < 1).all())
    except ConfigError:
        raise
    except Exception as error:  # a missing library, kernel or operator: each raises its own kind
        reason = first_line(error).rstrip(".")
        raise ConfigError(
            f"training.optimizer {name} of {whose} cannot take a step on {device.type}: {reason}. "
            f"{_advice(arguments)}."
        ) from None
    if not moved:
        raise ConfigError(
            f"training.optimizer {name} of {whose} takes a step on {device.type} that changes nothing. {_INSTEAD}."
        )


def state_bytes(name: str, arguments: dict[str, Any], numel: int) -> int:
    """Bytes that the optimizer keeps for a trained float32 tensor of so many numbers, from a step of a small one."""
    if name == "adamw8bit":  # bitsandbytes keeps a float32 for every 256 numbers, and small tensors wide
        return 2 * numel + 2 * 4 * -(-numel // 256) if numel >= 4096 else 2 * 4 * numel
    trial = nn.Parameter(torch.ones(16, 64))
    trial.grad = torch.ones_like(trial)
    optimizer = make_optimizer(name, [{"params": [trial], "lr": 1e-3, "weight_decay": 0.0}], arguments)
    optimizer.step()
    states = [value for value in optimizer.state[trial].values() if isinstance(value, torch.Tensor)]
    # Counters and rows do not grow with the tensor
    kept = sum(state.nbytes for state in states if state.numel() >= trial.numel() // 2)
    return kept * numel // trial.numel()


def step_size(group: dict[str, Any]) -> float:
    """The learning rate of a group: Prodigy's is what it has found so far times the factor."""
    return float(group["lr"]) * float(group.get("d", 1.0))


def optimizer_class(name: str) -> Any:
    """The class that training.optimizer names.

    Raises: ConfigError with the pip line for what is not installed, or the nearest name for what is not known.
    """
    if name in _ELSEWHERE:
        module, kind, package, extra = _ELSEWHERE[name]
        try:
            return getattr(import_module(module), kind)
        except ImportError:
            raise ConfigError(
                f"training.optimizer {name} needs {package}: pip install 'coeffdiff[{extra}]'. {_INSTEAD}."
            ) from None
    known = _of_torch()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, [*known, *_ELSEWHERE], 1, 0.6)
    meant = f" Did you mean {near[0]}?" if near else f" Known are {', '.join(sorted({*known, *_ELSEWHERE}))}."
    raise ConfigError(f"There is no training.optimizer {name}.{meant}")


def _of_torch() -> dict[str, Any]:
    """The classes of torch.optim by their name in small letters, but those that our loop cannot serve.

    LBFGS evaluates the loss several times a step; SparseAdam takes sparse gradients alone.
    """
    classes = {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    return {name: kind for name, kind in classes.items() if name not in ("optimizer", "lbfgs", "sparseadam")}


def _advice(arguments: dict[str, Any]) -> str:
    return f"Look at training.optimizer_args, which are {arguments}" if arguments else _INSTEAD


def _refuse_arguments(name: str, kind: Any, arguments: dict[str, Any], weight_decay: float) -> None:
    for argument, setting in _HAS_ITS_OWN_SETTING.items():
        if argument in arguments:
            raise ConfigError(f"training.optimizer_args cannot have {argument}: that is {setting}.")
    if name == "adafactor" and arguments.get("relative_step"):
        raise ConfigError(
            "training.optimizer_args cannot have relative_step: Adafactor would choose learning rates of its own."
        )
    parameters = inspect.signature(kind).parameters
    own = [one for one in parameters if one not in _HAS_ITS_OWN_SETTING and one != "self"]
    for argument in arguments:
        if argument not in own:
            near = difflib.get_close_matches(argument, own, 1, 0.6)
            meant = f"Did you mean {near[0]}?" if near else f"It takes {', '.join(own)}."
            raise ConfigError(f"training.optimizer_args: {name} takes no {argument}. {meant}")
    if weight_decay and "weight_decay" not in parameters:
        raise ConfigError(f"training.optimizer {name} has no weight decay: set method.lora.weight_decay=0.")


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:  # PackageNotFoundError is one
        return str(getattr(import_module(package), "__version__", ""))
