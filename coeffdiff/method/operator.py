"""One operator for the backends that are not made of torch's own, so that torch.compile takes it as one node."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from coeffdiff.method import chunked
from coeffdiff.method.numerics import exact_products, wide_dtype


def through_operator(
    backend: str, q: Tensor, k: Tensor, v: Tensor, coeff: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    return torch.ops.coeffdiff.mixed_attention(q, k, v, coeff, mask, scale, backend)[0]


@torch.library.custom_op("coeffdiff::mixed_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, coeff: Tensor, mask: Tensor | None, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Q, D] in q's dtype, and what the backend keeps for its backward."""
    with exact_products(q):
        wide = coeff.detach().to(wide_dtype(q))
        out, kept = _implementation(backend).forward(q, k, v, wide, mask, scale)
    return out, kept


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, coeff: Tensor, mask: Tensor | None, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(q)
    kept = (0,) if backend == "chunked" else q.shape[:-1]
    return _laid_out(q, backend), q.new_empty(kept, dtype=wide)


@torch.library.custom_op("coeffdiff::mixed_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coeff: Tensor,
    mask: Tensor | None,
    kept: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and coeff, in their dtypes; the maps are computed anew."""
    with exact_products(q):
        dq, dk, dv, dcoeff = _implementation(backend).backward(
            grad, q, k, v, coeff.detach().to(wide_dtype(q)), mask, kept, scale
        )
    return dq, dk, dv, dcoeff.to(coeff.dtype)


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coeff: Tensor,
    mask: Tensor | None,
    kept: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dcoeff = torch.empty_like(coeff, memory_format=torch.contiguous_format)
    return _laid_out(q, backend), _laid_out(k, backend), _laid_out(v, backend), dcoeff


def _laid_out(like: Tensor, backend: str) -> Tensor:
    """Empty, of the strides that a backend gives its results: chunks, heads side by side; kernels, contiguous."""
    if backend == "chunked":
        return chunked.heads_beside(like)
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, coeff, mask, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, coeff, mask, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _grad_kept):  # type: ignore[no-untyped-def]
    q, k, v, coeff, mask, kept = ctx.saved_tensors
    if grad is None:
        return (None,) * 7
    backward = torch.ops.coeffdiff.mixed_attention_backward
    return (*backward(grad, q, k, v, coeff, mask, kept, ctx.scale, ctx.backend), None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


def _implementation(backend: str) -> Any:
    """The module whose forward and backward a backend is; those that import Triton are imported here."""
    if backend == "chunked":
        return chunked
    modules = {"fused": "triton_kernels", "checked": "verified"}
    return importlib.import_module(f"coeffdiff.method.{modules[backend]}")
