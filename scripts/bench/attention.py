"""Every attention backend beside scaled_dot_product_attention, at SDXL's layer shapes: time ratio and extra memory.

python scripts/bench/attention.py                                  # 512 and 1024 px, float32 on the CPU
python scripts/bench/attention.py --dtype bf16 --pixels 512 1024 1536 --grow

Needs torch alone. All arms of a shape run in one process and take turns, so that a machine whose speed drifts slows
all of them alike; a ratio is to SDPA in the same round, and the median of the rounds is shown. Extra memory is the
peak above the inputs, with output and gradients in it. --grow: from 1,024 to 16,384 tokens, with the exponent of the
growth.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that it runs where the package is not installed

from coeffdiff.method.attention import BACKENDS, choose_backend, mixed_attention, unusable
from coeffdiff.training.memory import peak_gib, reset_peak

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SDPA, COMPILED = "sdpa", "reference, compiled"
HEAD_WIDTH = 64
WORDS = 77
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """One attention layer's: heads, query tokens, key tokens."""

    name: str
    heads: int
    queries: int
    keys: int

    def maps_gib(self, batch: int) -> float:
        """What one float32 set of maps takes."""
        return batch * self.heads * self.queries * self.keys * 4 / 2**30


@dataclass
class Row:
    """One arm at one shape; seconds of each round, and the peak above the inputs in MiB."""

    shape: str
    arm: str
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    forward_mib: float = math.nan
    both_mib: float = math.nan
    refused: str = ""


def shapes_at(pixels: int) -> list[Shape]:
    """SDXL's two widths: 10 heads at an eighth of half the side, 20 heads at half of that."""
    fine, coarse = (pixels // 16) ** 2, (pixels // 32) ** 2
    return [
        Shape(f"{pixels} px self", 10, fine, fine),
        Shape(f"{pixels} px self", 20, coarse, coarse),
        Shape(f"{pixels} px cross", 10, fine, WORDS),
        Shape(f"{pixels} px cross", 20, coarse, WORDS),
    ]


def arms_for(q: Tensor, k: Tensor) -> dict[str, Attend | str]:
    """name -> function, or the reason why there is none."""
    arms: dict[str, Attend | str] = {SDPA: lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v)}
    for name in BACKENDS:
        reason = unusable(name, q, k)
        arms[name] = reason or functools.partial(mixed_attention, backend=name)
    if q.device.type == "cuda":
        arms[COMPILED] = torch.compile(functools.partial(mixed_attention, backend="reference"))
    return arms


def measure(shape: Shape, options: Any) -> list[Row]:
    """All arms at one shape, in turns."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    generator = torch.Generator().manual_seed(0)

    def drawn(tokens: int) -> Tensor:
        # In the strides that attention processors give: [B, T, H, D] transposed.
        values = torch.randn(options.batch, tokens, shape.heads, HEAD_WIDTH, generator=generator)
        return values.to(device, dtype).transpose(1, 2).requires_grad_()

    q, k, v = drawn(shape.queries), drawn(shape.keys), drawn(shape.keys)
    noise = 0.1 * torch.randn(shape.heads, shape.heads, generator=generator)
    coeff = (torch.eye(shape.heads) + noise).to(device).requires_grad_()
    upstream = torch.randn(q.shape, generator=generator).to(device, dtype)
    rows, running = [], []
    for name, arm in arms_for(q, k).items():
        row = Row(f"{shape.name}, {shape.heads} x {shape.queries} x {shape.keys}", name)
        rows.append(row)
        if isinstance(arm, str):
            row.refused = arm
        elif name.startswith("reference") and 7 * shape.maps_gib(options.batch) > options.limit_gib:
            row.refused = f"its maps take more than {options.limit_gib:g} GiB"
        else:
            running.append((row, arm))

    def forward(arm: Attend) -> None:
        with torch.no_grad():
            arm(q, k, v, coeff)

    def both(arm: Attend) -> None:
        out = arm(q, k, v, coeff)
        torch.autograd.grad(out, (q, k, v, coeff), upstream, allow_unused=True)  # SDPA has no coeff to learn

    for row, arm in running:  # once to warm up, and for memory
        row.forward_mib = extra_mib(functools.partial(forward, arm), device)
        row.both_mib = extra_mib(functools.partial(both, arm), device)
    for _ in range(options.rounds):
        for row, arm in running:
            row.forward.append(seconds(functools.partial(forward, arm), device))
            row.both.append(seconds(functools.partial(both, arm), device))
    return rows


def extra_mib(call: Callable[[], None], device: torch.device) -> float:
    """Peak of a second call above what was there before it, in MiB; on a CPU to about a mebibyte."""
    call()
    gc.collect()
    if sys.platform == "linux":  # freed memory that the allocator keeps would be used again, and not be seen
        with suppress(OSError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    reset_peak(device)
    before = peak_gib(device)
    call()
    return max(0.0, (peak_gib(device) - before) * 1024)


def seconds(call: Callable[[], None], device: torch.device) -> float:
    """Of one call: on a GPU the mean over some ten milliseconds of them."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = 1
    while True:
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        took = begin.elapsed_time(end) / 1000
        if took > 0.01 or repeats >= 256:
            return took / repeats
        repeats *= 4


