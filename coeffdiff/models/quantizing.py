"""Frozen networks in eight or four bits: who quantizes them, and where that runs.

    check_quantizing(kind, device_type)   what is missing for it, before anything is loaded
    loading_options(kind)                 for diffusers' from_pretrained, which then quantizes tensor by tensor
    quantize(network, kind)               in place, what is not quantized yet

int8 and fp8 are torchao's weight-only kinds with a scale for each row, nf4 is bitsandbytes'. Linear layers alone are
quantized: they hold 87 % of the numbers of SDXL's UNet, and convolutions stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from coeffdiff.errors import ConfigError
from coeffdiff.hosts.quantized import EightBitLinear, as_autocast, is_quantized
from coeffdiff.method.number_formats import Quantized
from coeffdiff.utils.text import first_line

_PACKAGES = {"int8": ("torchao", "quant"), "fp8": ("torchao", "quant"), "nf4": ("bitsandbytes", "bnb")}


def check_quantizing(kind: Quantized | None, device_type: str) -> None:
    """Raises: ConfigError if a package is missing or broken, or if this device does not run such weights."""
    if kind is None:
        return
    if device_type != "cuda" and (kind == "nf4" or device_type != "cpu"):
        instead = "int8 runs here as well" if device_type == "cpu" else "leave it out"
        raise ConfigError(
            f"model.quantize {kind} needs {'an NVIDIA GPU' if kind == 'nf4' else 'a CUDA GPU or a CPU'}, and this runs "
            f"on {device_type}; {instead}."
        )
    package, extra = _PACKAGES[kind]
    try:
        with _hushed():
            if package == "torchao":
                import torchao.quantization  # noqa: F401
            else:
                import bitsandbytes  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"model.quantize {kind} needs {package}: pip install 'coeffdiff[{extra}]'."
        ) from None
    except Exception as error:  # built for another torch: each version raises its own kind
        raise ConfigError(
            f"{package} cannot be imported beside torch {torch.__version__}: {first_line(error)}. Install the pair of "
            "scripts/constraints.txt, or leave model.quantize out."
        ) from None


def refuse_dora(kind: Quantized | None, what: str) -> None:
    """what: has DoRA, as the sentence's subject. Raises: ConfigError for nf4, whose weights DoRA cannot measure before
    they are on a GPU."""
    if kind == "nf4":
        raise ConfigError(
            f"{what} is a DoRA, which reads the weights below it, and nf4 has none until they are on a GPU; use int8 "
            "or fp8."
        )


def packages_for(kind: Quantized | None) -> list[str]:
    """The modules whose versions decide what the quantized numbers are."""
    return [_PACKAGES[kind][0]] if kind else []


def loading_options(kind: Quantized | None) -> dict[str, Any]:
    """Of a diffusers network in a folder: no wide copy of all of it is ever in memory. nf4 has none without a GPU."""
    if kind not in ("int8", "fp8"):
        return {}
    from diffusers import TorchAoConfig

    return {"quantization_config": TorchAoConfig(_torchao_config(kind))}


def quantize(network: nn.Module, kind: Quantized | None) -> None:
    """Quantize the linear layers that are not yet, in place, layer by layer.

    nf4 is computed when the network moves to the GPU, as bitsandbytes does it.
    """
    if kind is None:
        return
    with _hushed():
        if kind == "nf4":
            _to_four_bits(network)
            return
        from torchao.quantization import quantize_

        quantize_(
            network,
            _torchao_config(kind),
            lambda module, _: isinstance(module, nn.Linear) and not is_quantized(module),
        )
    for module in network.modules():
        if type(module) is nn.Linear and is_quantized(module):
            module.__class__ = EightBitLinear


def _torchao_config(kind: Quantized) -> Any:
    with _hushed():
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()


def _to_four_bits(network: nn.Module) -> None:
    import bitsandbytes

    class FourBitLinear(bitsandbytes.nn.Linear4bit):
        """Computes in the type of autocast, as a plain linear layer does."""

        def forward(self, x: torch.Tensor) -> Any:
            x = as_autocast(x)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            with torch.autocast(x.device.type, enabled=False):
                return bitsandbytes.matmul_4bit(
                    x, self.weight, bias=bias, quant_state=self.weight.quant_state
                )

    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                with torch.device("meta"):
                    narrow = FourBitLinear(
                        child.in_features,
                        child.out_features,
                        bias=child.bias is not None,
                        compute_dtype=child.weight.dtype,
                        quant_type="nf4",
                    )
                narrow.weight = bitsandbytes.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", module=narrow
                )
                narrow.bias = child.bias
                setattr(module, name, narrow.train(child.training))
    network.is_loaded_in_4bit = True  # for PEFT, which then has layers of its own


@contextmanager
def _hushed() -> Iterator[None]:
    """What the libraries say of their own next versions is not for the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
