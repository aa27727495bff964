"""mixed_attention: the definition, the backends, the choice between them. Pure functions of tensors.

Letters: B batch, H heads, Q query tokens, K key tokens, D head width; h output head, g source map.

    A[g]   = softmax(q[g] k[g]^T * scale + mask)          attention maps
    M[h]   = sum_g coeff[h, g] A[g]                       mixed maps, after the softmax
    out[h] = M[h] v[h]

mixed_values is the control for comparisons, ordinary attention over other values: out[h] = A[h] sum_g coeff[h, g] v[g].

Backward, with G[h] = dOut[h] v[h]^T:
    dv[h] = M[h]^T dOut[h]             dcoeff[h, g] = <G[h], A[g]>
    dA[g] = sum_h coeff[h, g] G[h]     dS[g] = A[g] * (dA[g] - rowsum(dA[g] * A[g]))
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from coeffdiff.errors import ConfigError, KernelsUnused, ShapeError
from coeffdiff.method import eager
from coeffdiff.method.numerics import exact_products, wide_dtype, without_autocast
from coeffdiff.method.operator import through_operator

_TRITON = importlib.util.find_spec("triton") is not None


# Triton's interpreter runs the kernels on a CPU: for tests, thousands of times too slow for anything else.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


_unimportable = ""  # the sentence, once the kernels could not be imported


def mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coeff: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention whose maps are recombined across heads before they meet the values.

    out[h] = (sum_g coeff[h, g] * softmax(q[g] k[g]^T * scale + mask)) v[h]; the identity gives ordinary
    attention. Rows of coeff may be negative and need not sum to one.

    Args:
        q: [B, H, Q, D].  k, v: [B, H, K, D], dtype and device of q.
        coeff: [H, H] float32 (float64 for float64 inputs); row = head that receives, column = map that is used.
        mask: broadcastable to [B, H, Q, K]; True = may be seen, or a float that is added. Every query must
            see at least one key. It gets no gradient.
        scale: factor of the scores; 1 / sqrt(D) by default.
        backend: a key of BACKENDS, or "auto" (see choose_backend).
    Returns: [B, H, Q, D] in q's dtype; softmax and mixing run in float32, or float64 for float64 inputs.
    Raises: ShapeError if the shapes do not fit; ConfigError for a backend that is unknown or cannot do it.
    Memory beyond the inputs: see BACKENDS.
    Source: Miao, Chen and Qiu 2025, arXiv 2503.18337.
    """
    _check_shapes(q, k, v, coeff)
    if mask is not None:
        mask = _additive(mask, q, k)
    chosen = backend == "auto"
    if chosen:
        backend, _ = _choice(q, k, mask)
    if reason := unusable(backend, q, k, mask):
        raise ConfigError(reason)
    function = _VERIFIED if chosen and backend == "fused" else BACKENDS[backend]
    return function(q, k, v, coeff, mask, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)


def mixed_values(v: Tensor, coeff: Tensor) -> Tensor:
    """Values recombined across heads, mixed[h] = sum_g coeff[h, g] v[g], which ordinary attention then meets.

    Unlike mixed maps they leave no head a way out of the convex hull of the values that it meets, and W_v could hold
    them: sum_g coeff[h, g] W_v[g].

    Args:
        v: [B, H, K, D].
        coeff: [H, H] float32 (float64 for float64 values); row = head that receives, column = values that are used.
    Returns: [B, H, K, D] in v's dtype; the sum runs in float32, or float64 for float64 values.
    Raises: ShapeError if coeff is not H x H on v's device.
    """
    _check_coeff(coeff, v)
    with without_autocast(v):
        wide = v.to(wide_dtype(v))
        # v itself stays out of the product: in TF32 a small alpha on the diagonal of I + alpha would be lost
        added = coeff.to(wide.dtype) - torch.eye(len(coeff), dtype=wide.dtype, device=wide.device)
        return (wide + torch.einsum("hg,bgkd->bhkd", added, wide)).to(v.dtype)


def choose_backend(q: Tensor, k: Tensor, mask: Tensor | None = None) -> tuple[str, str]:
    """The backend for these inputs and the reason, for people: ("chunked", "cpu: ...").

    The fused kernels are compared with the chunks before inputs of some shape first meet them (verified.py), so that a
    GPU on which they are wrong, or do not compile, gets the chunks and a warning after all.
    """
    backend, why = _choice(q, k, mask)
    maps = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * 4
    fate = "stored" if backend == "eager" else "recomputed, never stored"
    return backend, f"{q.device.type}: {maps / 2**20:.1f} MiB of maps are {fate}; {why}"


