"""What an adapter has on the text encoders of a pipeline: put there, checked, guarded, taken off.

Encoders are named as the pipeline names them: {"text_encoder": ..., "text_encoder_2": ...}.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coeffdiff.errors import AdapterError, AdapterMismatch
from coeffdiff.hosts import clip_alpha
from coeffdiff.hosts.guard import gate, parts_of, ungate, unwrapped
from coeffdiff.hosts.lora.clip import clip_lora_tensors, load_clip_lora
from coeffdiff.hosts.lora.layers import remove_lora
from coeffdiff.hosts.token.learned_token import ExtendedEmbedding
from coeffdiff.method.adapter_file import alphas_of
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.method.adapter_paths import LORA_FILE
from coeffdiff.method.coefficients import Coefficients
from coeffdiff.method.networks import TEXT_ENCODERS, of_network

Encoders = Mapping[str, nn.Module]


def encoders_on(pipe: Any) -> dict[str, Any]:
    """The text encoders that a pipeline has, outside of torch.compile's wrappers."""
    found = {name: getattr(pipe, name, None) for name in TEXT_ENCODERS}
    return {name: unwrapped(encoder) for name, encoder in found.items() if encoder is not None}


def encoders_for(pipe: Any, header: AdapterHeader, folder: Path) -> dict[str, Any]:
    """The encoders that an adapter is for. Raises: AdapterError if the pipeline lacks one, AdapterMismatch."""
    there = encoders_on(pipe)
    if missing := [name for name in header.encoders if name not in there]:
        raise AdapterError(
            f"{folder} was trained on the text encoders too, and this pipeline has no {missing[0]}; load the adapter "
            "on a whole pipeline."
        )
    check_encoders(there, header, folder)
    return {name: there[name] for name in header.encoders}


def check_encoders(encoders: Mapping[str, Any], header: AdapterHeader, folder: Path) -> None:
    """Raises: AdapterMismatch unless encoders, with weights or without, have the header's layers and heads."""
    for network in header.encoders:
        own = clip_alpha.heads_of(encoders[network])
        for layer, heads in of_network(header.heads, network).items():
            if own.get(layer) != heads:
                there = f"{own[layer]} heads there" if layer in own else "no such layer"
                raise AdapterMismatch(
                    f"{folder} has {heads} x {heads} coefficients for {network}.{layer}, but this model has {there}. "
                    f"The adapter was trained on {header.base_model}; use that, or a fine-tune of it, as the model."
                )


def put_on(
    encoders: Encoders,
    name: str,
    header: AdapterHeader,
    alphas: Mapping[str, Tensor],
    lora: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """An adapter's alpha and LoRA onto its encoders. alphas, lora: all that the adapter's files hold.

    Raises: AdapterError, InjectionError; take_off then undoes what is there.
    """
    for network, encoder in encoders.items():
        own = of_network(alphas, network)
        if own:
            layers = clip_alpha.inject(
                encoder,
                name,
                network=network,
                layers=[key.removesuffix(".alpha") for key in own],
                form=header.form,
                mixes=header.mixes,
            )
            _fill(layers, own)
        if header.lora and network in header.lora.encoders:
            load_clip_lora(
                encoder,
                of_network(lora, network),
                name,
                rank=header.lora.rank,
                alpha=header.lora.alpha,
                dora=header.lora.dora,
                origin=str(folder / LORA_FILE),
            )
        settle_saving(encoder)


def take_off(encoders: Encoders, name: str) -> None:
    """An adapter's alpha and LoRA off its encoders, which are then as before. Raises: as remove_lora."""
    for encoder in encoders.values():
        clip_alpha.eject(encoder, name)
        remove_lora(encoder, name)
        settle_saving(encoder)


def settle_saving(encoder: Any) -> None:
    """Refuse save_pretrained of an encoder while anything of ours is on it."""
    if parts_of(encoder):
        gate(encoder, "save_pretrained", _refuse_saving)
    elif not isinstance(encoder.get_input_embeddings(), ExtendedEmbedding):
        ungate(encoder, "save_pretrained")


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise AdapterError(
        "save_pretrained would write the adapter on this text encoder as weights that no model reads back. remove() "
        "the adapter, save, and keep its folder beside the model."
    )


def coefficients_on(encoders: Encoders, name: str = "default") -> dict[str, Coefficients]:
    """The alphas called `name` by their layers' names in files: text_encoder.text_model.encoder.layers.0.self_attn."""
    return {
        f"{network}.{layer}": coefficients
        for network, encoder in encoders.items()
        for layer, coefficients in clip_alpha.coefficients_of(encoder, name).items()
    }


def tensors_on(
    encoders: Encoders, header: AdapterHeader, name: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What an adapter's files hold of its encoders: alphas of a COEFF_FILE, LoRA of a LORA_FILE in PEFT's names."""
    lora = {
        f"{network}.{key}": tensor
        for network in (header.lora.encoders if header.lora else ())
        for key, tensor in clip_lora_tensors(encoders[network], name).items()
    }
    return alphas_of(coefficients_on(encoders, name)), lora


class EncodersPart:
    """What an adapter has on text encoders, for the guard on the UNet: whether its pipeline still reads with them."""

    on = False  # the parts on the encoders have a scale, and guards of their own

    def __init__(self, pipe: Any, encoders: Mapping[str, Any], label: str) -> None:
        self.pipe: Any = weakref.ref(pipe) if hasattr(pipe, "__weakref__") else None
        self.encoders, self.label = dict(encoders), label

    def problem(self) -> str:
        if torch.compiler.is_compiling():  # a pipeline's call has looked already
            return ""
        if swapped := self.swapped():
            return swapped
        problems = (part.problem() for one in self.encoders.values() for part in parts_of(one).values())
        return next(filter(None, problems), "")

    def swapped(self) -> str:
        """The part of problem() that no scale of the adapter can mend."""
        swapped = swapped_encoder(self.pipe and self.pipe(), self.encoders)
        if not swapped:
            return ""
        return (
            f"{self.label} is on the text encoders too, and this pipeline's {swapped} has been replaced since. Put "
            "the other back, or load the adapter again."
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"pipe": None}  # a copy's pipeline is not this one


def swapped_encoder(pipe: Any, encoders: Mapping[str, Any]) -> str:
    """The first of the names under which a pipeline has another encoder; one that is gone has done its work."""
    there = encoders_on(pipe)
    return next((name for name, own in encoders.items() if name in there and there[name] is not own), "")


@torch.no_grad()
def _fill(layers: Mapping[str, Coefficients], alphas: Mapping[str, Tensor]) -> None:
    for layer, coefficients in layers.items():
        coefficients.alpha.copy_(alphas[f"{layer}.alpha"])
        coefficients.requires_grad_(False)