def table(rows: list[Row]) -> str:
    """Markdown: ratios to SDPA in the same round, and memory."""
    lines = [
        "| layer, heads x queries x keys | backend | forward ms | / SDPA | forward + backward ms | / SDPA "
        "| extra MiB, forward | forward + backward |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = next(other for other in rows if other.shape == row.shape and other.arm == SDPA)
        if row.refused:
            lines.append(f"| {row.shape} | {row.arm} | {row.refused} | | | | | |")
            continue
        cells = []
        for mine, theirs in ((row.forward, base.forward), (row.both, base.both)):
            ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            cells += [f"{statistics.median(mine) * 1000:.3g}", f"{ratio:.2f}"]
        lines.append(
            f"| {row.shape} | {row.arm} | {' | '.join(cells)} | {row.forward_mib:.0f} | {row.both_mib:.0f} |"
        )
    return "\n".join(lines)


def growth(rows: list[Row], tokens: list[int]) -> str:
    """For each arm the exponent of time and of extra memory between the smallest and the largest size it ran at."""
    lines = ["", "| backend | tokens | time grows as | extra memory grows as |", "|---|---|---|---|"]
    for arm in dict.fromkeys(row.arm for row in rows):
        own = [(n, row) for n, row in zip(tokens, by_size(rows, arm), strict=True) if not row.refused]
        if len(own) < 2:
            continue
        (first, low), (last, high) = own[0], own[-1]

        def exponent(a: float, b: float, span: float = last / first) -> str:
            return f"tokens^{math.log(b / a) / math.log(span):.1f}" if a > 0 and b > 0 else "not at all"

        took = exponent(statistics.median(low.both), statistics.median(high.both))
        lines.append(f"| {arm} | {first} to {last} | {took} | {exponent(low.both_mib, high.both_mib)} |")
    return "\n".join(lines)


def by_size(rows: list[Row], arm: str) -> list[Row]:
    return [row for row in rows if row.arm == arm]


def main() -> None:
    from coeffdiff.utils.paths import path_argument

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--pixels", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grow", action="store_true", help="10 heads, 1,024 to 16,384 tokens, as well")
    parser.add_argument(
        "--limit-gib", type=float, default=16.0, help="the definition is left out above this much memory"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=path_argument, help="also write the figures here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    cuda = options.device.startswith("cuda")
    where = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    about = (
        f"{where}, {platform.machine()}, torch {torch.__version__}, {options.dtype}, batch {options.batch}, head "
        f"width {HEAD_WIDTH}, median of {options.rounds} rounds, {date.today()}\n{' '.join(sys.argv)}"
    )
    print(about, file=sys.stderr)
    rows = []
    for shape in (shape for pixels in options.pixels for shape in shapes_at(pixels)):
        rows += measure(shape, options)
        print(f"  {rows[-1].shape}", file=sys.stderr, flush=True)
    print(f"{about}\n\n{table(rows)}")
    if options.grow:
        tokens = [1024, 2048, 4096, 8192, 16384]
        grown = [row for n in tokens for row in measure(Shape("self", 10, n, n), options)]
        print(f"\n{table(grown)}\n{growth(grown, tokens)}")
        rows += grown
    probe = torch.empty(1, 10, 4096, HEAD_WIDTH, device=options.device, dtype=DTYPES[options.dtype])
    name, reason = choose_backend(probe, probe)
    print(f"\nChosen here at 4,096 tokens x 10 heads: {name} ({reason}).")
    if options.json:
        found = [asdict(row) for row in rows]
        options.json.write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
