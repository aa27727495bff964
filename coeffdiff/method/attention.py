"""mixed_attention: the definition, the backends, the choice between them. Pure functions of tensors.

Letters: B batch, H heads, Q query tokens, K key tokens, D head width; h output head, g source map.

    A[g]   = softmax(q[g] k[g]^T * scale + mask)          attention maps
    M[h]   = sum_g coeff[h, g] A[g]                       mixed maps, after the softmax
    out[h] = M[h] v[h]

Backward, with G[h] = dOut[h] v[h]^T:
    dv[h] = M[h]^T dOut[h]             dcoeff[h, g] = <G[h], A[g]>
    dA[g] = sum_h coeff[h, g] G[h]     dS[g] = A[g] * (dA[g] - rowsum(dA[g] * A[g]))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from coeffdiff.errors import ConfigError, ShapeError

# Maps of one chunk, in bytes: about what a core's second-level cache and its share of the third hold.
CHUNK_BYTES = 4 * 2**20
# On a GPU every chunk costs a dozen kernel launches: few large ones, as memory allows.
GPU_CHUNK_BYTES = 256 * 2**20


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
    Raises: ShapeError if the shapes do not fit; ConfigError for an unknown backend.
    Memory beyond the inputs: see BACKENDS.
    Source: Miao, Chen and Qiu 2025, arXiv 2503.18337.
    """
    _check_shapes(q, k, v, coeff)
    if backend == "auto":
        backend, _ = choose_backend(q, k)
    if backend not in BACKENDS:
        raise ConfigError(
            f"There is no attention backend {backend!r}; there are auto, {', '.join(BACKENDS)}."
        )
    if mask is not None:
        mask = _additive(mask, q, k)
    return BACKENDS[backend](q, k, v, coeff, mask, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)


def choose_backend(q: Tensor, k: Tensor) -> tuple[str, str]:
    """The backend for these inputs and the reason, for people: ("chunked", "CPU: ...")."""
    maps = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * 4
    return (
        "chunked",
        f"{q.device.type}: {maps / 2**20:.1f} MiB of maps are recomputed in chunks, never stored",
    )


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, coeff: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """The definition, term by term, with all maps stored and autograd's own backward."""
    with _no_autocast(q):
        # float32 throughout: bf16 holds no 1 + 0.0039, so a small alpha on the diagonal would vanish
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
        maps = (scores if mask is None else scores + mask).softmax(-1)
        mixed = torch.einsum("hg,bgqk->bhqk", coeff.to(wide), maps)
        return (mixed @ v.to(wide)).to(q.dtype)


def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, coeff: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Rows of queries whose maps fit in the cache; backward recomputes them from the stored log-sum-exp."""
    return torch.ops.coeffdiff.chunked_attention(q, k, v, coeff, mask, scale)[0]


# name -> (q, k, v, coeff, additive mask or None, scale) -> [B, H, Q, D]
#   reference   stores H x Q x K maps, several times over in training
#   chunked     stores one float per head and query; works anywhere
BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]] = {
    "reference": reference_attention,
    "chunked": chunked_attention,
}


@torch.library.custom_op("coeffdiff::chunked_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, coeff: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Q, D] in q's dtype, and the log-sum-exp of the scores [B, H, Q] that backward needs.

    A registered operator, so that torch.compile takes it as one node instead of unrolling the chunks.
    """
    with _no_autocast(q):
        wide = torch.promote_types(q.dtype, torch.float32)
        keys, values, c = k.to(wide).transpose(-1, -2), v.to(wide), coeff.detach().to(wide)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:-1], dtype=wide)
        for rows in _chunks(q, k):
            scores = _scores(q[:, :, rows].to(wide), keys, mask, rows, scale)
            lse[:, :, rows] = torch.logsumexp(scores, -1)
            maps = scores.sub_(lse[:, :, rows, None]).exp_()
            out[:, :, rows] = (_mix(c, maps) @ values).to(q.dtype)
        return out, lse


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, coeff: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:-1], dtype=wide)


