"""An arm of an experiment on a model of transformers: what trains, at which learning rate.

linear       only the modules that are named as heads
lora         also LoRA, on the query and value projections of the attention layers
coeff        also alpha, on every attention layer
coeff+lora   both
full         the whole model, for reference
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from coeffdiff.errors import ConfigError
from coeffdiff.hosts.any_model.attach import attach
from coeffdiff.hosts.any_model.attention_layers import attention_layers
from coeffdiff.utils.seeding import stable_seed

ARMS = ("linear", "lora", "coeff", "coeff+lora")
# The parts of an arm that have learning rates, in the order of their optimizer groups
PARTS = {
    "linear": ("head",),
    "lora": ("head", "lora"),
    "coeff": ("head", "coeff"),
    "coeff+lora": ("head", "lora", "coeff"),
    "full": ("head", "full"),
}
# Ours: the paper names none for these tasks
DEFAULT_RATES = {"head": 1e-3, "lora": 3e-3, "coeff": 3e-2, "full": 5e-5}

_QUERIES_AND_VALUES = frozenset(
    ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "q", "v", "query_proj", "value_proj")
)
_FUSED = frozenset(("qkv", "c_attn", "qkv_proj", "in_proj", "query_key_value", "Wqkv"))


def put_arm(
    model: nn.Module,
    arm: str,
    *,
    rates: Mapping[str, float],
    heads: Iterable[nn.Module] = (),
    rank: int = 4,
    lora_targets: Sequence[str] | None = None,
    coeff_targets: str | Sequence[str] = "all",
    dropout: float = 0.1,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> tuple[Any, list[dict[str, Any]]]:
    """Freeze a model of transformers but for what an arm trains. The model is changed; copy it first to keep it.

    Args:
        arm: a key of PARTS.
        rates: learning rates of at least the arm's parts: head, lora, coeff, full.
        heads: modules that train whole in every arm, inside the model or not; may be none but for "linear".
        rank: of LoRA, whose scale is 1 (PEFT's lora_alpha is the rank).
        lora_targets: ends of names of linear layers. None: queries and values of every attention layer, or the one
            layer that computes both.
        coeff_targets: as in coeffdiff.attach.
        dropout: on alpha, drawn from torch's generator in train() mode.
        weight_decay: of all but alpha, which has none.
        seed: of LoRA's first matrices.
    Returns: the model, inside a PeftModel where LoRA is on it, and the optimizer's groups, each with its name, params,
        lr and weight_decay; put them into AdamW.
    Raises: ConfigError for an unknown arm or target, an absent rate, or nothing to train; InjectionError for a model
        without attention layers that alpha can reach.
    """
    heads = list(heads)
    _check(arm, rates, heads)
    parts = PARTS[arm]
    model.requires_grad_(arm == "full")
    trained: dict[str, list[nn.Parameter]] = {}
    result: Any = model
    if "lora" in parts:
        result = _with_lora(model, rank, lora_targets, seed)
        trained["lora"] = [p for p in result.parameters() if p.requires_grad]
    if "coeff" in parts:
        trained["coeff"] = list(attach(result, coeff_targets, dropout=dropout).values())
    trained["head"] = list(dict.fromkeys(p for head in heads for p in head.parameters()))
    for parameter in trained["head"]:
        parameter.requires_grad_(True)
    if "full" in parts:
        own = set(trained["head"])
        trained["full"] = [p for p in model.parameters() if p not in own]
    return result, [
        {
            "name": part,
            "params": trained[part],
            "lr": rates[part],
            "weight_decay": 0.0 if part == "coeff" else weight_decay,
        }
        for part in parts
        if trained[part]
    ]


def trained_numbers(groups: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many numbers each group of put_arm trains, by its name."""
    return {group["name"]: sum(p.numel() for p in group["params"]) for group in groups}


def lora_layers(model: nn.Module, targets: Sequence[str] | None = None) -> list[str]:
    """The layers for LoRA as PEFT takes them. targets: as lora_targets of put_arm, which says what is raised."""
    return _queries_and_values(model) if targets is None else _named(model, targets)


def _check(arm: str, rates: Mapping[str, float], heads: Sequence[nn.Module]) -> None:
    if arm not in PARTS:
        raise ConfigError(f"There is no arm {arm!r}; there are {', '.join(PARTS)}.")
    if absent := [part for part in PARTS[arm] if part not in rates and (part != "head" or heads)]:
        raise ConfigError(f"The arm {arm} needs a learning rate of its {absent[0]}.")
    if arm == "linear" and not heads:
        raise ConfigError("The arm linear trains nothing but heads, and no head was given.")


def _with_lora(model: nn.Module, rank: int, targets: Sequence[str] | None, seed: int) -> Any:
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=lora_layers(model, targets))
    # PEFT draws from the global generator, and warns of transposed layers, which it then treats rightly
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(stable_seed("lora", seed))
        return get_peft_model(model, config)


def _queries_and_values(model: nn.Module) -> list[str]:
    """Full names: a short one would reach layers of the same name outside the attention layers."""
    found = []
    for name, layer in attention_layers(model).items():
        children = [child for child, module in layer.named_children() if _is_linear(module)]
        chosen = [c for c in children if c in _QUERIES_AND_VALUES] or [c for c in children if c in _FUSED]
        if not chosen:
            raise ConfigError(
                f"{name} ({type(layer).__name__}) has no query and value that LoRA knows by name, among "
                f"{', '.join(children) or 'no linear layers'}: name the layers for LoRA."
            )
        found += [f"{name}.{child}" for child in chosen]
    return found


def _named(model: nn.Module, targets: Sequence[str]) -> list[str]:
    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"This {type(model).__name__} has no linear layer {target!r} for LoRA; it has {', '.join(known)}."
            )
    return list(targets)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
