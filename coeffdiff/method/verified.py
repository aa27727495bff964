"""The fused kernels where verified against the chunks before use, chunks elsewhere: what "auto" is on a GPU.

Cards, drivers and compilers differ, and a kernel that is wrong on one of them would spoil an adapter without a word.
So before the kernels first meet inputs of some shape and type, their results are compared with those of the chunks
on random tensors like these. Where they differ, or do not compile, the chunks do the work, and a warning says so, once
for each. What the comparison costs on a GPU has not been measured.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from coeffdiff.errors import KernelsUnused
from coeffdiff.method import chunked, triton_kernels

# Of the largest number in a result: some four times the rounding of the type, which the kernels' second products see
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_ROOM = 32 * 2**20  # of a chunk in the comparison, which must not be what decides a training's memory
_verdicts: dict[tuple[object, ...], bool] = {}


def forward(
    q: Tensor, k: Tensor, v: Tensor, coeff: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """As triton_kernels.forward; where the chunks step in, the second tensor is not initialised and nobody reads it."""
    if _trusted("forward", q, k, v, mask):
        return triton_kernels.forward(q, k, v, coeff, mask, scale)
    out, _ = chunked.forward(q, k, v, coeff, mask, scale)
    return out.contiguous(), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coeff: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As triton_kernels.backward; lse as forward gave it."""
    trusted = _trusted("forward", q, k, v, mask) and _trusted("backward", q, k, v, mask)
    if trusted:
        return triton_kernels.backward(grad, q, k, v, coeff, mask, lse, scale)
    # Contiguous, as the compiler was told, whichever of the two does the work
    dq, dk, dv, dcoeff = chunked.backward(grad, q, k, v, coeff, mask, _no_maps(q), scale)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dcoeff


def _trusted(way: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    like = [None if one is None else (one.shape, one.stride()) for one in (q, k, v, mask)]
    key = (way, q.device, q.dtype, *like)
    if key not in _verdicts:
        why = _difference(way, q, k, v, mask)
        _verdicts[key] = not why
        if why:
            shape = f"{q.shape[1]} heads, {q.shape[2]} x {k.shape[2]} tokens, {q.dtype}"
            warnings.warn(
                f"The fused attention kernels are not used here ({way}, {shape}), slower chunks are: {why}.",
                KernelsUnused,
                stacklevel=1,
            )
    return _verdicts[key]


@torch.no_grad()
def _difference(way: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """What is wrong with the kernels for inputs like these, in plain words; empty if nothing is."""
    generator = torch.Generator(q.device).manual_seed(0)  # its own: nothing else may draw other numbers
    q, k, v, grad = (_room_like(one).normal_(generator=generator) for one in (q, k, v, q))
    heads = q.shape[1]
    coeff = torch.empty(heads, heads, device=q.device).normal_(0, 0.1, generator=generator)
    coeff.diagonal().add_(1)
    scale = q.shape[-1] ** -0.5
    try:
        out, lse = triton_kernels.forward(q, k, v, coeff, mask, scale)
        if way == "forward":
            got: tuple[Tensor, ...] = (out,)
            expected: tuple[Tensor, ...] = chunked.forward(q, k, v, coeff, mask, scale, room=_ROOM)[:1]
        else:
            got = triton_kernels.backward(grad, q, k, v, coeff, mask, lse, scale)
            expected = chunked.backward(grad, q, k, v, coeff, mask, _no_maps(q), scale, room=_ROOM)
        if q.is_cuda:
            torch.cuda.synchronize(q.device)  # what failed on the GPU fails here
    except torch.OutOfMemoryError:  # which the chunks would not cure
        raise
    except Exception as error:  # a compiler's errors are of its own kinds
        first = (str(error).strip().splitlines() or [""])[0]
        return f"they failed with {type(error).__name__}: {first[:200]}"
    names = ("out",) if way == "forward" else ("dq", "dk", "dv", "dcoeff")
    for name, one, other in zip(names, got, expected, strict=True):
        off = float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp(min=1e-6))
        if not off <= TOLERANCE[q.dtype]:  # NaN is no smaller than anything
            return f"their {name} differs by {off:.1e} of its largest number"
    return ""


def _no_maps(q: Tensor) -> Tensor:
    """What tells the chunks that forward has kept no maps; the kernels' log-sum-exp would be taken for some."""
    return q.new_empty(0)


def _room_like(one: Tensor) -> Tensor:
    """Of the same shape, type and strides, where those do not lay numbers on each other."""
    strides = one.stride() if all(one.stride()) else torch.empty(one.shape, device="meta").stride()
    return torch.empty_strided(one.shape, strides, dtype=one.dtype, device=one.device)