@torch.library.custom_op("coeffdiff::chunked_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coeff: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and coeff, in their dtypes; each chunk's maps are computed anew."""
    with _no_autocast(q):
        wide = lse.dtype
        keys, values, c = k.to(wide), v.to(wide), coeff.detach().to(wide)
        contiguous = torch.contiguous_format  # as the fake below says, whatever the strides of the inputs
        dq = torch.empty_like(q, memory_format=contiguous)
        dk, dv, dcoeff = (torch.zeros_like(x, memory_format=contiguous) for x in (keys, values, c))
        for rows in _chunks(q, k):
            queries, d_out = q[:, :, rows].to(wide), grad[:, :, rows].to(wide)
            scores = _scores(queries, keys.transpose(-1, -2), mask, rows, scale)
            maps = scores.sub_(lse[:, :, rows, None]).exp_()
            dv += _mix(c, maps).transpose(-1, -2) @ d_out
            d_mixed = d_out @ values.transpose(-1, -2)
            dcoeff += torch.einsum("bhx,bgx->hg", d_mixed.flatten(2), maps.flatten(2))
            d_maps = _mix(c.T, d_mixed)
            inner = torch.linalg.vecdot(d_maps, maps)
            d_scores = d_maps.sub_(inner[..., None]).mul_(maps).mul_(scale)
            dq[:, :, rows] = (d_scores @ keys).to(q.dtype)
            dk += d_scores.transpose(-1, -2) @ queries
        return dq, dk.to(k.dtype), dv.to(v.dtype), dcoeff.to(coeff.dtype)


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coeff: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(q, memory_format=contiguous),
        torch.empty_like(k, memory_format=contiguous),
        torch.empty_like(v, memory_format=contiguous),
        torch.empty_like(coeff, memory_format=contiguous),
    )


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, coeff, mask, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, coeff, mask, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, coeff, mask, lse = ctx.saved_tensors
    if grad is None:
        return (None,) * 6
    return (
        *torch.ops.coeffdiff.chunked_attention_backward(grad, q, k, v, coeff, mask, lse, ctx.scale),
        None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_save)


def _chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Slices of query rows whose float32 maps, all heads and batch entries together, take about CHUNK_BYTES."""
    per_row = q.shape[0] * q.shape[1] * k.shape[2] * 4
    budget = CHUNK_BYTES if q.device.type == "cpu" else GPU_CHUNK_BYTES
    rows = max(1, min(q.shape[2], budget // max(per_row, 1)))
    for start in range(0, q.shape[2], rows):
        yield slice(start, min(start + rows, q.shape[2]))


def _scores(
    queries: Tensor, keys_transposed: Tensor, mask: Tensor | None, rows: slice, scale: float
) -> Tensor:
    scores = (queries * scale) @ keys_transposed
    if mask is not None:
        scores += mask if mask.shape[-2] == 1 else mask[..., rows, :]
    return scores


def _mix(coeff: Tensor, maps: Tensor) -> Tensor:
    """[H, H] x [B, H, q, K] -> [B, H, q, K]: one matrix product over the flattened maps.

    coeff must be detached: matmul would otherwise copy the maps to save memory in a backward that is not its own,
    half as slow again, and round differently with and without gradients.
    """
    return (coeff @ maps.flatten(2)).view_as(maps)


def _additive(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
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
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device == coeff.device):
        raise ShapeError("q, k and v must share dtype and device, and coeff their device.")
    heads = q.shape[1]
    if coeff.shape != (heads, heads):
        raise ShapeError(f"coeff must be {heads} x {heads} for {heads} heads, not {tuple(coeff.shape)}.")


def _no_autocast(like: Tensor) -> torch.autocast:
    # Autocast would turn the float32 products inside into bf16 ones, and lose what float32 is there for.
    return torch.autocast(like.device.type, enabled=False)
