"""A base model for adapters: opened as their runs opened it, checked before any weights are read, then loaded.

`coeffdiff sample` and `coeffdiff evaluate` begin here, and so may a Python caller:

    session = open_session(read_adapters([Path("runs/sks/adapter")]))
    for adapter in session.adapters:
        session.check_adapter(adapter)
    pipe = session.load()
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from coeffdiff.hosts.diffusers import check_apart, check_architecture, check_shapes_of_lora
from coeffdiff.hosts.text_encoders import check_encoders
from coeffdiff.method.adapter_file import read_coefficients, read_header, read_lora_shapes, read_rows
from coeffdiff.models.architecture import native_resolution, network_on_meta, unet_on_meta
from coeffdiff.models.loading import Loader, load_pipeline
from coeffdiff.models.opening import Asked, Trained, differences, open_base, where
from coeffdiff.models.quantizing import check_quantizing, refuse_dora
from coeffdiff.models.source import Backbone
from coeffdiff.sampling.device import choose_device, prepare_device, refuse_offload
from coeffdiff.sampling.memory_options import Offload, Precision, sampling_switches
from coeffdiff.sampling.options import Options
from coeffdiff.utils.console import print_info
from coeffdiff.utils.oom import oom_hints
from coeffdiff.utils.torch_setup import precision_name


@dataclass(frozen=True)
class Session:
    """A base model, found and not yet loaded, with the adapters that it is opened for.

    adapters: those that will be loaded, together or one after the other; may be empty.
    dtype: of the UNet and, unless it needs float32, of the VAE.
    """

    adapters: tuple[Trained, ...]
    base: Backbone
    device: torch.device
    dtype: torch.dtype
    offload: Offload = "none"

    def print_model(self, processes: int = 1) -> None:
        """Announce the base model, its device and dtype, and the VAE beside it."""
        shared = f" in {processes} processes" if processes > 1 else ""
        dtype = str(self.dtype).removeprefix("torch.")
        quantized = f", {self.base.quantize}" if self.base.quantize else ""
        print_info(f"model    {self.base.name} on {self.device.type}, {dtype}{quantized}{shared}")
        if self.base.vae:
            print_info(f"vae      {where(self.base.vae[0])}")

    def print_differences(self) -> None:
        """A hint for each adapter whose base model has other weights than in training."""
        print_hints(differences(self.adapters, self.base, self.dtype))

    def check_adapter(self, adapter: Trained) -> None:
        """Of a LoRA only names and shapes are read; whether its numbers are finite is seen when it is loaded.

        Raises: AdapterMismatch unless UNet and text encoders have the adapter's layers; AdapterError for files that are
            missing, damaged or foreign; ConfigError for a DoRA over weights in nf4.
        """
        header, folder = adapter.header, adapter.folder
        check_architecture(self._unet, header, folder)
        encoders = {name: network_on_meta(self.base, name, self.dtype) for name in header.encoders}
        check_encoders(encoders, header, folder)
        read_coefficients(folder)
        shapes = read_lora_shapes(folder, header)
        if header.lora:
            check_shapes_of_lora(self._unet, encoders, header, folder, shapes)
        if header.lora and header.lora.dora:
            refuse_dora(self.base.quantize, str(folder))
        read_rows(folder, header)

    def refuse_offload(self) -> None:
        """Raises: ConfigError for offload without a GPU."""
        refuse_offload(self.device, self.offload)

    def outline(self) -> Any:
        """A pipeline without networks: tokenizers and scheduler, to check prompts and options with."""
        return load_pipeline(self.base, dtype=self.dtype, parts=())

    def load(self, load: Loader | None = None) -> Any:
        """The pipeline with its weights, on the CPU. Load adapters next, then call prepare.

        load: what gives them, in place of load_pipeline.
        """
        return (load or load_pipeline)(self.base, dtype=self.dtype)

    def prepare(self, pipe: Any, *, compiled: bool = False) -> None:
        """Move a loaded pipeline to the device, or offload it. Raises: what prepare_device raises."""
        prepare_device(pipe, self.device, self.offload, compiled=compiled)

    def oom_hints(self, options: Options) -> AbstractContextManager[None]:
        """Raises: OutOfMemory with the options that would still reduce memory, where memory runs out inside."""
        native = native_resolution(self.base)
        return oom_hints(
            lambda: sampling_switches(
                batch_size=options.batch_size,
                offload=self.offload,
                precision=precision_name(self.dtype),
                quantize=self.base.quantize,
                size=(options.width or native, options.height or native),
                device_type=self.device.type,
            )
        )

    @property
    def unet_config(self) -> Any:
        """The config of the UNet, known before its weights are."""
        return self._unet.config

    @cached_property
    def _unet(self) -> torch.nn.Module:
        """The UNet without weights, on the meta device."""
        return unet_on_meta(self.base)


def read_adapters(folders: Iterable[Path], *, together: bool = True) -> list[Trained]:
    """The headers of adapter folders.

    Args:
        together: they will be loaded beside each other.
    Raises: AdapterError for a damaged header, or for two that cannot be loaded together.
    """
    adapters = [Trained(folder, read_header(folder)) for folder in folders]
    if together:
        for one, other in itertools.combinations(adapters, 2):
            check_apart((one.folder, one.header), (other.folder, other.header))
    return adapters


def open_session(
    adapters: Sequence[Trained] = (),
    asked: Asked = Asked(),  # noqa: B008  # frozen
    *,
    precision: Precision = "auto",
    offload: Offload = "none",
    device: torch.device | None = None,
) -> Session:
    """Find the base model of these adapters, or what `asked` names in its place, for the fastest device.

    Args:
        device: one that is already assigned, for instance to this process among several.
    Raises: ModelError for a base model, configs or VAE that is missing or has changed; AdapterMismatch if the adapters
        were trained with different VAEs and none is asked for; ConfigError for weights that cannot be quantized here.
    """
    device, dtype = choose_device(precision, device)
    base = open_base(adapters, asked, dtype)
    check_quantizing(base.quantize, device.type)
    return Session(tuple(adapters), base, device, dtype, offload)


def print_hints(lines: Iterable[str]) -> None:
    for line in lines:
        print_info(f"hint     {line}")
