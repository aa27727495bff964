"""How long pictures will take, from the operations of UNet and VAE."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from coeffdiff.hosts.guard import unwrapped
from coeffdiff.preflight.dry_run import bytes_of, decode_picture, denoise_step
from coeffdiff.preflight.stopwatch import Stopwatch
from coeffdiff.sampling.options import Options, picture_size
from coeffdiff.sampling.vae_precision import needs_upcast
from coeffdiff.utils.console import quiet_libraries


def expected_seconds(pipe: Any, options: Options, pictures: int, device: torch.device | str) -> float:
    """How long so many pictures will take where nothing else runs: the operations of UNet and VAE, as they take here
    (measured in 0.4 s of work, or as long as the longest of them).

    Left out: the text encoders, offloading, what alpha, LoRA and quantized weights add, and what Python adds to
    operators, which shows where a step takes milliseconds.
    """
    if not pictures:
        return 0.0
    width, height = picture_size(pipe, options)
    rows, columns = height // pipe.vae_scale_factor, width // pipe.vae_scale_factor
    device, batch = torch.device(device), min(options.batch_size, pictures)
    vae_dtype = torch.float32 if needs_upcast(pipe.vae) else pipe.vae.dtype
    unet, vae = _on_meta(unwrapped(pipe.unet), pipe.unet.dtype), _on_meta(pipe.vae, vae_dtype)
    on = {"rows": rows, "columns": columns, "device": "cuda" if device.type == "cuda" else "cpu"}
    drawing = denoise_step(unet, batch=batch * (2 if options.guidance > 1 else 1), **on)
    decoding = decode_picture(vae, **on)
    # Two, since the VAE may compute in another dtype
    watch, other = Stopwatch(device, 0.3), Stopwatch(device, 0.1)
    # Operators are timed with their weights in a cache
    cold = bytes_of(unet) * watch.seconds_to_fetch()
    calls = math.ceil(pictures / batch) * _calls_of_the_unet(pipe.scheduler, options.steps)
    return calls * (watch.seconds(drawing) + cold) + pictures * other.seconds(decoding)


def _on_meta(network: Any, dtype: torch.dtype) -> Any:
    """A network of the same architecture without numbers."""
    with torch.device("meta"), quiet_libraries():
        return type(network).from_config(network.config).to(dtype)


def _calls_of_the_unet(scheduler: Any, steps: int) -> int:
    """Second-order schedulers call it twice a step."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)
