"""In which precision mixed attention computes: float32 at least, whatever autocast and TF32 would make of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

# Torch's newer switches for the products of a GPU and of a CPU, each with what it inherits from; none before torch 2.9
_SWITCHES: list[tuple[Any, Any]] = [
    (switch, above)
    for switch, above in (
        (torch.backends.cuda.matmul, torch.backends.cudnn),
        (getattr(torch.backends.mkldnn, "matmul", None), torch.backends.mkldnn),
    )
    if hasattr(switch, "fp32_precision")
]


@contextmanager
def exact_products(like: Tensor) -> Iterator[None]:
    """Products in the dtype of their factors: autocast would make bf16 of float32 ones, TF32 keeps ten bits, and seven
    are left of set_float32_matmul_precision("medium"), on a CPU too. A small alpha on the diagonal of I + alpha would
    be lost."""
    with without_autocast(like):
        if torch.compiler.is_compiling() or not _may_narrow(like):  # only the plain definition is ever traced
            yield
            return
        with _without_narrowing():
            yield


def _may_narrow(like: Tensor) -> bool:
    """Entering costs more than asking, which a CPU can afford: it has nothing to wait for."""
    if like.is_cuda or like.device.type != "cpu":
        return bool(like.is_cuda)
    if not _SWITCHES:
        return bool(torch.get_float32_matmul_precision() != "highest")
    return _SWITCHES[-1][0].fp32_precision not in ("none", "ieee")


@contextmanager
def _without_narrowing() -> Iterator[None]:
    """All of torch's switches are left as they were found. The older one cannot be asked beside the newer ones, which
    transformers' `tf32=True` sets; it sets them as well, and they have to agree with it inside."""
    older = None
    before = [(switch.fp32_precision, above.fp32_precision) for switch, above in _SWITCHES]
    with suppress(RuntimeError):
        older = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    for switch, _ in _SWITCHES:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for (switch, _), (own, inherited) in zip(_SWITCHES, before, strict=True):
            switch.fp32_precision = "none" if own == inherited else own


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    if like.is_meta:  # a dry run's autocast is a function mode
        off: AbstractContextManager[Any] = torch._C.DisableTorchFunction()
        return off
    kind = like.device.type
    on = torch.is_autocast_enabled(kind)  # entering costs more than asking
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def wide_dtype(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)
