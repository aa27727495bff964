"""A ledger of the memory and work of operations, which run on the meta device."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

import coeffdiff.method.attention  # noqa: F401  (registers the operators below)
from coeffdiff.method.chunked import chunk_bytes, chunk_shape
from coeffdiff.utils.console import quiet_libraries

TOKENS = 77  # of a text, in every CLIP
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_MIXED = torch.ops.coeffdiff.mixed_attention.default
_MIXED_BACKWARD = torch.ops.coeffdiff.mixed_attention_backward.default


@dataclass(frozen=True)
class TensorLike:
    """All that decides how long an operator takes over a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorLike:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def make(self, device: str | torch.device = "meta") -> Tensor:
        """Such a tensor, its numbers whatever was in memory."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)

    def filled(self, device: torch.device) -> Tensor:
        """Such a tensor of small numbers (0.01; integers and truth values: zero)."""
        room = 1 + sum(
            (size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True) if size
        )
        value = 0.01 if self.dtype.is_floating_point else 0
        return torch.full((room,), value, dtype=self.dtype, device=device).as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Operation:
    """One call of an operator, up to the numbers in its tensors. arguments: nested tuples, keywords last."""

    operator: Any
    arguments: tuple[Any, ...]


class Ledger(TorchDispatchMode):
    """What the tensors made inside hold, now and at most, and which operators made them.

    A storage counts from the operator that returns it until nothing refers to it any more, views and autograd's
    graph included. On top comes what an operator takes while it runs, as scratch_bytes() knows it for `device`;
    the attribute of that name is the most that any took.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.live_bytes = self.peak_bytes = self.scratch_bytes = self.flops = self.calls = 0
        self.operations: Counter[Operation] = Counter()
        self._known: set[int] = set()
        self._made: dict[Operation, tuple[Any, int, int]] = {}

    def hold(self, tensors: Any) -> None:
        """Count what was made outside: weights, states of an optimizer."""
        for tensor in tensors:
            self._note(tensor)

    def hold_bytes(self, count: int) -> None:
        self.live_bytes += count
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        if operator.is_view or operator._schema.is_mutable:
            result = operator(*args, **kwargs)
            if not operator.is_view:
                self.operations[_operation(operator, args, kwargs)] += 1
            return result
        operation = _operation(operator, args, kwargs)
        self.operations[operation] += 1
        made, flops, scratch = self._made.get(operation) or (None, 0, 0)
        if made is None:
            result = operator(*args, **kwargs)
            flops, scratch = (
                flops_of(operator, args, kwargs, result),
                scratch_bytes(operator, args, self.device),
            )
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            if all(tensor.untyped_storage()._cdata not in self._known for tensor in outputs):
                self._made[operation] = (tree_map_only(Tensor, TensorLike.of, result), flops, scratch)
        else:  # seen before: new tensors of the same kind, ten times as fast as torch's own shape functions
            one = isinstance(made, TensorLike)  # of most operators, and walking a tree takes longer
            result = made.make() if one else tree_map_only(TensorLike, TensorLike.make, made)
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        self.flops += flops
        self.scratch_bytes = max(self.scratch_bytes, scratch)
        # What comes out exists while the operator still holds its scratch
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + scratch)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.hold_bytes(size)

        def gone() -> None:
            self._known.discard(key)
            self.live_bytes -= size

        weakref.finalize(storage, gone).atexit = False


def _operation(operator: Any, args: Any, kwargs: Any) -> Operation:
    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return TensorLike.of(value)
        if isinstance(value, list | tuple):
            return tuple(plain(part) for part in value)
        return value

    return Operation(operator, (plain(args), tuple((name, plain(value)) for name, value in kwargs.items())))


def flops_of(operator: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Multiplications and additions of one call; 0 for all that is no product of matrices."""
    if operator in (_MIXED, _MIXED_BACKWARD):
        q, k = args[:2] if operator is _MIXED else args[1:3]
        batch, heads, queries, width = q.shape
        product, mixing = (
            2 * batch * heads * queries * k.shape[2] * width,
            2 * batch * heads**2 * queries * k.shape[2],
        )
        # Forward: scores, values, mixing. Backward: maps and mixing again; gradients of v, maps, q, k; of coeff, maps
        return 2 * product + mixing if operator is _MIXED else 5 * product + 3 * mixing
    if operator.overloadpacket in (FLASH, FLASH_BACKWARD):
        q, k = args[:2] if operator.overloadpacket is FLASH else args[1:3]
        product = 2 * math.prod(q.shape) * k.shape[2]
        return (2 if operator.overloadpacket is FLASH else 5) * product
    count = flop_registry.get(operator.overloadpacket)
    return int(count(*args, **kwargs, out_val=result)) if count else 0


def scratch_bytes(operator: Any, args: Any, device: str) -> int:
    """What one call takes beside its inputs and outputs while it runs."""
    if operator in (_MIXED, _MIXED_BACKWARD):
        q, k = args[:2] if operator is _MIXED else args[1:3]
        wide = 8 if q.dtype == torch.float64 else 4
        room = chunk_bytes(torch.device(device), q.shape[1] * k.shape[2] * 4)
        entries, rows = chunk_shape(q, k, room)
        chunk = entries * rows * q.shape[1] * k.shape[2] * wide
        inputs = (q.numel() + 2 * k.numel()) * wide  # contiguous copies in float32
        if operator is _MIXED:
            return int(inputs + 2 * chunk)
        return int(inputs + 2 * k.numel() * wide + 3 * chunk)
    return 0


class AsOnDevice(TorchFunctionMode):
    """Casts as autocast would on a device, and attention that stores no maps."""

    _NARROW = frozenset(
        {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.bmm, torch.baddbmm}
        | {torch.matmul, Tensor.matmul, Tensor.__matmul__}
    )
    _WIDE_ON_CUDA = frozenset((F.layer_norm, F.group_norm, F.softmax, torch.softmax, F.mse_loss))

    def __init__(self, device: str, narrow: torch.dtype | None) -> None:
        super().__init__()
        self.device, self.narrow = device, narrow

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.narrow is not None:
            dtype = self.narrow if function in self._NARROW else None
            if self.device == "cuda" and function in self._WIDE_ON_CUDA:
                dtype = torch.float32
            if dtype is not None:
                args, kwargs = tree_map_only(Tensor, lambda t: _cast(t, dtype), (args, kwargs))
        if function is F.scaled_dot_product_attention:
            return FLASH(*args[:3], is_causal=bool(kwargs.get("is_causal")))[0]
        return function(*args, **kwargs)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@contextmanager
def ledger_for(device: str, narrow: torch.dtype | None = None) -> Iterator[Ledger]:
    """A ledger of what runs inside, as if on `device` ("cpu" or "cuda"), under autocast to `narrow` if given."""
    ledger = Ledger(device)
    with quiet_libraries(), torch.device("meta"), AsOnDevice(device, narrow), ledger:
        yield ledger
