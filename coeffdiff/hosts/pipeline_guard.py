"""Gates on the pipeline and UNet of loaded adapters: calls that would silently break an adapter are checked first.

Gated are a pipeline's call (through check_inputs, with which each of diffusers' calls begins) and what would save, fuse
or swap weights. Other changes the guard finds at the next forward.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from coeffdiff.errors import AdapterError, InjectionError
from coeffdiff.hosts.guard import free_state, gate, keep_state_whole, ungate, unwrapped, verify
from coeffdiff.hosts.lora.guard import check_fusing, check_loading
from coeffdiff.hosts.text_encoders import encoders_on


def enter(pipe: Any) -> None:
    """Gate a pipeline and its UNet, once for all adapters on it."""
    unet = unwrapped(pipe.unet)
    gate(unet, "save_pretrained", _refuse_saving_unet)
    gate(unet, "fuse_lora", check_fusing)
    gate(unet, "load_lora_adapter", check_loading)
    keep_state_whole(unet)
    if hasattr(pipe, "check_inputs"):
        pipe._coeffdiff_unet = unet
        gate(pipe, "check_inputs", _check_call)
        gate(pipe, "save_pretrained", _refuse_saving)
        gate(pipe, "fuse_lora", _check_fusing_encoders)


def leave(pipe: Any, unet: nn.Module) -> None:
    """After the last adapter: restore the methods. A pipeline that is not at hand is restored at its next call."""
    ungate(unet, "save_pretrained", "fuse_lora", "load_lora_adapter")
    free_state(unet)
    if getattr(pipe, "_coeffdiff_unet", None) is unet:
        ungate(pipe, "check_inputs", "save_pretrained", "fuse_lora")
        del pipe._coeffdiff_unet


def verify_home(pipe: Any, unet: nn.Module) -> None:
    """Raises: InjectionError if this pipeline, on which adapters were loaded, has another UNet by now."""
    now = getattr(pipe, "unet", None)
    if not isinstance(now, nn.Module) or unwrapped(now) is unet or any(m is unet for m in now.modules()):
        return
    raise InjectionError(
        f"This pipeline has another UNet than the one that {_names(unet)} was loaded on, so the adapter would do "
        "nothing. Load it again on this one, or put the other back; a new pipeline from pipe.components does "
        "without it."
    )


def _check_call(pipe: Any, *_: Any, **__: Any) -> None:
    unet = pipe._coeffdiff_unet
    if not _adapters(unet):
        leave(pipe, unet)
        return
    verify_home(pipe, unet)
    verify(unet)


def _check_fusing_encoders(
    pipe: Any,
    components: Any = None,
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: Any = None,
    **_: Any,
) -> None:
    """The UNet's own gate asks for the UNet; diffusers fuses text encoders without calling a method of theirs."""
    for name, encoder in encoders_on(pipe).items():
        if components is None or name in components:
            check_fusing(encoder, lora_scale, safe_fusing, adapter_names)


def _refuse_saving(pipe: Any, *_: Any, **__: Any) -> None:
    if _adapters(pipe._coeffdiff_unet):
        _refuse_saving_unet(pipe._coeffdiff_unet)
    else:
        leave(pipe, pipe._coeffdiff_unet)


def _refuse_saving_unet(unet: nn.Module, *_: Any, **__: Any) -> None:
    raise AdapterError(
        f"save_pretrained would write {_names(unet)} as weights that no model reads back. remove() the adapter, save, "
        "and keep its folder beside the model."
    )


def _adapters(unet: nn.Module) -> dict[str, Any]:
    return getattr(unet, "_coeffdiff_adapters", None) or {}


def _names(unet: nn.Module) -> str:
    return " and ".join(str(adapter.path) for adapter in _adapters(unet).values()) or "the adapter"
