"""How long operations take here, timed one by one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from coeffdiff.preflight.ledger import FLASH, FLASH_BACKWARD, Ledger, Operation, TensorLike

# Per second, where nothing could be measured: a slow processor's
_UNKNOWN_FLOPS, _UNKNOWN_BYTES = 2e10, 5e9


class Stopwatch:
    """How long the operations of ledgers take on a device: each kind is run there with tensors of its own.

    Operations beyond the budget are estimated at the speed of the measured ones: by flops if they have any, else bytes.
    """

    def __init__(self, device: torch.device, budget_seconds: float) -> None:
        self.device, self.left = device, budget_seconds
        self.each = budget_seconds / 200  # a step has some 250 kinds of operations
        self.known: dict[Operation, float] = {}
        self._costs: dict[Operation, _Cost] = {}
        self.seconds_per_call = 0.0  # of Python and autograd around an operator
        self._fetching: float | None = None

    def seconds(self, ledger: Ledger) -> float:
        """Of everything in a ledger, where nothing else runs."""
        counted = {
            operation: count
            for operation, count in ledger.operations.items()
            if _touched(operation) is not None
        }
        self._costs |= {operation: _cost(operation, ledger) for operation in counted}
        for operation in sorted(counted, key=lambda o: -counted[o] * self._costs[o].weight):
            if self.left <= 0:
                break
            if operation not in self.known:
                self._measure(operation)
        total = ledger.calls * self.seconds_per_call
        for operation, count in counted.items():
            measured = self.known.get(operation)
            total += count * (self._guess(operation) if measured is None else measured)
        return total

    @property
    def flops_per_second(self) -> float:
        return self._reached(lambda cost: cost.flops) or _UNKNOWN_FLOPS

    @property
    def bytes_per_second(self) -> float:
        """Of operations without flops, which wait for memory; counted by what they read."""
        unknown = _UNKNOWN_BYTES if self.device.type == "cpu" else 1 / self.seconds_to_fetch()
        return self._reached(lambda cost: 0 if cost.flops else cost.bytes) or unknown

    def seconds_to_fetch(self) -> float:
        """Of a byte that no cache holds, by passing over 64 MiB, which are more than one holds; measured once."""
        if self._fetching is None:
            values = torch.zeros(2**24, device=self.device)
            self._fetching = self.best(values.sum, 0.05) / values.nbytes
        return self._fetching

    def _guess(self, operation: Operation) -> float:
        """What an operation that was not measured takes: by its work, at the speed of others of its operator."""
        cost = self._costs[operation]
        if cost.flops:
            same = self._reached(lambda other: other.flops, operation.operator)
            return cost.flops / (same or self.flops_per_second)
        same = self._reached(lambda other: 0 if other.flops else other.bytes, operation.operator)
        return cost.bytes / (same or self.bytes_per_second)

    def _reached(self, of: Callable[[_Cost], int], operator: Any = None) -> float:
        alike = [o for o in self.known if of(self._costs[o]) and operator in (None, o.operator)]
        seconds = sum(self.known[o] for o in alike)
        return sum(of(self._costs[o]) for o in alike) / seconds if seconds else 0.0

    def best(self, run: Callable[[], Any], seconds: float) -> float:
        """The shortest of as many runs as fit. At least two, as the first one loads kernels, unless that is long."""
        if self.device.type != "cpu":  # the first run starts libraries and compiles kernels
            self._timed(run)
        best = first = self._timed(run)
        left = seconds - first
        while left > 0 or (best is first and first < 0.1):
            taken = self._timed(run)
            left -= taken
            if taken >= best and left <= 0:
                break
            best = min(best, taken)
        return best

    def _measure(self, operation: Operation) -> None:
        began, worked = time.perf_counter(), time.process_time()
        # An operator that this device lacks, or no memory left for it
        with suppress(RuntimeError, NotImplementedError, TypeError, ValueError):
            run = _runner(operation, self.device)
            if self.device.type != "cpu":  # what starts libraries and compiles kernels is not of the budget
                self._timed(run)
                began, worked = time.perf_counter(), time.process_time()
            self.known[operation] = self.best(run, self.each)
        # Where other programs hold the processor, a budget of work is stretched, but not without end
        self.left -= max(time.process_time() - worked, (time.perf_counter() - began) / 20)

    def _timed(self, run: Callable[[], Any]) -> float:
        """On a CPU never more than the work done: what other programs took meanwhile is not this one's speed."""
        began, worked = time.perf_counter(), time.process_time()
        run()
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
            return time.perf_counter() - began
        return min(time.perf_counter() - began, time.process_time() - worked)


@dataclass(frozen=True)
class _Cost:
    flops: int
    bytes: int

    @property
    def weight(self) -> float:
        return self.flops / _UNKNOWN_FLOPS + self.bytes / _UNKNOWN_BYTES


def _touched(operation: Operation) -> int | None:
    """Bytes of an operation's inputs; None where it has none, and only makes room."""
    inputs = [leaf for leaf in tree_leaves(operation.arguments) if isinstance(leaf, TensorLike)]
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in inputs) if inputs else None


def _cost(operation: Operation, ledger: Ledger) -> _Cost:
    _, flops, _ = ledger._made.get(operation) or (None, 0, 0)
    return _Cost(flops, _touched(operation) or 1)


def _runner(operation: Operation, device: torch.device) -> Callable[[], Any]:
    """The operation over tensors of its own on a device."""
    positional, named = operation.arguments

    def real(value: Any) -> Any:
        if isinstance(value, TensorLike):
            return value.filled(device)
        if isinstance(value, tuple):
            return [real(part) for part in value]
        return device if isinstance(value, torch.device) else value

    args, kwargs = real(positional), {name: real(value) for name, value in named}
    operator = operation.operator
    if device.type == "cpu" and operator is torch.ops.aten.native_layer_norm_backward.default:
        # Its statistics are float32 on meta and on a GPU, on a CPU they have the dtype of what is normed
        args[3:5] = [statistic.to(args[1].dtype) for statistic in args[3:5]]
    if device.type == "cuda" and operator.overloadpacket in (FLASH, FLASH_BACKWARD):
        backward = operator.overloadpacket is FLASH_BACKWARD
        q, k, v = (tensor.requires_grad_(backward) for tensor in (args[1:4] if backward else args[:3]))
        if not backward:
            return lambda: F.scaled_dot_product_attention(q, k, v)
        out = F.scaled_dot_product_attention(q, k, v)
        return lambda: torch.autograd.grad(out, (q, k, v), args[0], retain_graph=True)

    def run() -> Any:
        with torch.no_grad():
            return operator(*args, **kwargs)

    return run
