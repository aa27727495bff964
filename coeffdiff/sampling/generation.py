"""Adapter + prompt + seed -> pictures; each picture's noise comes from its own seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from coeffdiff.errors import ConfigError, NonFinitePicture
from coeffdiff.hosts.diffusers import loaded_adapters
from coeffdiff.hosts.guard import unwrapped, verify
from coeffdiff.method.coefficients import Coefficients
from coeffdiff.method.families import SDXL, family_of
from coeffdiff.sampling.image_inputs import ImageInputs, call_arguments
from coeffdiff.sampling.options import Encoded, OnProgress, Options, Request, check_options, picture_size
from coeffdiff.sampling.prompts import encode_prompts, shortened, text_arguments
from coeffdiff.sampling.vae_precision import in_its_precision, kept_precision


def generate(
    pipe: Any,
    requests: Iterable[Request],
    options: Options = Options(),  # noqa: B008  # frozen
    *,
    encoded: Mapping[str, Encoded] | None = None,
    images: ImageInputs | None = None,
    on_progress: OnProgress | None = None,
) -> Generator[tuple[Request, Image.Image]]:
    """Pictures in the order of their requests, each made when the iterator reaches it.

    A batch holds requests of one scale; afterwards the first adapter has its own scale again. A picture's noise
    comes from its own seed alone, in float32 on the CPU, so that device, precision and batch do not change it. In
    float32 on a CPU a picture changes by at most 2/255 with its batch; in a batch of one it equals what diffusers
    itself makes of this seed.

    Args:
        pipe: a StableDiffusionXLPipeline or StableDiffusionPipeline, in eval mode, or with `images` what pipeline_for
            made of one; text encoders may be None with `encoded`.
        encoded: from encode_prompts, for this negative prompt and guidance; by default all are encoded here.
        on_progress: takes how many pictures are done, a started one counted by its steps.
    Raises: ConfigError for a size that the model cannot make, or a scale without an adapter; InjectionError if an
        adapter has lost its alpha. While iterating: NonFinitePicture.
    """
    requests = list(requests)
    check_options(pipe, options)
    size = picture_size(pipe, options)
    if not loaded_adapters(pipe) and any(request.scale is not None for request in requests):
        raise ConfigError("A scale was asked for, and no adapter is loaded that could have it.")
    for adapter in loaded_adapters(pipe):
        adapter.verify()
    verify(pipe.unet)  # alphas in training belong to no loaded adapter
    if any(isinstance(m, Coefficients) and m.alpha.is_meta for m in unwrapped(pipe.unet).modules()):
        raise ConfigError(
            "An adapter was loaded after prepare_device had offloaded the UNet; load it before."
        )
    if encoded is None:
        embeddings = _encode_requests(pipe, requests, options)
    else:
        embeddings = [_embedding_of(request, encoded, options) for request in requests]
    return _generate(pipe, requests, embeddings, options, size, images, on_progress)


def _encode_requests(pipe: Any, requests: Sequence[Request], options: Options) -> list[Encoded]:
    """The embeddings of each request. At scale 0 a learned token is encoded as an ordinary word."""
    found: dict[float | None, dict[str, Encoded]] = {}
    with _scales_kept(pipe) as use_scale:
        for scale in dict.fromkeys(request.scale for request in requests):
            use_scale(scale)
            found[scale] = encode_prompts(
                pipe,
                [request.prompt for request in requests if request.scale == scale],
                negative_prompt=options.negative_prompt,
                guidance=options.guidance,
            )
    return [_embedding_of(request, found[request.scale], options) for request in requests]


def _embedding_of(request: Request, encoded: Mapping[str, Encoded], options: Options) -> Encoded:
    found = encoded.get(request.prompt)
    if found is None:
        raise ConfigError(f"The prompt {shortened(request.prompt)} is not among those that were encoded.")
    if options.guidance > 1 and found.negative_text is None:
        raise ConfigError(f"The prompts were encoded without guidance, and {options.guidance:g} needs it.")
    if options.guidance > 1 and found.negative_prompt != options.negative_prompt:
        raise ConfigError(
            f"The prompts were encoded with the negative prompt {shortened(found.negative_prompt)}, "
            f"not {shortened(options.negative_prompt)}."
        )
    return found


def _generate(
    pipe: Any,
    requests: list[Request],
    embeddings: list[Encoded],
    options: Options,
    size: tuple[int, int],
    images: ImageInputs | None,
    on_progress: OnProgress | None,
) -> Generator[tuple[Request, Image.Image]]:
    done = 0
    with _scales_kept(pipe) as use_scale:
        for batch in batches_of(requests, options.batch_size):
            asked = [requests[i] for i in batch]
            use_scale(asked[0].scale)

            def denoised(part: float, done: int = done, count: int = len(asked)) -> None:
                if on_progress:
                    on_progress(done + part * count)

            texts = [embeddings[i] for i in batch]
            latents = _denoise(pipe, asked, texts, options, size, images, denoised)
            for request, latent in zip(asked, latents, strict=True):
                yield request, _decode(pipe, latent, request)
            pipe.maybe_free_model_hooks()
            done += len(asked)


def batches_of(requests: Sequence[Request], batch_size: int) -> list[range]:
    """Indices of neighbouring requests of one scale, at most batch_size in a batch."""
    batches = []
    for _, run in itertools.groupby(range(len(requests)), key=lambda i: requests[i].scale):
        indices = list(run)
        ends = range(indices[0], indices[-1] + 1, batch_size)
        batches += [range(start, min(start + batch_size, indices[-1] + 1)) for start in ends]
    return batches


@contextmanager
def _scales_kept(pipe: Any) -> Iterator[Callable[[float | None], None]]:
    """Yields a function that sets the first adapter's scale (None: its own); its own scale returns at the end."""
    first = next(iter(loaded_adapters(pipe)), None)
    own = first.scale if first else 0.0

    def use(scale: float | None) -> None:
        wanted = own if scale is None else scale
        if first and first.scale != wanted:
            first.set_scale(wanted)

    try:
        yield use
    finally:
        use(None)


