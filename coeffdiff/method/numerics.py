"""In which precision mixed attention computes: float32 at least, whatever autocast and TF32 would make of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


@contextmanager
def exact_products(like: Tensor) -> Iterator[None]:
    """Products in the dtype of their factors: autocast would make bf16 of float32 ones and TF32 keeps ten bits, and
    a small alpha on the diagonal of I + alpha would be lost."""
    with without_autocast(like):
        if not like.is_cuda or torch.compiler.is_compiling():  # only the plain definition is ever traced
            yield
            return
        with _without_tf32():
            yield


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Both of torch's switches are left as they were found. The older one cannot be asked beside the newer one, which
    transformers' `tf32=True` sets."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        matmul = torch.backends.cuda.matmul
        newer = matmul.fp32_precision
        inherited = newer == torch.backends.fp32_precision
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = "none" if inherited else newer
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    if like.is_meta:  # a dry run's autocast is a function mode
        off: AbstractContextManager[Any] = torch._C.DisableTorchFunction()
        return off
    kind = like.device.type
    on = torch.is_autocast_enabled(kind)  # entering costs more than asking
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def wide_dtype(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)
