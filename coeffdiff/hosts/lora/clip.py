"""LoRA and DoRA on the attention projections of a CLIP text encoder, through PEFT.

Scale, removal and the guard are those of the UNet's (layers.py, guard.py). Tensors bear the names of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from coeffdiff.errors import AdapterError
from coeffdiff.hosts.clip_alpha import attention_modules, in_file
from coeffdiff.hosts.guard import unwrapped, watch
from coeffdiff.hosts.lora.guard import LoraPart
from coeffdiff.hosts.lora.layers import lora_parameters, others_stay
from coeffdiff.method.lora_layout import DOWN, MAGNITUDE, peft_key
from coeffdiff.utils.seeding import stable_seed

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")  # of each attention layer, as peers adapt them


def add_clip_lora(
    encoder: nn.Module,
    name: str = "default",
    *,
    network: str,
    rank: int,
    alpha: float,
    dora: bool = False,
    seed: int = 0,
    label: str = "the run",
) -> dict[str, nn.Parameter]:
    """Put a trainable LoRA on the four projections of every attention layer.

    network: the pipeline's name for the encoder, so that two encoders begin with other numbers.
    Returns its parameters by name. PEFT freezes everything else, alpha included: set requires_grad after this.
    """
    bare = unwrapped(encoder)
    projections = [f"{layer}.{target}" for layer in attention_modules(bare) for target in PROJECTIONS]
    return _add(bare, name, projections, rank, alpha, dora, stable_seed("lora", seed, network), label)


def _add(
    bare: nn.Module,
    name: str,
    modules: list[str],
    rank: int,
    alpha: float,
    dora: bool,
    seed: int,
    label: str,
) -> dict[str, nn.Parameter]:
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=modules, use_dora=dora, init_lora_weights=True
    )
    with others_stay(bare, name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # PEFT draws its A matrices from the global generator
        bare.add_adapter(config, name)
    parameters = lora_parameters(bare, name)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    watch(bare, f"lora {name}", LoraPart(bare, name, label, "text encoder"))
    return parameters


def load_clip_lora(
    encoder: nn.Module,
    tensors: Mapping[str, Tensor],
    name: str,
    *,
    rank: int,
    alpha: float,
    dora: bool,
    origin: str,
) -> None:
    """Put the tensors of one encoder on it as adapter `name`, in float32, and see that every one arrived.

    tensors: by their names in files, text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight, checked before by
    check_lora. Raises: AdapterError for one that did not arrive.
    """
    bare = unwrapped(encoder)
    tensors = {peft_key(key): tensor for key, tensor in tensors.items()}
    own = {in_file(module): module for module, _ in bare.named_modules()}
    modules = [own[key.removesuffix(DOWN)] for key in tensors if key.endswith(DOWN)]
    parameters = _add(bare, name, modules, rank, alpha, dora, 0, str(Path(origin).parent))
    left = set(tensors)
    for key, parameter in parameters.items():
        ending = "" if MAGNITUDE in key else ".weight"
        plain = in_file(key.replace(f".{name}.weight", ending))
        tensor = tensors.get(plain)
        if tensor is None or tensor.shape != parameter.shape:
            raise AdapterError(f"{origin}: {plain} did not reach the text encoder; PEFT named it otherwise.")
        parameter.requires_grad_(False)
        parameter.data = tensor.to(parameter.device, torch.float32, copy=True)
        left.discard(plain)
    if left:
        raise AdapterError(f"{origin}: {sorted(left)[0]} did not reach the text encoder; PEFT left it out.")


def clip_lora_tensors(encoder: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """One LoRA's tensors in PEFT's layout, by their names in files without the encoder's."""
    bare = unwrapped(encoder)
    state: dict[str, Tensor] = get_peft_model_state_dict(bare, adapter_name=name)
    return {in_file(key): tensor for key, tensor in state.items()}
