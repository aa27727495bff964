"""The fused GPU backend of mixed_attention: Triton kernels and the code that launches them. No autograd.

The plan. Mixing needs all H maps of a (query tile, key tile) at one time, and flash attention's registers hold the
accumulator of one head. So a program owns J of the H heads that receive: it walks along the other side, computes the
maps of all H heads one after the other, adds each into its J mixed tiles, and multiplies those with its J values. The
mixing runs in float32 on the ordinary cores, H * H multiply-adds per (query, key), so the coefficients are exact and
10 heads are not padded to 16. Scores are computed anew in every kernel; nothing of size Q x K is stored.

    _lse_kernel         log-sum-exp per query; left out where all keys fit in one tile (the 77 of a prompt)
    _mix_kernel         out = M v; with queries and keys exchanged, dv = M^T dOut
    _delta_kernel       rowsum(dA * A) per query and dcoeff, from <G[h], A[g]> per row of all pairs of heads
    _score_grad_kernel  dq = scale * dS k; exchanged, dk = scale * dS^T q

Arithmetic, with n = H / J and one product of D-wide tiles over all heads as the unit (flash attention: 2 forward,
5 backward): forward 1 + n + 1, backward 4 n + 6. H = 10, J = 5: 4 and 14. H = 20, J = 5: 6 and 22. Exponentials:
1 + n forward, 3 + n backward, against flash's 1 and 1. Mixing: H^2 forward and 4 H^2 backward float32 multiply-adds.
Traffic from the L2 cache: (1 / BLOCK_R + 1 / BLOCK_C) * 2 * D bytes (16 bits) for each unit above that is a score.
Memory: the outputs, two float32 per head and query, [H, H] per query tile, and for short sides such as 77 keys at
most about 10 MiB of float32 sums that several programs share.

What was seen. It has NOT run on a GPU yet: no speed is known, and the tiles below are reasoned, not measured. Triton's
interpreter (3.9) agrees with the definition in float64. Compiled by Triton 3.6 and 3.9 for sm_80 and sm_90 in float32,
float16 and bfloat16 at 4096 x 10 and 1024 x 20 heads, 77 keys, D = 64 and 128: at most 72 KiB of shared memory. On
sm_90 at D = 64 in 16 bits the kernels that mix use 178 to 255 registers and spill 0 to 56 bytes (with a mask up to 96,
and 240 in the delta kernel). sm_80 spills up to 288 bytes in forward and dv at 64 x 64, float32 up to 296 (77 keys,
D = 128).

What did not help, by the compiler's report.
- Query tiles of all heads loaded once into shared memory, heads unrolled: 400 to 1,800 bytes of spills, and both
  warp groups compute the same scores. A cache modifier .ca, to keep them in L1: cp.async.cg is emitted all the same.
- The number of heads as a constant of the loops: LLVM unrolls them fivefold, 50 more registers. Hence `heads` beside
  HEADS.
- 64 rows with 8 warps in dq and dk: in a product whose result feeds another one Triton puts all warps along the rows,
  and the second warp group repeats the first. 32 rows take mma.sync instead and split the columns. 4 warps: spills.
- All 10 heads in one program (J = 10, 32 x 32): no repeated scores, and hardly any spills; smaller tiles load more.

Thought of, not tried: mixing as a tensor-core product (two passes through shared memory per map, and 20 heads padded
to 32: about as slow as the ordinary cores on paper); dq and delta in one pass (cancels in 16 bits).
"""
# ruff: noqa: N803, RUF005 (constants of kernels are upper case; Triton knows no starred tuples)
# mypy: disable-error-code="no-untyped-def,import-not-found,import-untyped,assignment,misc"

from __future__ import annotations

import contextlib
import math
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_HEADS = 32
MAX_WIDTH = 128
MAX_BATCH = 65535  # of a CUDA grid's third dimension
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
# TRITON_INTERPRET=1 at the first import of triton: kernels run on the CPU, slowly
_knobs = getattr(triton, "knobs", None)  # Triton up to 3.3 has none, and reads the variable alone
INTERPRETED = tl.constexpr(_knobs.runtime.interpret if _knobs else os.environ.get("TRITON_INTERPRET") == "1")

# Kernels. "Rows" is the side that a program keeps, "columns" the side that it walks along: queries and keys, or
# keys and queries where ROWS_ARE_KEYS. A program owns JOINT heads (first, first + 1, ...); where JOINT does not
# divide the heads, the last program computes the last head more than once, and stores the same values again.


