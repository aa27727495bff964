"""Which tiles the fused kernels should have on this GPU: every kernel alone, at SDXL's layer shapes at 1024 px.

python scripts/bench/tune_tiles.py                                # bf16, all kernels, some minutes
python scripts/bench/tune_tiles.py --kernels dq dk --json tiles.json

Prints milliseconds for each candidate, the fastest first, with the row of kernels.TILES marked; a candidate that does
not compile, wants more shared memory than there is, or gives other numbers than the row that is in use, is named with
the reason. Compilation goes first, in several processes, into Triton's cache. Nothing is changed: a better row is for
TILES, with the GPU it was seen on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that it runs where the package is not installed

from coeffdiff.method import triton_kernels as kernels
from coeffdiff.method.triton_kernels import INTERPRETED, TILES, Tiles, _tiles, backward, forward
from coeffdiff.method.verified import TOLERANCE

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WIDTH = 64  # of SDXL's heads
SHAPES = {  # heads, queries, keys
    "self, 10 x 4096": (10, 4096, 4096),
    "self, 20 x 1024": (20, 1024, 1024),
    "cross, 10 x 4096": (10, 4096, 77),
    "cross, 20 x 1024": (20, 1024, 77),
}
# Tiles(rows, cols, joint, warps, stages): those that were not ruled out by registers or shared memory on paper
_WIDE = [Tiles(64, 64, 5, 8, n) for n in (1, 2, 3)] + [Tiles(64, 32, 5, 8, n) for n in (2, 3)]
_FLAT = [Tiles(32, 64, 5, 8, n) for n in (1, 2, 3)] + [Tiles(32, 32, 10, 8, 2), Tiles(64, 32, 3, 4, 2)]
CANDIDATES = {
    "lse": [Tiles(r, c, 1, w, n) for r in (64, 128) for c in (64, 128) for w in (4, 8) for n in (2, 3, 4)],
    "forward": _WIDE + _FLAT,
    "one tile": [Tiles(r, 128, 5, w, n) for r in (16, 32, 64) for w in (4, 8) for n in (1, 2)],
    "delta": _WIDE + _FLAT,
    "dq": _FLAT + _WIDE[:2],
    "dk": _FLAT + _WIDE[:2],
    "dv": _WIDE + _FLAT,
}
FORWARD = ("lse", "forward", "one tile")


def main() -> int:
    from coeffdiff.utils.paths import path_argument

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    parser.add_argument("--most", type=int, help="candidates of a kernel; default: all")
    parser.add_argument("--tokens", type=int, help="at most so many queries and keys, to try things out")
    parser.add_argument("--json", type=path_argument, help="file for all figures")
    chosen = parser.parse_args()
    if not torch.cuda.is_available() and not INTERPRETED.value:
        print("There is no CUDA GPU here; TRITON_INTERPRET=1 runs the kernels on the CPU.", file=sys.stderr)
        return 2
    asked = [
        (shape, kernel, tiles)
        for shape in chosen.shapes
        for kernel in chosen.kernels
        for tiles in dict.fromkeys([*in_use(kernel, shape, chosen), *CANDIDATES[kernel][: chosen.most]])
        if takes_part(kernel, shape, chosen)
    ]
    if chosen.workers and torch.cuda.is_available():
        with ProcessPoolExecutor(chosen.workers, get_context("spawn")) as pool:
            list(pool.map(partial(measure, chosen=chosen, rounds=1), asked))
    found = [
        {"shape": one[0], "kernel": one[1], "tiles": one[2], "ms": figure, "why": why}
        for one in asked
        for figure, why in [measure(one, chosen, chosen.rounds)]
    ]
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    print(report(found, chosen))
    return 0


def takes_part(kernel: str, shape: str, chosen: Any) -> bool:
    """Few keys fit in one tile, which takes the place of two kernels."""
    one_tile = sizes(shape, chosen)[2] <= CANDIDATES["one tile"][0].cols
    return kernel not in FORWARD or (kernel == "one tile") == one_tile


def sizes(shape: str, chosen: Any) -> tuple[int, int, int]:
    heads, queries, keys = SHAPES[shape]
    return heads, min(queries, chosen.tokens or queries), min(keys, chosen.tokens or keys)


def in_use(kernel: str, shape: str, chosen: Any) -> list[Tiles]:
    """The row of kernels.TILES that these sizes get."""
    heads, queries, keys = sizes(shape, chosen)
    tokens = keys if kernel in ("dk", "dv") else queries
    side = torch.empty(chosen.batch, heads, tokens, WIDTH, dtype=DTYPES[chosen.dtype], device="meta")
    return [_tiles(kernel, side)]


def measure(asked: tuple[str, str, Tiles], chosen: Any, rounds: int) -> tuple[float, str]:
    """Median milliseconds of one kernel with these tiles, all others as they are; or NaN and the reason."""
    shape, kernel, tiles = asked
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads, queries, keys = sizes(shape, chosen)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(tokens: int) -> Tensor:
        values = torch.empty(chosen.batch, tokens, heads, WIDTH, dtype=DTYPES[chosen.dtype], device=device)
        return values.normal_(generator=generator).transpose(1, 2)

    q, k, v, grad = drawn(queries), drawn(keys), drawn(keys), drawn(queries)
    coeff = torch.eye(heads, device=device)
    coeff += 0.1 * torch.empty_like(coeff).normal_(generator=generator)
    scale = WIDTH**-0.5

    def both() -> list[Tensor]:
        out, lse = forward(q, k, v, coeff, None, scale)
        return [out] if kernel in FORWARD else [*backward(grad, q, k, v, coeff, None, lse, scale)]

    expected = both()
    taken: list[float] = []
    try:
        with replaced(kernel, tiles), timed(kernel, device, taken):
            got = both()  # compiles
            for one, other in zip(got, expected, strict=True):
                off = float((one - other).abs().max() / other.abs().max())
                if not off <= TOLERANCE[q.dtype]:  # NaN is no smaller than anything
                    return math.nan, f"differs by {off:.1e}"
            taken.clear()
            for _ in range(rounds):
                both()
    except Exception as error:  # compilers and drivers have errors of their own kinds
        return math.nan, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:100]}"
    return statistics.median(taken), ""


@contextmanager
def replaced(kernel: str, tiles: Tiles) -> Iterator[None]:
    """Inside, a kernel has these tiles whatever the sizes."""
    table = TILES[16, False]
    before = table[kernel]
    table[kernel] = (tiles,)
    try:
        yield
    finally:
        table[kernel] = before


@contextmanager
def timed(kernel: str, device: str, taken: list[float]) -> Iterator[None]:
    """Inside, milliseconds of each launch of one kernel are added to `taken`; launches of others pass by."""
    launch, launched = kernels._launch, getattr(kernels, _FUNCTIONS[kernel])

    def watched(function: Any, tiles: Tiles, *rest: Any, **options: Any) -> None:
        turned = bool(options.get("ROWS_ARE_KEYS"))
        run = partial(launch, function, tiles, *rest, **options)
        if function is launched and turned == (kernel in ("dk", "dv")):
            taken.append(milliseconds(run, device))
        else:
            run()

    kernels._launch = watched
    try:
        yield
    finally:
        kernels._launch = launch


def milliseconds(run: Callable[[], None], device: str) -> float:
    """On a GPU of the kernel alone: it is launched while the GPU is still busy with waiting."""
    if device != "cuda":
        began = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)  # cycles: half a millisecond, longer than Python takes for a launch
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


_FUNCTIONS = {
    "lse": "_lse_kernel", "forward": "_mix_kernel", "one tile": "_mix_kernel", "delta": "_delta_kernel",
    "dq": "_score_grad_kernel", "dk": "_score_grad_kernel", "dv": "_mix_kernel",
}  # fmt: skip


def report(found: list[dict[str, Any]], chosen: Any) -> str:
    """A table for each shape and kernel, the fastest first; * is in use."""
    lines = []
    for shape, kernel in dict.fromkeys((one["shape"], one["kernel"]) for one in found):
        some = [one for one in found if (one["shape"], one["kernel"]) == (shape, kernel)]
        used = in_use(kernel, shape, chosen)
        lines.append(f"\n{shape}, {kernel}")
        for one in sorted(some, key=lambda one: (math.isnan(one["ms"]), one["ms"])):
            mark = "*" if one["tiles"] in used else " "
            figure = one["why"] or f"{one['ms']:.3f} ms"
            lines.append(f"  {mark} {', '.join(str(n) for n in one['tiles']):22} {figure}")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter"
    return "\n".join([f"{where}, {chosen.dtype}, batch {chosen.batch}, torch {torch.__version__}", *lines])


if __name__ == "__main__":
    sys.exit(main())
