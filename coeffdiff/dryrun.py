"""A run without numbers: the real networks on the meta device, and a ledger of what they would hold and compute.

What a network does is not described here a second time: its own forward and backward run over tensors that have
shapes, types and lifetimes, but no memory. What the meta device knows nothing of is added: autocast, what fused
attention keeps, and the buffers that operators need while they run.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from coeffdiff.console import quiet_libraries
from coeffdiff.method.chunked import chunk_bytes, chunk_shape
from coeffdiff.method.coefficients import Mixes
from coeffdiff.method.injection import inject
from coeffdiff.method.lora import add_lora

TOKENS = 77  # of a text, in every SDXL
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
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
            result = tree_map_only(TensorLike, TensorLike.make, made)
        for tensor in tree_leaves(result):
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
        # Forward: scores, values, mixing. Backward: maps and mixing anew; gradients of v, maps, q, k; of coeff, maps
        return 2 * product + mixing if operator is _MIXED else 5 * product + 3 * mixing
    if operator.overloadpacket in (_FLASH, _FLASH_BACKWARD):
        q, k = args[:2] if operator.overloadpacket is _FLASH else args[1:3]
        product = 2 * math.prod(q.shape) * k.shape[2]
        return (2 if operator.overloadpacket is _FLASH else 5) * product
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


# --- what the meta device knows nothing of ---------------------------------------------------------------------


class _AsOn(TorchFunctionMode):
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
            return _FLASH(*args[:3], is_causal=bool(kwargs.get("is_causal")))[0]
        return function(*args, **kwargs)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@contextmanager
def ledger_for(device: str, narrow: torch.dtype | None = None) -> Iterator[Ledger]:
    """A ledger of what runs inside, as if on `device` ("cpu" or "cuda"), under autocast to `narrow` if given."""
    ledger = Ledger(device)
    with quiet_libraries(), torch.device("meta"), _AsOn(device, narrow), ledger:
        yield ledger


# --- the parts of a run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """What is trained on a UNet: settings.method in plain values. rank None: no LoRA; targets None: no alpha."""

    rank: int | None
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    dora: bool = False
    targets: Any = None
    blocks: tuple[str, ...] | None = None
    backend: str = "auto"
    mixes: Mixes = "maps"


def make_learnable(unet: Any, learned: Learned) -> list[nn.Parameter]:
    """Put what is learned on a UNet on meta, as training does: the rest frozen, what learns in float32."""
    unet.requires_grad_(False)
    parameters: list[nn.Parameter] = []
    if learned.rank is not None:
        lora = add_lora(
            unet, rank=learned.rank, alpha=learned.rank, targets=learned.lora_targets, dora=learned.dora
        )
        parameters += lora.values()
    if learned.targets is not None:
        # The fused kernels run on GPUs alone; what they save over chunks is their buffers
        backend = "chunked" if learned.backend == "fused" else learned.backend
        layers = inject(
            unet, targets=learned.targets, blocks=learned.blocks, backend=backend, mixes=learned.mixes
        )
        parameters += (layer.alpha for layer in layers.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    return parameters


def train_step(
    unet: Any,
    parameters: list[nn.Parameter],
    *,
    batch: int,
    rows: int,
    columns: int,
    device: str,
    narrow: torch.dtype | None,
    checkpointing: bool,
    held: int = 0,
    through_text: bool = False,
) -> Ledger:
    """Forward and backward of one micro-batch, gradients of earlier ones at hand; the optimizer's step is left out.

    Args:
        unet: on meta, from make_learnable. parameters: what learns on it.
        rows, columns: of the latents.
        narrow: what autocast computes in; None: without autocast.
        held: bytes that something else holds all the while, such as the optimizer's states.
        through_text: whether the backward goes on into what the text was made of.
    """
    if checkpointing:
        # A function mode is off during backward, so what is run again there needs its own
        again = partial(
            checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), _AsOn(device, narrow))
        )
        unet.enable_gradient_checkpointing(again)
    else:
        unet.disable_gradient_checkpointing()
    unet.train()
    with ledger_for(device, narrow) as ledger:
        ledger.hold(unet.parameters())
        ledger.hold(unet.buffers())
        ledger.hold_bytes(held)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        inputs = unet_inputs(unet, batch, rows, columns, torch.float32)
        inputs["encoder_hidden_states"].requires_grad_(through_text)
        inputs["added_cond_kwargs"]["text_embeds"].requires_grad_(through_text)
        loss = F.mse_loss(unet(**inputs).sample.float(), torch.empty_like(inputs["sample"]))
        loss.backward()
        del loss, inputs
    for parameter in parameters:
        parameter.grad = None
    return ledger


def real_step(
    config: Any,
    learned: Learned,
    *,
    batch: int,
    rows: int,
    columns: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    narrow: torch.dtype | None = None,
    checkpointing: bool = False,
    through_text: bool = False,
) -> tuple[Callable[[], None], list[nn.Parameter]]:
    """What train_step only counts, to be run: forward and backward on weights that mean nothing, and what learns.

    config: of the UNet. Where only the text learns, that is what comes back.
    """
    with quiet_libraries(), torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).to(dtype)
    unet.to_empty(device=device)
    with torch.no_grad():
        for weight in unet.parameters():
            weight.fill_(0.01)
    parameters = make_learnable(unet, learned)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    with torch.device(device):
        inputs = unet_inputs(unet, batch, rows, columns, torch.float32)
    inputs["timestep"].zero_()
    text = nn.Parameter(inputs["encoder_hidden_states"], requires_grad=through_text)
    inputs["encoder_hidden_states"] = text

    def run() -> None:
        with torch.autocast(device.type, dtype=narrow, enabled=narrow is not None):
            loss = unet(**inputs).sample.float().square().mean()
        loss.backward()

    return run, parameters or [text]


@torch.no_grad()
def denoise_step(unet: Any, *, batch: int, rows: int, columns: int, device: str) -> Ledger:
    """One call of the UNet for pictures; batch: pictures, twice with guidance."""
    unet.eval()
    with ledger_for(device) as ledger:
        ledger.hold(unet.parameters())
        ledger.hold(unet.buffers())
        unet(**unet_inputs(unet, batch, rows, columns, unet.dtype))
    return ledger


def unet_inputs(unet: Any, batch: int, rows: int, columns: int, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of a UNet's call, on torch's default device; their numbers mean nothing."""
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "sample": torch.empty(batch, config.in_channels, rows, columns, dtype=dtype),
        "timestep": torch.empty(batch, dtype=torch.long),
        "encoder_hidden_states": torch.empty(batch, TOKENS, config.cross_attention_dim, dtype=dtype),
        "added_cond_kwargs": {
            "text_embeds": torch.empty(batch, pooled, dtype=dtype),
            "time_ids": torch.empty(batch, 6, dtype=dtype),
        },
    }


