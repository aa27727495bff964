"""An adapter on a pipeline: its scale, verification and removal. diffusers.py loads it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coeffdiff.errors import AdapterError, InjectionError
from coeffdiff.hosts.guard import parts_of, unwatch, unwrapped, verify
from coeffdiff.hosts.lora.guard import check_removable, check_settable
from coeffdiff.hosts.lora.layers import remove_lora, set_lora_scale
from coeffdiff.hosts.pipeline_guard import leave, verify_home
from coeffdiff.hosts.text_encoders import EncodersPart, settle_saving, swapped_encoder, take_off
from coeffdiff.hosts.token.learned_token import (
    encoders_with,
    remove_token,
    switch_token,
    token_name,
    verify_token,
)
from coeffdiff.hosts.unet import check_alpha, eject, set_scale
from coeffdiff.method.adapter_header import AdapterHeader


class Adapter:
    """An adapter that has been applied to a pipeline: switch it with set_scale, take it off with remove."""

    def __init__(
        self,
        pipe: Any,
        name: str,
        path: Path,
        header: AdapterHeader,
        encoders: Mapping[str, Any] | None = None,
    ) -> None:
        """encoders: the text encoders that it is on, by the pipeline's names for them."""
        self.header, self.path, self.name = header, path, name
        self._scale = 1.0
        self._encoders = dict(encoders or {})
        self._unet = unwrapped(pipe.unet)
        self._home: Any = weakref.ref(pipe) if hasattr(pipe, "__weakref__") else None
        # A token lives on the pipeline; without one, a copy of the UNet need not copy it
        self._pipe = pipe if header.vectors else None

    @property
    def token_names(self) -> list[str]:
        """Names under which its learned tokens are on the pipeline, one for each subject; none without any."""
        return (
            [token_name(self.name, n) for n in range(len(self.header.named))] if self.header.vectors else []
        )

    @property
    def scale(self) -> float:
        """As set_scale set it. Raises: InjectionError if something else has changed a part of the adapter since."""
        if self._present():
            self.verify()
        return self._scale

    def set_scale(self, scale: float) -> None:
        """Use I + scale * alpha and scale * LoRA, on the text encoders too where it has any.

        0 gives the base model bit for bit (if nothing else is loaded).

        A learned token has no scale: it is read as it was learned, at 0 as the ordinary word that it was before.
        A LoRA that something else has switched off or rescaled is then on again, beside those that are.
        Raises: InjectionError if a part is gone, or the LoRA is fused into the weights. Nothing has changed then.
        """
        if not math.isfinite(scale):
            raise AdapterError(f"The scale of {self.path} must be a finite number, not {scale}.")
        self._check_loaded()
        self._check_settable(scale)
        for network in self._networks:
            set_scale(network, scale, self.name)
            if self.header.lora:
                set_lora_scale(network, self.name, scale)
        for name in self.token_names:
            switch_token(self._pipe, name, on=scale != 0)
        self._scale = scale

    def remove(self) -> None:
        """Take alpha, LoRA and token off; UNet, text encoders and pipeline have their original parts again.

        Raises: InjectionError if the LoRA is fused into the weights. Nothing has changed then.
        """
        self._check_loaded()
        if self.header.lora:
            for network in self._networks:
                check_removable(network, self.name)
        take_off(self._encoders, self.name)
        unwatch(self._unet, f"encoders {self.name}")
        eject(self._unet, self.name)
        if self.header.lora:
            remove_lora(self._unet, self.name)
        for name in self.token_names:
            unwatch(self._unet, f"token {name}")
            read = encoders_with(self._pipe, name)
            remove_token(self._pipe, name)
            for encoder in read:  # another adapter may still be on it
                settle_saving(encoder)
        del adapters_on(self._unet)[self.name]
        if not adapters_on(self._unet):
            leave(self._home and self._home(), self._unet)

    def verify(self) -> None:
        """Raises: InjectionError if a part is no longer what set_scale made it.

        Displaced alpha (attention slicing, an IP-Adapter...), LoRA that is off, rescaled or unloaded, a token that the
        pipeline would not read. The same is compared before each forward of the UNet.
        """
        self._check_loaded()
        verify(self._unet)

    def verify_text(self, pipe: Any) -> None:
        """Raises: InjectionError if this pipeline, which is to encode prompts, would not read with this adapter: the
        learned tokens, and the text encoders that it is on."""
        for name in self.token_names if self._scale else ():
            verify_token(pipe, name)
        if swapped := swapped_encoder(pipe, self._encoders):
            raise InjectionError(
                f"{self.path} is on the text encoders too, and the {swapped} of this pipeline is not the one that it "
                "was loaded on; load the adapter on the pipeline that encodes the prompts."
            )

    def _check_settable(self, scale: float) -> None:
        """Asks every part. Raises: InjectionError if one cannot get this scale."""
        verify_home(self._home and self._home(), self._unet)
        for network in self._networks:
            check_alpha(network, self.name)
            if self.header.lora:
                check_settable(network, self.name, scale)
        parts = parts_of(self._unet)
        own = (f"encoders {self.name}", *(f"token {name}" for name in self.token_names))
        for part in [parts[key] for key in own if key in parts]:
            problem = part.swapped() if isinstance(part, EncodersPart) else part.problem()
            if problem:
                raise InjectionError(problem)

    @property
    def _networks(self) -> list[Any]:
        return [self._unet, *self._encoders.values()]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_home": None}  # a copy's pipeline is not this one

    def _present(self) -> bool:
        return adapters_on(self._unet).get(self.name) is self

    def _check_loaded(self) -> None:
        if not self._present():
            raise AdapterError(f"{self.path} has been removed from this pipeline; load it again.")


def adapters_on(unet: Any) -> dict[str, Adapter]:
    """The adapters on an unwrapped UNet by name: the registry itself, empty at first."""
    if not hasattr(unet, "_coeffdiff_adapters"):
        unet._coeffdiff_adapters = {}
    registry: dict[str, Adapter] = unet._coeffdiff_adapters
    return registry