@triton.jit
def _tile(
    base, stride, stride_d, start, limit,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """[BLOCK, PADDED] of one head's [limit, WIDTH]; zeros outside."""
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, PADDED)
    # 64 bits where a tile starts, since tokens * stride may pass 2^31; inside a tile 32 will do
    pointers = base + tl.cast(start, tl.int64) * stride + (n[:, None] * stride + d[None, :] * stride_d)
    if EVEN and WIDTH == PADDED:
        return tl.load(pointers)
    return tl.load(pointers, mask=(start + n < limit)[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def _store(base, tile, start, limit, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Into one head's contiguous [limit, WIDTH]."""
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, PADDED)
    pointers = base + tl.cast(start, tl.int64) * WIDTH + (n[:, None] * WIDTH + d[None, :])
    inside = (start + n < limit)[:, None] & (d < WIDTH)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """float32 a @ b."""
    if INTERPRETED:  # its product of bfloat16 multiplies their bits as integers (seen in triton 3.9)
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _scores(
    x, y, mask, mask_r, mask_c, row, col, rows, cols, scale,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS_ARE_KEYS: tl.constexpr, EVEN_KEYS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_R, BLOCK_C] in units of log 2, so that exp2 of them is exp of the scores."""
    scores = _dot(x, tl.trans(y), PRECISION) * (scale * LOG2E)
    r = row + tl.arange(0, BLOCK_R)
    c = col + tl.arange(0, BLOCK_C)
    if MASKED:
        where = mask + tl.cast(r, tl.int64)[:, None] * mask_r + tl.cast(c, tl.int64)[None, :] * mask_c
        scores += tl.load(where, mask=(r < rows)[:, None] & (c < cols)[None, :], other=0.0) * LOG2E
    if not EVEN_KEYS:  # a key past the end would score 0, and exp(0 - lse) may be infinite
        known = (r < rows)[:, None] if ROWS_ARE_KEYS else (c < cols)[None, :]
        scores = tl.where(known, scores, float("-inf"))
    return scores


@triton.jit
def _lse_kernel(
    q, k, mask, lse,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, mask_b, mask_h, mask_r, mask_c,
    rows, cols, heads, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, EVEN_R: tl.constexpr, EVEN_C: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lse[h] of BLOCK_R queries: flash attention's first half, without values."""
    row = tl.program_id(0) * BLOCK_R
    head = tl.cast(tl.program_id(1), tl.int64)
    batch = tl.cast(tl.program_id(2), tl.int64)
    q += batch * q_b + head * q_h
    k += batch * k_b + head * k_h
    if MASKED:
        mask += batch * mask_b + head * mask_h
    x = _tile(q, q_n, q_d, row, rows, BLOCK_R, WIDTH, PADDED, EVEN_R)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for col in range(0, cols, BLOCK_C):
        y = _tile(k, k_n, k_d, col, cols, BLOCK_C, WIDTH, PADDED, EVEN_C)
        scores = _scores(
            x, y, mask, mask_r, mask_c, row, col, rows, cols, scale,
            BLOCK_R, BLOCK_C, False, EVEN_C, MASKED, PRECISION,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(scores, 1))
        # a row may start with a tile that its mask hides whole: exp2(-inf - -inf) would be NaN
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        top = new
    r = row + tl.arange(0, BLOCK_R)
    lse += (batch * HEADS + head) * rows
    tl.store(lse + r, top * LN2 + tl.log(total), mask=r < rows)


@triton.jit
def _mix_kernel(
    x, y, z, coeff, mask, lse, out,
    x_b, x_h, x_n, x_d, y_b, y_h, y_n, y_d, z_b, z_h, z_n, z_d,
    coeff_h, coeff_g, mask_b, mask_h, mask_r, mask_c,
    rows, cols, heads, span, scale,
    HEADS: tl.constexpr, JOINT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, EVEN_R: tl.constexpr, EVEN_C: tl.constexpr,
    ROWS_ARE_KEYS: tl.constexpr, ONE_TILE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M[h] z[h], M[h] = sum_g coeff[h, g] A[g]: out with z = v, or dv with z = dOut and rows that are keys.

    ONE_TILE: all keys fit in one tile, which gives the log-sum-exp as well; otherwise lse is an input.
    """
    tiles = tl.cdiv(rows, BLOCK_R)
    row = tl.program_id(0) % tiles * BLOCK_R
    split = tl.program_id(0) // tiles
    first = tl.program_id(1) * JOINT
    batch = tl.cast(tl.program_id(2), tl.int64)
    x += batch * x_b
    y += batch * y_b
    z += batch * z_b
    if MASKED:
        mask += batch * mask_b
    lse += batch * HEADS * tl.cast(cols if ROWS_ARE_KEYS else rows, tl.int64)
    out += (split * tl.num_programs(2) + batch) * HEADS * tl.cast(rows, tl.int64) * WIDTH
    r = row + tl.arange(0, BLOCK_R)
    sums = ()
    for _ in tl.static_range(JOINT):
        sums = sums + (tl.zeros([BLOCK_R, PADDED], tl.float32),)
    for col in range(split * span, tl.minimum(cols, (split + 1) * span), BLOCK_C):
        c = col + tl.arange(0, BLOCK_C)
        mixed = ()
        for _ in tl.static_range(JOINT):
            mixed = mixed + (tl.zeros([BLOCK_R, BLOCK_C], tl.float32),)
        for g in range(heads):
            at = tl.cast(g, tl.int64)
            x_tile = _tile(x + at * x_h, x_n, x_d, row, rows, BLOCK_R, WIDTH, PADDED, EVEN_R)
            y_tile = _tile(y + at * y_h, y_n, y_d, col, cols, BLOCK_C, WIDTH, PADDED, EVEN_C)
            scores = _scores(
                x_tile, y_tile, mask + at * mask_h if MASKED else mask, mask_r, mask_c,
                row, col, rows, cols, scale, BLOCK_R, BLOCK_C,
                ROWS_ARE_KEYS, EVEN_R if ROWS_ARE_KEYS else EVEN_C, MASKED, PRECISION,
            )  # fmt: skip
            if ONE_TILE:
                top = tl.max(scores, 1)
                maps = tl.exp2(scores - top[:, None])
                total = tl.sum(maps, 1)
                maps = maps * (1.0 / total)[:, None]
                if first == 0:
                    tl.store(lse + at * rows + r, top * LN2 + tl.log(total), mask=r < rows)
            elif ROWS_ARE_KEYS:
                maps = tl.exp2(
                    scores - (tl.load(lse + at * cols + c, mask=c < cols, other=0.0) * LOG2E)[None, :]
                )
            else:
                maps = tl.exp2(
                    scores - (tl.load(lse + at * rows + r, mask=r < rows, other=0.0) * LOG2E)[:, None]
                )
            # float32 on the ordinary cores: exact for a small alpha, and no padding of the heads to 16 or 32
            new = ()
            for j in tl.static_range(JOINT):
                head = tl.minimum(first + j, HEADS - 1)
                new = new + (mixed[j] + tl.load(coeff + head * coeff_h + g * coeff_g) * maps,)
            mixed = new
        new = ()
        for j in tl.static_range(JOINT):
            head = tl.cast(tl.minimum(first + j, HEADS - 1), tl.int64)
            z_tile = _tile(z + head * z_h, z_n, z_d, col, cols, BLOCK_C, WIDTH, PADDED, EVEN_C)
            new = new + (sums[j] + _dot(mixed[j].to(z_tile.dtype), z_tile, PRECISION),)
        sums = new
    for j in tl.static_range(JOINT):
        head = tl.cast(tl.minimum(first + j, HEADS - 1), tl.int64)
        _store(out + head * rows * WIDTH, sums[j], row, rows, BLOCK_R, WIDTH, PADDED)


@triton.jit
def _delta_kernel(
    q, k, grad, v, coeff, mask, lse, delta, partial,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, grad_b, grad_h, grad_n, grad_d, v_b, v_h, v_n, v_d,
    coeff_h, coeff_g, mask_b, mask_h, mask_r, mask_c,
    rows, cols, heads, scale,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, JOINT: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, EVEN_R: tl.constexpr, EVEN_C: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta[g] of BLOCK_R queries and their share of dcoeff[:, g], both from products[g][r, h] = <G[h], A[g]>_r.

    delta[g][r] = sum_h coeff[h, g] products[g][r, h] and dcoeff[h, g] = sum_r products[g][r, h].
    """
    row = tl.program_id(0) * BLOCK_R
    first = tl.program_id(1) * JOINT
    batch = tl.cast(tl.program_id(2), tl.int64)
    q += batch * q_b
    k += batch * k_b
    grad += batch * grad_b
    v += batch * v_b
    if MASKED:
        mask += batch * mask_b
    lse += batch * HEADS * tl.cast(rows, tl.int64)
    delta += batch * HEADS * tl.cast(rows, tl.int64)
    r = row + tl.arange(0, BLOCK_R)
    every = tl.arange(0, HEADS_PADDED)
    products = ()
    for _ in tl.static_range(JOINT):
        products = products + (tl.zeros([BLOCK_R, HEADS_PADDED], tl.float32),)
    for col in range(0, cols, BLOCK_C):
        maps = ()
        for j in tl.static_range(JOINT):
            at = tl.cast(tl.minimum(first + j, HEADS - 1), tl.int64)
            q_tile = _tile(q + at * q_h, q_n, q_d, row, rows, BLOCK_R, WIDTH, PADDED, EVEN_R)
            k_tile = _tile(k + at * k_h, k_n, k_d, col, cols, BLOCK_C, WIDTH, PADDED, EVEN_C)
            scores = _scores(
                q_tile, k_tile, mask + at * mask_h if MASKED else mask, mask_r, mask_c,
                row, col, rows, cols, scale, BLOCK_R, BLOCK_C, False, EVEN_C, MASKED, PRECISION,
            )  # fmt: skip
            lse_tile = tl.load(lse + at * rows + r, mask=r < rows, other=0.0) * LOG2E
            maps = maps + (tl.exp2(scores - lse_tile[:, None]),)
        for h in range(heads):
            at = tl.cast(h, tl.int64)
            grad_tile = _tile(grad + at * grad_h, grad_n, grad_d, row, rows, BLOCK_R, WIDTH, PADDED, EVEN_R)
            v_tile = _tile(v + at * v_h, v_n, v_d, col, cols, BLOCK_C, WIDTH, PADDED, EVEN_C)
            d_mixed = _dot(grad_tile, tl.trans(v_tile), PRECISION)
            here = (every == h)[None, :]
            new = ()
            for j in tl.static_range(JOINT):
                product = tl.sum(d_mixed * maps[j], 1)
                new = new + (products[j] + tl.where(here, product[:, None], 0.0),)
            products = new
    partial += (tl.program_id(0) * tl.num_programs(2) + batch) * HEADS * HEADS
    for j in tl.static_range(JOINT):
        g = tl.minimum(first + j, HEADS - 1)
        weights = tl.load(coeff + every * coeff_h + g * coeff_g, mask=every < HEADS, other=0.0)
        tl.store(
            delta + tl.cast(g, tl.int64) * rows + r, tl.sum(products[j] * weights[None, :], 1), mask=r < rows
        )
        tl.store(partial + every * HEADS + g, tl.sum(products[j], 0), mask=every < HEADS)


@triton.jit
def _score_grad_kernel(
    x, y, a, b, coeff, mask, lse, delta, out,
    x_b, x_h, x_n, x_d, y_b, y_h, y_n, y_d, a_b, a_h, a_n, a_d, b_b, b_h, b_n, b_d,
    coeff_h, coeff_g, mask_b, mask_h, mask_r, mask_c,
    rows, cols, heads, span, scale,
    HEADS: tl.constexpr, JOINT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, EVEN_R: tl.constexpr, EVEN_C: tl.constexpr,
    ROWS_ARE_KEYS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale * dS[g] y[g]: dq from (q, k, dOut, v), or dk from (k, q, v, dOut) with rows that are keys.

    dA[g] = sum_h coeff[h, g] a[h] b[h]^T; dS[g] = A[g] * (dA[g] - delta[g]).
    """
    tiles = tl.cdiv(rows, BLOCK_R)
    row = tl.program_id(0) % tiles * BLOCK_R
    split = tl.program_id(0) // tiles
    first = tl.program_id(1) * JOINT
    batch = tl.cast(tl.program_id(2), tl.int64)
    x += batch * x_b
    y += batch * y_b
    a += batch * a_b
    b += batch * b_b
    if MASKED:
        mask += batch * mask_b
    queries = tl.cast(cols if ROWS_ARE_KEYS else rows, tl.int64)
    lse += batch * HEADS * queries
    delta += batch * HEADS * queries
    out += (split * tl.num_programs(2) + batch) * HEADS * tl.cast(rows, tl.int64) * WIDTH
    r = row + tl.arange(0, BLOCK_R)
    sums = ()
    for _ in tl.static_range(JOINT):
        sums = sums + (tl.zeros([BLOCK_R, PADDED], tl.float32),)
    for col in range(split * span, tl.minimum(cols, (split + 1) * span), BLOCK_C):
        c = col + tl.arange(0, BLOCK_C)
        d_maps = ()
        for _ in tl.static_range(JOINT):
            d_maps = d_maps + (tl.zeros([BLOCK_R, BLOCK_C], tl.float32),)
        for h in range(heads):
            at = tl.cast(h, tl.int64)
            a_tile = _tile(a + at * a_h, a_n, a_d, row, rows, BLOCK_R, WIDTH, PADDED, EVEN_R)
            b_tile = _tile(b + at * b_h, b_n, b_d, col, cols, BLOCK_C, WIDTH, PADDED, EVEN_C)
            d_mixed = _dot(a_tile, tl.trans(b_tile), PRECISION)
            new = ()
            for j in tl.static_range(JOINT):
                g = tl.minimum(first + j, HEADS - 1)
                new = new + (d_maps[j] + tl.load(coeff + h * coeff_h + g * coeff_g) * d_mixed,)
            d_maps = new
        new = ()
        for j in tl.static_range(JOINT):
            at = tl.cast(tl.minimum(first + j, HEADS - 1), tl.int64)
            x_tile = _tile(x + at * x_h, x_n, x_d, row, rows, BLOCK_R, WIDTH, PADDED, EVEN_R)
            y_tile = _tile(y + at * y_h, y_n, y_d, col, cols, BLOCK_C, WIDTH, PADDED, EVEN_C)
            scores = _scores(
                x_tile, y_tile, mask + at * mask_h if MASKED else mask, mask_r, mask_c,
                row, col, rows, cols, scale, BLOCK_R, BLOCK_C,
                ROWS_ARE_KEYS, EVEN_R if ROWS_ARE_KEYS else EVEN_C, MASKED, PRECISION,
            )  # fmt: skip
            if ROWS_ARE_KEYS:
                inner = tl.load(delta + at * queries + c, mask=c < cols, other=0.0)[None, :]
                lse_tile = tl.load(lse + at * queries + c, mask=c < cols, other=0.0)[None, :]
            else:
                inner = tl.load(delta + at * queries + r, mask=r < rows, other=0.0)[:, None]
                lse_tile = tl.load(lse + at * queries + r, mask=r < rows, other=0.0)[:, None]
            d_scores = tl.exp2(scores - lse_tile * LOG2E) * (d_maps[j] - inner)
            new = new + (sums[j] + _dot(d_scores.to(y_tile.dtype), y_tile, PRECISION),)
        sums = new
    for j in tl.static_range(JOINT):
        at = tl.cast(tl.minimum(first + j, HEADS - 1), tl.int64)
        _store(out + at * rows * WIDTH, sums[j] * scale, row, rows, BLOCK_R, WIDTH, PADDED)


# Tiles


class Tiles(NamedTuple):
    """How a kernel is cut: tokens per tile on either side, heads that a program owns, and Triton's two knobs."""

    rows: int
    cols: int
    joint: int
    warps: int
    stages: int


# Two rows where a choice pays: the first if it makes enough programs for a large GPU, else the second.
ENOUGH_PROGRAMS = 120

# (bits per number, heads wider than 64) -> kernel -> tiles. All stay below the 99 KiB of shared memory that
# every GPU from compute capability 8.0 on has; the module's docstring tells how they were found.
TILES: dict[tuple[int, bool], dict[str, tuple[Tiles, ...]]] = {
    (16, False): {
        "lse": (Tiles(128, 64, 1, 4, 3), Tiles(64, 64, 1, 4, 3)),
        "forward": (Tiles(64, 64, 5, 8, 2), Tiles(32, 64, 5, 8, 2)),
        "one tile": (Tiles(32, 128, 5, 8, 2),),
        "delta": (Tiles(64, 64, 5, 8, 2), Tiles(32, 64, 5, 8, 2)),
        "dq": (Tiles(32, 64, 5, 8, 2),),
        "dk": (Tiles(32, 64, 5, 8, 2),),
        "dv": (Tiles(64, 64, 5, 8, 2), Tiles(32, 64, 5, 8, 2)),
    },
    (16, True): {
        "lse": (Tiles(64, 64, 1, 4, 2),),
        "forward": (Tiles(32, 64, 3, 8, 2),),
        "one tile": (Tiles(32, 128, 3, 8, 1),),
        "delta": (Tiles(32, 64, 3, 8, 2),),
        "dq": (Tiles(32, 64, 3, 8, 2),),
        "dk": (Tiles(32, 64, 3, 8, 2),),
        "dv": (Tiles(32, 64, 3, 8, 2),),
    },
    (32, False): {
        "lse": (Tiles(64, 32, 1, 4, 2),),
        "forward": (Tiles(16, 32, 5, 4, 2),),
        "one tile": (Tiles(16, 128, 3, 8, 1),),
        "delta": (Tiles(16, 32, 5, 4, 2),),
        "dq": (Tiles(16, 32, 5, 4, 2),),
        "dk": (Tiles(16, 32, 5, 4, 2),),
        "dv": (Tiles(16, 32, 5, 4, 2),),
    },
    (32, True): {
        "lse": (Tiles(32, 32, 1, 4, 2),),
        "forward": (Tiles(16, 32, 2, 4, 2),),
        "one tile": (Tiles(16, 128, 2, 8, 1),),
        "delta": (Tiles(16, 32, 2, 4, 2),),
        "dq": (Tiles(16, 32, 2, 4, 2),),
        "dk": (Tiles(16, 32, 2, 4, 2),),
        "dv": (Tiles(16, 32, 2, 4, 2),),
    },
}


def _tiles(kernel: str, side: Tensor) -> Tiles:
    """The table's row for a program's own side [B, H, tokens, D], with the heads shared out evenly."""
    batch, heads, tokens, width = side.shape
    rows = TILES[side.element_size() * 8, width > 64][kernel]
    for row in rows:
        groups = -(-heads // row.joint)
        if row is rows[-1] or batch * groups * -(-tokens // row.rows) >= ENOUGH_PROGRAMS:
            break
    return row._replace(joint=-(-heads // groups))


# Launches


def unsupported(q: Tensor, k: Tensor, mask: Tensor | None) -> str:
    """Why these inputs must go to another backend, in plain words; empty if they may come here."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return (
            f"the fused kernels know float16, bfloat16 and float32, not {str(q.dtype).removeprefix('torch.')}"
        )
    if q.shape[1] > MAX_HEADS:
        return f"the fused kernels take up to {MAX_HEADS} heads, not {q.shape[1]}"
    if q.shape[-1] > MAX_WIDTH:
        return f"the fused kernels take heads up to {MAX_WIDTH} wide, not {q.shape[-1]}"
    if 0 in q.shape or 0 in k.shape:
        return "there is nothing to attend to"
    if q.shape[0] > MAX_BATCH:
        return f"the fused kernels take batches up to {MAX_BATCH}, not {q.shape[0]}"
    if mask is not None and (mask.dim() != 4 or not mask.is_floating_point()):
        return "the fused kernels take masks of four dimensions that are added, not boolean ones"
    if mask is not None and mask.dtype == torch.float64:
        return "the fused kernels want a float32 mask, not float64"
    if INTERPRETED.value:
        return ""
    if not q.is_cuda:
        return f"the fused kernels run on CUDA devices, not on {q.device.type}"
    if torch.version.hip is not None:
        return "the fused kernels were never tried on AMD GPUs"
    capability = torch.cuda.get_device_capability(q.device)
    if capability < (8, 0):
        return f"the fused kernels need compute capability 8.0, not {capability[0]}.{capability[1]}"
    return ""


def forward(
    q: Tensor, k: Tensor, v: Tensor, coeff: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Q, D] in q's dtype, contiguous, and the log-sum-exp of the scores [B, H, Q], float32.

    q, k, v, coeff and mask may have any strides; mask is a float that is added, broadcastable to [B, H, Q, K].
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    one_tile = k.shape[2] <= _tiles("one tile", q).cols
    if not one_tile:
        _launch(_lse_kernel, _tiles("lse", q), mask, scale, {"q": q, "k": k}, {"lse": lse})
    _launch(
        _mix_kernel,
        _tiles("one tile" if one_tile else "forward", q),
        mask,
        scale,
        {"x": q, "y": k, "z": v},
        {"coeff": coeff, "lse": lse, "out": out},
        ONE_TILE=one_tile,
    )
    return out, lse


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
    """dq, dk, dv, contiguous, in their dtypes, and dcoeff [H, H] in coeff's; lse as forward gave it.

    No atomics anywhere, so that equal inputs give equal bits: dcoeff is the sum of one [H, H] for every batch entry
    and query tile, which costs next to nothing.
    """
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    batch, heads, queries, _ = q.shape
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    tiles = _tiles("delta", q)
    shares = (-(-queries // tiles.rows), batch, heads, heads)
    partial = torch.empty(shares, dtype=torch.float32, device=q.device)
    kept = {"coeff": coeff, "lse": lse}
    _launch(
        _delta_kernel,
        tiles,
        mask,
        scale,
        {"q": q, "k": k, "grad": grad, "v": v},
        {**kept, "delta": delta, "partial": partial},
    )
    dcoeff = partial.sum((0, 1)).to(coeff.dtype)
    sides = {"x": q, "y": k, "a": grad, "b": v}
    _launch(_score_grad_kernel, _tiles("dq", q), mask, scale, sides, {**kept, "delta": delta, "out": dq})
    turned = None if mask is None else mask.transpose(-1, -2)
    sides = {"x": k, "y": q, "a": v, "b": grad}
    _launch(
        _score_grad_kernel,
        _tiles("dk", k),
        turned,
        scale,
        sides,
        {**kept, "delta": delta, "out": dk},
        ROWS_ARE_KEYS=True,
    )
    _launch(
        _mix_kernel,
        _tiles("dv", k),
        turned,
        scale,
        {"x": k, "y": q, "z": grad},
        {**kept, "out": dv},
        ROWS_ARE_KEYS=True,
    )
    return dq, dk, dv, dcoeff


def _launch(
    kernel: Any,
    tiles: Tiles,
    mask: Tensor | None,
    scale: float,
    sides: dict[str, Tensor],
    others: dict[str, Tensor],
    *,
    ROWS_ARE_KEYS: bool = False,
    ONE_TILE: bool = False,
) -> None:
    """Run a kernel on [B, H, tokens, D] tensors, the rows' first and the columns' second; mask is [.., rows, cols]."""
    x, y = list(sides.values())[:2]
    batch, heads, rows, width = x.shape
    cols = y.shape[2]
    arguments: dict[str, Any] = {**sides, **others, "mask": mask, "rows": rows, "cols": cols, "scale": scale}
    if "heads" in kernel.arg_names:
        arguments["heads"] = heads
    for name, tensor in sides.items():
        arguments.update(
            zip((f"{name}_b", f"{name}_h", f"{name}_n", f"{name}_d"), tensor.stride(), strict=True)
        )
    if "coeff" in others:
        arguments["coeff_h"], arguments["coeff_g"] = others["coeff"].stride()
    # a side of 1 that is expanded gets stride 0
    strides = (0, 0, 0, 0) if mask is None else mask.expand(batch, heads, rows, cols).stride()
    arguments.update(zip(("mask_b", "mask_h", "mask_r", "mask_c"), strides, strict=True))
    constants = {
        "HEADS": heads,
        "HEADS_PADDED": triton.next_power_of_2(heads),
        "JOINT": tiles.joint,
        "WIDTH": width,
        "PADDED": max(16, triton.next_power_of_2(width)),
        "BLOCK_R": tiles.rows,
        "BLOCK_C": tiles.cols,
        "EVEN_R": rows % tiles.rows == 0,
        "EVEN_C": cols % tiles.cols == 0,
        "ROWS_ARE_KEYS": ROWS_ARE_KEYS,
        "ONE_TILE": ONE_TILE,
        "MASKED": mask is not None,
        # three tf32 products are float32 to about 1e-6; tf32 alone would keep three digits
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
    }
    arguments.update((name, value) for name, value in constants.items() if name in kernel.arg_names)
    grid = (-(-rows // tiles.rows), -(-heads // tiles.joint), batch)
    splits = 1
    if "span" in kernel.arg_names:
        # Few rows, as the 77 keys of a prompt: share the columns among programs and add their sums up afterwards
        steps = -(-cols // tiles.cols)
        per_split = -(-steps // max(1, min(steps, ENOUGH_PROGRAMS // math.prod(grid))))
        splits = -(-steps // per_split)
        arguments["span"] = per_split * tiles.cols
        grid = (grid[0] * splits, *grid[1:])
    if splits > 1:
        out = others["out"]
        arguments["out"] = torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernel[grid](**arguments, num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True)
    if splits > 1:
        out.copy_(arguments["out"].sum(0))