@torch.no_grad()
def encode_photo(vae: Any, *, rows: int, columns: int, device: str) -> Ledger:
    """One photo through the VAE; rows and columns of the latents."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    with ledger_for(device) as ledger:
        ledger.hold(vae.parameters())
        vae.encode(torch.empty(1, 3, rows * factor, columns * factor, dtype=vae.dtype))
    return ledger


@torch.no_grad()
def decode_picture(vae: Any, *, rows: int, columns: int, device: str) -> Ledger:
    """One picture out of the VAE; rows and columns of the latents."""
    with ledger_for(device) as ledger:
        ledger.hold(vae.parameters())
        vae.decode(torch.empty(1, vae.config.latent_channels, rows, columns, dtype=vae.dtype))
    return ledger


def bytes_of(network: nn.Module) -> int:
    """What a network's weights and buffers take in their types."""
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))


# --- how long it takes ------------------------------------------------------------------------------------------


class Stopwatch:
    """How long the operations of ledgers take on a device: each kind is run there once with tensors of its own.

    What the budget does not reach is taken at the speed of what it did: flops where there are any, else bytes.
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
            found = self.known.get(operation)
            total += count * (self._guess(operation) if found is None else found)
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


# Where nothing could be measured: a slow processor's
_UNKNOWN_FLOPS, _UNKNOWN_BYTES = 2e10, 5e9


@dataclass(frozen=True)
class _Cost:
    flops: int
    bytes: int

    @property
    def weight(self) -> float:
        return self.flops / _UNKNOWN_FLOPS + self.bytes / _UNKNOWN_BYTES


def _touched(operation: Operation) -> int | None:
    """Bytes of an operation's inputs; None where it has none, and only makes room."""
    found = [leaf for leaf in tree_leaves(operation.arguments) if isinstance(leaf, TensorLike)]
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in found) if found else None


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
    if device.type == "cuda" and operator.overloadpacket in (_FLASH, _FLASH_BACKWARD):
        backward = operator.overloadpacket is _FLASH_BACKWARD
        q, k, v = (tensor.requires_grad_(backward) for tensor in (args[1:4] if backward else args[:3]))
        if not backward:
            return lambda: F.scaled_dot_product_attention(q, k, v)
        out = F.scaled_dot_product_attention(q, k, v)
        return lambda: torch.autograd.grad(out, (q, k, v), args[0], retain_graph=True)

    def run() -> Any:
        with torch.no_grad():
            return operator(*args, **kwargs)

    return run