def _choice(q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[str, str]:
    # Apart from the sentence: torch.compile traces this, and cannot print sizes that it keeps symbolic
    if q.device.type in ("cpu", "meta") and eager.is_faster(q, k):  # meta: what a dry run predicts
        return "eager", "small enough for few calls to be faster than chunks"
    if q.device.type != "cuda":
        return "chunked", "in chunks that fit the cache"
    if reason := unusable("fused", q, k, mask):
        return "chunked", reason
    return "fused", "in fused kernels, if they agree with the chunks at first use"


def unusable(backend: str, q: Tensor, k: Tensor, mask: Tensor | None = None) -> str:
    """Why a backend cannot take these inputs, as a sentence; empty if it can."""
    if backend not in BACKENDS:
        return f"There is no attention backend {backend!r}; there are auto, {', '.join(BACKENDS)}."
    if backend != "fused":
        return ""
    if not _TRITON:
        return "The fused backend needs Triton, which is not installed."
    if q.device.type != "cuda" and not (q.device.type == "cpu" and _INTERPRETED):
        return f"The fused backend runs on CUDA GPUs, not on {q.device.type}."
    if _unimportable:
        return _unimportable
    try:
        from coeffdiff.method.triton_kernels import unsupported
    except Exception as error:  # of any kind: Triton may not fit Python, compiler, driver or torch
        return _remember(error)
    reason = unsupported(q, k, mask)
    return reason and f"The fused backend cannot take this: {reason}."


def _remember(error: Exception) -> str:
    """Why the kernels could not be imported: said once, and never tried again, since a failing import is slow."""
    global _unimportable
    first = (str(error).strip().splitlines() or [""])[0]
    _unimportable = (
        f"The fused backend needs Triton, whose import failed with {type(error).__name__}: {first[:200]}."
    )
    warnings.warn(f"Slower chunks do the attention. {_unimportable}", KernelsUnused, stacklevel=1)
    return _unimportable


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, coeff: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """The definition, term by term, with all maps stored and autograd's own backward."""
    with exact_products(q):
        # float32 throughout: bf16 holds no 1 + 0.0039, so a small alpha on the diagonal would vanish
        wide = wide_dtype(q)
        scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
        maps = (scores if mask is None else scores + mask).softmax(-1)
        mixed = torch.einsum("hg,bgqk->bhqk", coeff.to(wide), maps)
        return (mixed @ v.to(wide)).to(q.dtype)


# name -> (q, k, v, coeff, additive mask or None, scale) -> [B, H, Q, D]
#   reference   stores H x Q x K maps, several times over in training
#   eager       stores the maps before and after mixing, in few calls: for small layers
#   chunked     rows of queries whose maps fit in the cache; works anywhere
#   fused       a Triton kernel; stores one float per head and query; CUDA GPUs
BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]] = {
    "reference": reference_attention,
    "eager": eager.eager_attention,
    "chunked": functools.partial(through_operator, "chunked"),
    "fused": functools.partial(through_operator, "fused"),
}


# What "auto" makes of the fused kernels; see verified.py
_VERIFIED = functools.partial(through_operator, "checked")


def _additive(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    wide = wide_dtype(q)
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if mask.dim() > 4 or any(
        m not in (1, s) for m, s in zip(reversed(mask.shape), reversed(shape), strict=False)
    ):
        raise ShapeError(f"A mask of shape {tuple(mask.shape)} does not broadcast to {shape} = [B, H, Q, K].")
    mask = mask.detach().reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=wide).masked_fill_(~mask, -math.inf)
    return mask.to(wide)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, coeff: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if (
        q.dim() != 4
        or k.dim() != 4
        or k.shape != v.shape
        or q.shape[:2] != k.shape[:2]
        or q.shape[3] != k.shape[3]
    ):
        raise ShapeError(f"Expected q [B, H, Q, D] and k, v [B, H, K, D]; got {shapes}.")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ShapeError("q, k and v must share dtype and device.")
    _check_coeff(coeff, v)


def _check_coeff(coeff: Tensor, v: Tensor) -> None:
    heads = v.shape[1]
    if coeff.shape != (heads, heads):
        raise ShapeError(f"coeff must be {heads} x {heads} for {heads} heads, not {tuple(coeff.shape)}.")
    if coeff.device != v.device:
        raise ShapeError(f"coeff must be on the device of the values, {v.device}, not on {coeff.device}.")
