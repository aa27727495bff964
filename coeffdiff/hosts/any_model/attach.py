"""Alpha on any model: attach, save, attach_from, detach. The model's class decides which host does the work.

alphas = coeffdiff.attach(model, dropout=0.1)   # the model is frozen, the alphas train
...                                             # your loop, transformers.Trainer, Accelerate
coeffdiff.save(model, "folder")
coeffdiff.detach(model)                         # the model as it was, bit for bit
coeffdiff.attach_from(model, "folder")
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coeffdiff.errors import AdapterMismatch, ConfigError, InjectionError
from coeffdiff.hosts.hub.address import origin_of
from coeffdiff.hosts.hub.lookup import resolve_adapter
from coeffdiff.method.adapter_file import alphas_of, pack_coefficients, read_attached
from coeffdiff.method.adapter_paths import COEFF_FILE
from coeffdiff.method.attached_header import AttachedHeader
from coeffdiff.method.coefficients import Coefficients
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.output_folder import write_errors
from coeffdiff.utils.wrappers import unwrapped


@torch.inference_mode(False)  # what is attached inside of inference mode may be trained outside
def attach(
    model: nn.Module, targets: str | Iterable[str] = "all", *, dropout: float = 0.1
) -> dict[str, nn.Parameter]:
    """Give a model's attention layers an alpha each, freeze the model, and return the alphas, which train.

    Works on models of transformers and diffusers, on torch.nn.MultiheadAttention, and on modules called ...Attention
    that call scaled_dot_product_attention or one softmax over their maps, in any model, also inside a PeftModel.
    Layers that call transformers' attention interface get an attention function; diffusers' UNets of Stable
    Diffusion's kind get processors; in other layers the one computation of maps in their forward is intercepted.
    Alphas start at zero: the model computes what it did. They are parameters of the attention modules, so that
    optimizers, `to()`, `state_dict()`, transformers.Trainer and Accelerate find them; they stay float32 in a model of
    half precision. Give them a larger learning rate than LoRA (1e-2 to 3e-2) and no weight decay.

    Call it after `get_peft_model` or `add_adapter`, which freeze everything else; what PEFT trains then goes on
    training. A head that shall train too: `model.classifier.requires_grad_(True)` afterwards. `save_pretrained` writes
    alpha beside the model, for attach_from; `from_pretrained` alone does not take it.
    `output_attentions=True` and `need_weights=True` return the mixed maps. Attention dropout falls on the maps before
    they are mixed; in layers that compute a softmax of their own it falls on the mixed ones.

    Args:
        model: the module, wrapped or not.
        targets: "all", "self", "cross" (cross-attention), or names of layers or of blocks of layers. Joint attention,
            in which image and text tokens attend to each other in one softmax (SD3, Flux, AuraFlow), counts as "self".
        dropout: probability with which each entry of alpha is left out, drawn in every forward in train() mode from
            torch's generator, the others scaled by 1 / (1 - dropout). Nothing else has to be called for it.
    Returns: {layer name: alpha [H, H]}; row = head that receives, column = map that is used.
    Raises: InjectionError for a model or layers that alpha cannot reach, ConfigError for targets that match nothing.
        The model is then as it was. What only a forward can show, a layer that computes no maps or several times maps,
        is refused by the first forward.
    """
    return _attach(model, targets, dropout, trainable=True)


@torch.inference_mode(False)
def attach_from(
    model: nn.Module,
    folder: str | Path,
    *,
    trainable: bool = False,
    dropout: float = 0.1,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> dict[str, nn.Parameter]:
    """Give a model the alphas that save wrote, every one of them, and return them as attach does.

    Args:
        folder: with coeff.safetensors. As a string also a repository of the Hub: user/repo, user/repo@revision. A path
            that exists wins.
        trainable: to go on training: the model is then frozen as by attach, and dropout falls on alpha. Otherwise
            alphas have no gradient and nothing else of the model changes.
        revision, subfolder, token, cache_dir, local_files_only: of the repository, as diffusers names them; see
            hub.resolve_adapter.
    Raises: AdapterError if the files are missing or damaged, AdapterMismatch if they were made for another model, and
        what attach raises. The model is then as it was.
    """
    inner, host = _bare(model), _host_of(model)
    found = resolve_adapter(
        folder, revision=revision, subfolder=subfolder, token=token, cache_dir=cache_dir,
        local_files_only=local_files_only, attached=True,
    )  # fmt: skip
    header, alphas = read_attached(found)
    _refuse_mismatch(inner, host.heads_by_layer(inner), header, origin_of(found))
    result = _attach(model, list(header.heads), dropout if trainable else 0.0, trainable)
    with torch.no_grad():
        for name, alpha in result.items():
            alpha.copy_(alphas[f"{name}.alpha"])
    return result


def save(model: nn.Module, folder: str | Path) -> None:
    """Write the alphas of a model to coeff.safetensors in a folder, atomically; other files there stay.

    The file has a header with the model's class and name, the heads of each layer and the versions of libraries.
    Raises: InjectionError if the model has no alpha; ConfigError if the folder cannot be written.
    """
    inner = _bare(model)
    layers: dict[str, Coefficients] = _host_of(model).attached(inner)
    if not layers:
        raise InjectionError("This model has no alpha to save: call coeffdiff.attach(model) first.")
    header = AttachedHeader(
        model_class=type(inner).__name__,
        model_type=_model_type(inner),
        model_name=str(getattr(inner, "name_or_path", "") or ""),
        heads={name: layer.heads for name, layer in layers.items()},
        versions=_versions(),
    )
    with write_errors(f"{folder}"), atomic_write(Path(folder) / COEFF_FILE, durable=True) as temporary:
        temporary.write_bytes(pack_coefficients(alphas_of(layers), header))


def detach(model: nn.Module) -> None:
    """Take the alphas of attach or attach_from off; the model is then as it was, bit for bit.

    What attach froze trains again. Without alpha on the model nothing happens.
    """
    inner = _bare(model)
    _host_of(model).detach(inner)
    changes: _Changes | None = vars(inner).pop("_coeffdiff_changes", None)
    if changes is not None:
        for parameter in changes.frozen:
            parameter.requires_grad_(True)
        for saver in changes.savers:
            vars(saver).pop("save_pretrained", None)


@dataclass
class _Changes:
    """What attach changed beside the attention layers. It lives on the model and is copied with it."""

    frozen: list[nn.Parameter] = field(default_factory=list)
    savers: list[nn.Module] = field(default_factory=list)  # their save_pretrained writes alpha too


def _attach(
    model: nn.Module, targets: str | Iterable[str], dropout: float, trainable: bool
) -> dict[str, nn.Parameter]:
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be at least 0 and less than 1, not {dropout}.")
    inner, host = _bare(model), _host_of(model)
    if host.attached(inner):
        raise InjectionError("This model already has alpha: call coeffdiff.detach(model) first.")
    layers: dict[str, Coefficients] = host.attach(inner, targets, trainable)
    changes = inner._coeffdiff_changes = _Changes()
    for layer in layers.values():
        layer.dropout = dropout
        layer.alpha.requires_grad_(trainable)
    if trainable:
        changes.frozen = _freeze(inner, layers)
    for saver in {id(one): one for one in (model, inner) if hasattr(one, "save_pretrained")}.values():
        saver.save_pretrained = partial(_save_pretrained, saver)
        changes.savers.append(saver)
    return {name: layer._parameters["alpha"] for name, layer in layers.items()}


def _freeze(model: nn.Module, layers: dict[str, Coefficients]) -> list[nn.Parameter]:
    """Nothing but alpha trains, and what PEFT trains where its adapters are on the model. Returns what was frozen."""
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        return []
    own = {id(layer.alpha) for layer in layers.values()}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def _save_pretrained(model: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own save_pretrained, and alpha beside it, since from_pretrained does not take alpha."""
    result = type(model).save_pretrained(model, folder, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        save(model, folder)
    return result


def _bare(model: nn.Module) -> Any:
    """The model inside the wrappers of torch.compile, data parallelism and PEFT."""
    inner: Any = unwrapped(model)
    return _bare(inner.get_base_model()) if hasattr(inner, "get_base_model") else inner


def _host_of(model: nn.Module) -> Any:
    """The module of hosts/ that knows this model. Raises: InjectionError."""
    inner = _bare(model)
    if not isinstance(inner, nn.Module):
        parts = getattr(inner, "components", None)
        found = [
            f"pipe.{name}" for name in ("transformer", "unet") if isinstance(parts, dict) and name in parts
        ]
        raise InjectionError(
            f"alpha cannot be attached to a {type(inner).__name__}: coeffdiff.attach takes a torch.nn.Module"
            + (f", here {found[0]}." if found else ".")
        )
    if _is_unet(inner) and (host := import_module("coeffdiff.hosts.any_model.unet_attach")).takes(inner):
        return host
    return import_module("coeffdiff.hosts.any_model.any_module")


def _is_unet(model: nn.Module) -> bool:
    return any(
        base.__module__.startswith("diffusers.") and base.__name__ == "UNet2DConditionModel"
        for base in type(model).__mro__
    )


def _model_type(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__)


def _refuse_mismatch(model: Any, own: dict[str, int], header: AttachedHeader, where: str) -> None:
    """Raises: AdapterMismatch unless the model is of the header's type and has its layers with as many heads."""
    made_for = header.model_class + (f" ({header.model_name})" if header.model_name else "")
    for name, heads in header.heads.items():
        if own.get(name) == heads and header.model_type == _model_type(model):
            continue
        there = f"this {type(model).__name__} has no such layer"
        if own.get(name) == heads:
            there = f"they are for models of type {header.model_type}, this {type(model).__name__} is another"
        elif name in own:
            there = f"this {type(model).__name__} has {own[name]} heads there"
        raise AdapterMismatch(
            f"{where} has {heads} x {heads} coefficients for {name}, but {there}. They were trained on a {made_for}: "
            "attach them to that."
        )


def _versions() -> dict[str, str]:
    found = {}
    for package in ("coeffdiff", "torch", "transformers", "diffusers", "peft"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
