"""A VAE in the precision that it needs: SDXL's gives NaN in float16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def in_its_precision(vae: Any) -> Iterator[Any]:
    """The VAE, inside in float32 if it needs that. An offloaded one, without weights here, stays as it is."""
    upcast = needs_upcast(vae) and not next(vae.parameters()).is_meta
    try:
        if upcast:
            cast_to(vae, torch.float32)
        yield vae
    finally:
        if upcast:
            cast_to(vae, torch.float16)


@contextmanager
def kept_precision(vae: Any) -> Iterator[None]:
    """Inside, the VAE may move, but not change its dtype, and encodes pictures of any dtype to latents of theirs.

    diffusers' SDXL pipelines for images leave a VAE that needs float32 in the UNet's half precision, to decode with it;
    those of Stable Diffusion give it pictures in that precision.
    """

    def move(*args: Any, **kwargs: Any) -> Any:
        where = [a for a in args if not isinstance(a, torch.dtype)]
        kwargs.pop("dtype", None)
        return type(vae).to(vae, *where, **kwargs) if where or kwargs else vae

    def encode(pixels: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        encoded = type(vae).encode(vae, pixels.to(vae.dtype), *args, **kwargs)
        if pixels.dtype != vae.dtype:
            parameters = encoded.latent_dist.parameters.to(pixels.dtype)
            encoded.latent_dist = type(encoded.latent_dist)(parameters)
        return encoded

    with in_its_precision(vae):
        vae.to, vae.encode = move, encode
        try:
            yield
        finally:
            del vae.to, vae.encode


def needs_upcast(vae: Any) -> bool:
    """Whether the VAE is in float16 and its config demands float32."""
    return vae.dtype == torch.float16 and bool(vae.config.get("force_upcast"))


def cast_to(vae: Any, dtype: torch.dtype) -> None:
    torch.nn.Module.to(vae, dtype)  # diffusers' own method warns about every cast
