"""How long sampling will take here, before it begins: counted work at a measured speed."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from coeffdiff.console import quiet_libraries
from coeffdiff.method.injection import unwrapped
from coeffdiff.sampling import Options, needs_upcast, picture_size


def expected_seconds(pipe: Any, options: Options, pictures: int, device: torch.device | str) -> float:
    """How long so many pictures will take: work counted on the meta device, at the speed that two of a UNet's blocks
    have here (measured in 0.3 s), where nothing else runs.

    Left out: the text encoders, offloading, what alpha adds to attention, and all that is neither UNet nor VAE,
    which shows where a step takes milliseconds.
    """
    width, height = picture_size(pipe, options)
    rows, columns = height // pipe.vae_scale_factor, width // pipe.vae_scale_factor
    if not pictures:
        return 0.0
    batch = min(options.batch_size, pictures)
    unet = unwrapped(pipe.unet)
    unet_work = _unet_work(unet, batch * (2 if options.guidance > 1 else 1), rows, columns)
    vae_work = _vae_work(pipe.vae, rows, columns)
    unet_speed = _speed(torch.device(device), unet.dtype)
    vae_dtype = torch.float32 if needs_upcast(pipe.vae) else pipe.vae.dtype
    vae_speed = unet_speed if vae_dtype == unet.dtype else _speed(torch.device(device), vae_dtype)
    steps = _calls_of_the_unet(pipe.scheduler, options.steps)
    return math.ceil(pictures / batch) * steps * unet_work.seconds(unet_speed) + pictures * vae_work.seconds(
        vae_speed
    )


@dataclass(frozen=True)
class _Speed:
    flops_per_second: float
    seconds_per_call: float


class _Work(TorchDispatchMode):
    """Counts multiplications and additions (flops), and operator calls, of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.calls = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        count = flop_registry.get(operator.overloadpacket)
        self.flops += count(*args, **(kwargs or {}), out_val=result) if count else 0
        self.calls += 1
        return result

    def seconds(self, speed: _Speed) -> float:
        return self.flops / speed.flops_per_second + self.calls * speed.seconds_per_call


def _unet_work(unet: Any, batch: int, rows: int, columns: int) -> _Work:
    config = unet.config
    with torch.device("meta"), torch.no_grad(), quiet_libraries():
        network = type(unet).from_config(config)
        time_ids = torch.empty(batch, 6)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        with _Work() as work:
            network(
                torch.empty(batch, config.in_channels, rows, columns),
                torch.empty(()),
                torch.empty(batch, 77, config.cross_attention_dim),
                added_cond_kwargs={"text_embeds": torch.empty(batch, pooled), "time_ids": time_ids},
            )
    return work


def _vae_work(vae: Any, rows: int, columns: int) -> _Work:
    with torch.device("meta"), torch.no_grad(), quiet_libraries():
        network = type(vae).from_config(vae.config)
        with _Work() as work:
            network.decode(torch.empty(1, vae.config.latent_channels, rows, columns))
    return work


def _calls_of_the_unet(scheduler: Any, steps: int) -> int:
    """Second-order schedulers call it twice a step."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


@torch.no_grad()
def _speed(device: torch.device, dtype: torch.dtype) -> _Speed:
    """Of the two blocks that a UNet is made of: small ones take the time of their calls, large ones of their flops."""
    small = _blocks(16, device, dtype)
    work = _counted(_blocks(16, torch.device("meta"), dtype), 4)
    per_call = _seconds(lambda: small(4), 0.02) / work.calls
    # 320 channels is SDXL's narrowest level; wider ones, and batches, fill a device as larger pictures do.
    large, side, taken = _blocks(320, device, dtype), 8, 0.0
    while taken < 0.02 and side < 128:
        side *= 2
        taken = _seconds(lambda: large(side), 0.0)  # noqa: B023  (called at once)
    taken = _seconds(lambda: large(side), 0.1)
    work = _counted(_blocks(320, torch.device("meta"), dtype), side)
    return _Speed(work.flops / max(taken - work.calls * per_call, taken / 10), per_call)


def _blocks(width: int, device: torch.device, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """A residual and a transformer block, as a function of the side of the square that passes through them."""
    with torch.device("meta"):  # weights are not drawn: that would touch the global generator
        residual = ResnetBlock2D(in_channels=width, temb_channels=width, groups=8)
        heads = max(2, width // 64)
        transformer = BasicTransformerBlock(width, heads, width // heads, cross_attention_dim=width)
    for block in (residual, transformer):
        block.to(dtype).to_empty(device=device)
        for weight in block.parameters():
            weight.fill_(0.01)

    def run(side: int) -> Tensor:
        on: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = residual(torch.ones(1, width, side, side, **on), torch.ones(1, width, **on))
        passed: Tensor = transformer(hidden.flatten(2).transpose(1, 2), None, torch.ones(1, 77, width, **on))
        return passed

    return run


def _counted(blocks: Callable[[int], Tensor], side: int) -> _Work:
    with _Work() as work:
        blocks(side)
    return work


def _seconds(run: Callable[[], Tensor], budget: float) -> float:
    """The shortest of as many runs as fit. The mean would be of other programs: where they hold one of its threads
    for a moment, a run of a millisecond takes ten, and the long operations of SDXL hardly notice.
    """
    run().sum().item()  # the first one loads kernels; item waits for the device
    best, end = math.inf, time.perf_counter() + budget
    while best == math.inf or time.perf_counter() < end:
        begun = time.perf_counter()
        run().sum().item()
        best = min(best, time.perf_counter() - begun)
    return best