def _denoise(
    pipe: Any,
    requests: list[Request],
    embeddings: list[Encoded],
    options: Options,
    size: tuple[int, int],
    images: ImageInputs | None,
    denoised: OnProgress,
) -> Tensor:
    """Latents [B, C, h, w] after all steps."""
    width, height = size
    dtype, device = pipe.unet.dtype, pipe._execution_device
    shape = (
        pipe.unet.config.in_channels,
        height // pipe.vae_scale_factor,
        width // pipe.vae_scale_factor,
    )
    # A generator draws the picture's initial noise, then the noise that its scheduler adds
    generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
    begun = call_arguments(images, len(requests), size) if images else {"width": width, "height": height}
    if not (images and images.init):  # else diffusers draws the noise, after the latents of the picture
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        begun["latents"] = noise.to(dtype)
    if hasattr(pipe.scheduler, "noise_sampler_seed"):  # DPMSolverSDE has a generator of its own
        pipe.scheduler.noise_sampler_seed = [request.seed for request in requests]

    def after_step(_pipe: Any, step: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        denoised((step + 1) / pipe.num_timesteps)
        return {}

    with _without_bar(pipe), kept_precision(pipe.vae) if images else nullcontext():
        latents: Tensor = pipe(
            **text_arguments(embeddings, options.guidance > 1, device, dtype),
            guidance_scale=options.guidance,
            num_inference_steps=options.steps,
            **begun,
            generator=generators,
            callback_on_step_end=after_step,
            output_type="latent",  # diffusers' own decoding fails with a float32 VAE beside a half-precision UNet
        ).images
    return latents


@torch.no_grad()
def _decode(pipe: Any, latent: Tensor, request: Request) -> Image.Image:
    """One picture at a time: decoding is the peak of memory, and a batch of the VAE would change pictures."""
    vae = pipe.vae
    _check_finite(latent, request, f"the UNet in {dtype_name(pipe.unet)}", pipe)
    with in_its_precision(vae):
        scaled = latent[None].to(vae.dtype)
        if vae.config.get("latents_mean") is not None and vae.config.get("latents_std") is not None:
            mean, std = (
                torch.tensor(vae.config[key]).view(1, -1, 1, 1).to(scaled)
                for key in ("latents_mean", "latents_std")
            )
            scaled = scaled * std / vae.config.scaling_factor + mean
        else:
            scaled = scaled / vae.config.scaling_factor
        decoded = vae.decode(scaled, return_dict=False)[0]
        _check_finite(decoded, request, f"the VAE in {dtype_name(vae)}", pipe)
    if getattr(pipe, "watermark", None) is not None:
        decoded = pipe.watermark.apply_watermark(decoded)
    image: Image.Image = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
    return image


def _check_finite(tensor: Tensor, request: Request, source: str, pipe: Any) -> None:
    if tensor.isfinite().all():
        return
    cures = ["sample in another precision (--precision bf16 or fp32)"] if "16" in source else []
    if "VAE" in source and "float16" in source:
        example = " (madebyollin/sdxl-vae-fp16-fix)" if family_of(pipe) is SDXL else ""
        cures.append(f"use a VAE that stands float16{example}")
    if loaded_adapters(pipe):
        cures.append("lower the adapter's scale")
    cures.append("try another scheduler or more steps")
    raise NonFinitePicture(
        f"The picture for {shortened(request.prompt)}, seed {request.seed}, is not finite: {source} made NaN or "
        f"infinite numbers. To cure it, {', or '.join(cures)}."
    )


@contextmanager
def _without_bar(pipe: Any) -> Iterator[None]:
    """diffusers' own progress bar off inside; the caller shows one."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**(before or {}))


def dtype_name(network: Any) -> str:
    return str(network.dtype).removeprefix("torch.")
