"""Adapter + prompt + seed -> pictures that carry their recipe; loading the model and the adapter is done before."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers.utils import DummyObject
from PIL import Image
from torch import Tensor

from coeffdiff import __version__, samplers
from coeffdiff.config import PLACEHOLDER
from coeffdiff.console import quiet_libraries
from coeffdiff.errors import AdapterError, ConfigError, NonFinitePicture
from coeffdiff.method.adapter import COEFF_FILE, AdapterHeader, loaded_adapters
from coeffdiff.method.coefficients import Coefficients
from coeffdiff.method.injection import unwrapped, verify
from coeffdiff.pictures import fitted, free_name, labelled_grid, save_png
from coeffdiff.processes import Team
from coeffdiff.speed import compile_blocks, has_bf16, prepare_kernels
from coeffdiff.tokens import holds

Precision = Literal["auto", "fp32", "fp16", "bf16"]
Offload = Literal["none", "model", "sequential"]
OnProgress = Callable[[float], None]  # how many pictures are done, a started one counted by its steps

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GRID_FILE = "grid.png"
_LARGEST_SEED = 2**63 - 1


def _check_side(name: str, pixels: int, step: int) -> None:
    nearest = max(step, step * round(pixels / step))
    if pixels != nearest:
        raise ConfigError(f"A {name} of {pixels} pixels is no multiple of {step}; {nearest} is.")


@dataclass(frozen=True)
class Request:
    """One picture; <V> in the prompt has been filled in.

    scale: of the adapter that was loaded first, for this picture alone; None leaves it as it is.
    """

    prompt: str
    seed: int
    scale: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise ConfigError(f"The seed {self.seed} must lie between 0 and {_LARGEST_SEED}.")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ConfigError(f"A scale must be a finite number, not {self.scale}.")


@dataclass(frozen=True)
class Options:
    """What all pictures of a call share. width and height in pixels; None: the model's own.

    guidance of 1 or less switches classifier-free guidance off. An empty negative prompt is the model's own idea
    of none (in SDXL embeddings of zeros, not those of an empty text). batch_size changes speed and memory, and a
    picture by no more than 2/255.
    """

    steps: int = 30
    guidance: float = 5.0
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ConfigError(f"guidance must be a finite number from 0 on, not {self.guidance}.")
        if any("\ud800" <= c <= "\udfff" for c in self.negative_prompt):
            raise ConfigError("The negative prompt is not valid text; it must be UTF-8.")
        for name in ("width", "height"):
            _check_side(name, getattr(self, name) or 8, 8)  # 8: diffusers asks for it, whatever the VAE


@dataclass(frozen=True)
class Encoded:
    """A prompt's embeddings, on the CPU: text [77, C], pooled [P]; the same of the negative prompt with guidance."""

    text: Tensor
    pooled: Tensor
    negative_text: Tensor | None
    negative_pooled: Tensor | None
    negative_prompt: str


# --- the pipeline before the first picture ---------------------------------------------------------------------


def choose_device(
    precision: Precision = "auto", device: torch.device | None = None
) -> tuple[torch.device, torch.dtype]:
    """The fastest device here, and the dtype for it: with "auto" bfloat16 or float16 on CUDA, float32 elsewhere.

    device: has been chosen already, as where each of several processes has a GPU of its own.
    """
    if device is None:
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        device = torch.device("cuda" if torch.cuda.is_available() else mps)
    half = torch.float32
    if device.type == "cuda":
        half = torch.bfloat16 if has_bf16() else torch.float16
    return device, half if precision == "auto" else DTYPES[precision]


def prepare_device(
    pipe: Any, device: torch.device | str, offload: Offload = "none", *, compiled: bool = False
) -> None:
    """Move the pipeline, or let diffusers bring its parts to the device when they are needed.

    Load adapters before: under sequential offload the UNet has no weights that one could be compared with.

    Args:
        compiled: torch.compile the UNet's blocks, which happens at the first picture (see speed.compile_blocks).
    Raises: ConfigError for offload without a GPU, a DoRA under sequential offload, or for what cannot be compiled.
    """
    device = torch.device(device)
    refuse_offload(device, offload)
    if compiled and offload == "sequential":
        raise ConfigError(
            "--compile needs the UNet in one place: it cannot be used with --offload sequential."
        )
    prepare_kernels(device, pipe.unet.dtype, pipe.unet, pipe.vae)
    if compiled:
        compile_blocks(pipe.unet, device)
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        _offload_sequentially(pipe, device)


def refuse_offload(device: torch.device, offload: Offload) -> None:
    """Raises: ConfigError for offload without a GPU."""
    if offload not in ("none", "model", "sequential"):
        raise ConfigError(f"offload is none, model or sequential, not {offload!r}.")
    if offload != "none" and device.type == "cpu":
        raise ConfigError(
            f"--offload {offload} keeps parts of the model off a GPU, and no GPU is used here; leave it out."
        )


def _offload_sequentially(pipe: Any, device: torch.device) -> None:
    for adapter in loaded_adapters(pipe):
        if adapter.header.lora and adapter.header.lora.dora:
            # A hook brings a module's weights for its own forward, and DoRA's magnitudes read those of others
            raise ConfigError(
                f"{adapter.path} is a DoRA, which --offload sequential cannot run; use --offload model."
            )
    if needs_upcast(pipe.vae):  # once offloaded it cannot be cast any more
        _cast(pipe.vae, torch.float32)
    pipe.enable_sequential_cpu_offload(device=device)
    from accelerate.hooks import remove_hook_from_module

    # The hooks bring weights when a module's forward is called. Nobody calls that of a coefficient matrix, so alpha
    # would stay behind on the meta device; all alphas of SDXL together are 200 KB.
    for module in unwrapped(pipe.unet).modules():
        if isinstance(module, Coefficients):
            remove_hook_from_module(module)
            module.to(device)


def set_scheduler(pipe: Any, name: str) -> None:
    """Give the pipeline a scheduler of diffusers by name, on the noise schedule that the model was trained with.

    Args:
        name: what A1111, ComfyUI or kohya call it (see samplers.py), such as DPM++ 2M Karras; or a class name in any
            case, with or without "Scheduler" and "Discrete", or a beginning that only one has: euler,
            EulerAncestralDiscreteScheduler, euler-a, unipc, ddim, dpmsolver_multistep.
    Raises: ConfigError for a name that is none or more than one, and for a scheduler that cannot be used.
    """
    choices = schedulers(pipe)
    named = samplers.find_sampler(name)
    if isinstance(named, str):
        raise ConfigError(f"The scheduler {name!r} cannot be had: {named}. {_LISTED}")
    wanted = _scheduler_key(named.scheduler if named else name)
    found = [key for key in choices if key == wanted] or [
        key for key in choices if wanted and key.startswith(wanted)
    ]
    if len(found) != 1:
        usable = ", ".join(sorted(_scheduler_label(cls) for cls, lacks in choices.values() if not lacks))
        if found:
            several = " or ".join(sorted(_scheduler_label(choices[key][0]) for key in found))
            raise ConfigError(f"The scheduler {name!r} may be {several}. There are {usable}.")
        near = difflib.get_close_matches(wanted, [key for key in choices if not choices[key][1]], 1, 0.4)
        hint = f" Did you mean {_scheduler_label(choices[near[0]][0])}?" if near else ""
        raise ConfigError(
            f"diffusers has no scheduler {name!r} for this model.{hint} There are {usable}. {_LISTED}"
        )
    cls, lacks = choices[found[0]]
    if lacks:
        instead = " Without it there is DPM++ 2M SDE." if cls.__name__ == "DPMSolverSDEScheduler" else ""
        raise ConfigError(f"{cls.__name__} cannot be used: {lacks}.{instead}")
    accepted = inspect.signature(cls.__init__).parameters
    unknown = [key for key in named.spacing if key not in accepted] if named else []
    if unknown:
        raise ConfigError(
            f"The scheduler {name!r} cannot be had: {cls.__name__} of diffusers has no {unknown[0]}. Name it without "
            f"that, or another with it, such as DPM++ 2M Karras. {_LISTED}"
        )
    fixed = {
        # Defaults made for pixels between -1 and 1; latents go far beyond.
        "clip_sample": False,
        # SDXL's own values, lacking where its config was written by a scheduler that does not have them. Without
        # the first PNDM needs steps by the dozen.
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
        # What this one falls back to anyway, with a message on every call.
        "lower_order_final": True,
    }
    overrides = (dict(named.settings) if named else {}) | _noise_schedule(pipe.scheduler) | fixed
    # Spelled out, because from_config forgets values that were the old class's defaults.
    pipe.scheduler = cls.from_config(
        pipe.scheduler.config, **{key: value for key, value in overrides.items() if key in accepted}
    )


_LISTED = "A1111's and ComfyUI's names are listed by coeffdiff sample --list-schedulers."


def schedulers(pipe: Any) -> dict[str, tuple[Any, str]]:
    """What set_scheduler knows: short name -> class, and why it cannot be used here ("" if it can)."""
    # diffusers does not list LCM among them, although it reads the same configs
    known = {*pipe.scheduler.compatibles, type(pipe.scheduler), diffusers.LCMScheduler}
    return {_scheduler_key(cls.__name__): (cls, _why_not(cls, pipe.scheduler)) for cls in known}


def _why_not(cls: Any, current: Any) -> str:
    if isinstance(cls, DummyObject):
        missing = [name for name in cls._backends if importlib.util.find_spec(name) is None]
        return f"it needs {' and '.join(missing)} (pip install {' '.join(missing)})"
    accepted = inspect.signature(cls.__init__).parameters
    lost = [key for key, value in _noise_schedule(current).items() if value and key not in accepted]
    return f"it knows nothing of this model's {', '.join(lost)}" if lost else ""


def _noise_schedule(scheduler: Any) -> dict[str, Any]:
    """The part of a scheduler's config that the model was trained with."""
    trained_with = (
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
        *("prediction_type", "rescale_betas_zero_snr"),
    )
    return {key: scheduler.config[key] for key in trained_with if key in scheduler.config}


def _scheduler_key(name: str) -> str:
    return re.sub(r"scheduler$|[^a-z0-9]", "", name.strip().lower()).replace("discrete", "")


def _scheduler_label(cls: type) -> str:
    return cls.__name__.removesuffix("Scheduler").replace("Discrete", "")


# --- prompts ---------------------------------------------------------------------------------------------------


def fill_prompt(prompt: str, tokens: Sequence[str]) -> str:
    """The prompt with the adapters' one token in place of <V>. Raises: ConfigError unless one adapter is meant."""
    if not prompt.isascii() and any("\ud800" <= c <= "\udfff" for c in prompt):
        raise ConfigError(f"The prompt {ascii(prompt)[:80]} is not valid text; it must be UTF-8.")
    if PLACEHOLDER not in prompt:
        return prompt
    tokens = list(
        dict.fromkeys(tokens)
    )  # two adapters of one word are refused when they are loaded, with the reason
    if len(tokens) != 1:
        why = f"may mean {' or '.join(tokens)}" if tokens else "has no meaning without an adapter"
        raise ConfigError(
            f"{PLACEHOLDER} in the prompt {_short(prompt)} {why}; write the word itself instead."
        )
    return prompt.replace(PLACEHOLDER, tokens[0])


def warnings_for(
    prompts: Iterable[str],
    adapters: Sequence[tuple[Path, AdapterHeader]],
    pipe: Any,
    options: Options | None = None,
) -> list[str]:
    """A line for each thing about the prompts that the person may not have meant; pictures are made all the same.

    adapters: where each is and what it says of itself.
    """
    lines = []
    for prompt in dict.fromkeys(prompts):
        for path, header in adapters:
            if not any(holds(prompt, token) for token in header.tokens):
                subject = " ".join(filter(None, (header.token, header.class_word)))
                lines.append(
                    f"The prompt {_short(prompt)} lacks {' or '.join(header.tokens)}, the token of {path}; "
                    f'write for instance "a photo of {subject}".'
                )
        lines += length_warnings(prompt, pipe)
    if options and options.negative_prompt:
        if options.guidance <= 1:
            lines.append(
                f"The negative prompt has no effect without guidance, and {options.guidance:g} is none."
            )
        else:
            lines += length_warnings(options.negative_prompt, pipe)
    return lines


def length_warnings(text: str, pipe: Any) -> list[str]:
    """One line if the model does not read all of the text, or none: how long it is, and what is not read."""
    cuts = [
        cut
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
        if tokenizer is not None
        for cut in [_cut(text, tokenizer)]
        if cut
    ]
    if not cuts:
        return []
    tokens, limit, start = min(cuts, key=lambda cut: cut[2])
    return [
        f"{_short(text)} has {tokens} tokens, begin and end included, and the model reads {limit}; "
        f"it will not see {_short(text[start:], 200)}."
    ]


def _cut(text: str, tokenizer: Any) -> tuple[int, int, int] | None:
    """Tokens with begin and end, the limit, and where in the text the first word begins that is not read whole."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    room = tokenizer.model_max_length - 2
    if len(found.input_ids) <= room:
        return None
    start = found.offset_mapping[room][0]
    word = re.search(r"\S{0,30}$", text[:start])  # longer runs are a script without blanks
    return len(found.input_ids) + 2, tokenizer.model_max_length, word.start() if word else start


def _short(text: str, width: int = 60) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) > width:
        line = textwrap.shorten(line, width, placeholder="...")
        line = line if len(line) > 3 else text[: width - 3] + "..."
    return f'"{line}"'


def encode_prompts(
    pipe: Any, prompts: Iterable[str], *, negative_prompt: str = "", guidance: float = Options.guidance
) -> dict[str, Encoded]:
    """Each distinct prompt's embeddings, so that the text encoders may leave memory before `generate`.

    One prompt at a time, so that no embedding depends on its neighbours.
    """
    prompts = list(dict.fromkeys(prompts))
    if prompts and (pipe.tokenizer_2 is None or pipe.text_encoder_2 is None):
        raise ConfigError(
            "This pipeline has no text encoders, so it needs prompts that encode_prompts has encoded before."
        )
    for adapter in loaded_adapters(pipe) if pipe.unet is not None else ():
        adapter.verify_text(pipe)
    result: dict[str, Encoded] = {}
    negative: tuple[Tensor | None, Tensor | None] = (None, None)
    for prompt in prompts:
        with torch.no_grad(), quiet_libraries():  # length_warnings says better what is cut off
            embeddings = pipe.encode_prompt(
                prompt,
                do_classifier_free_guidance=guidance > 1,
                negative_prompt=(negative_prompt or None) if negative[0] is None else None,
                negative_prompt_embeds=negative[0],
                negative_pooled_prompt_embeds=negative[1],
            )
        text, negative_text, pooled, negative_pooled = embeddings
        negative = (negative_text, negative_pooled)
        parts = [None if t is None else t[0].cpu() for t in (text, pooled, *negative)]
        assert parts[0] is not None and parts[1] is not None
        result[prompt] = Encoded(parts[0], parts[1], parts[2], parts[3], negative_prompt)
    return result


# --- pictures --------------------------------------------------------------------------------------------------


def generate(
    pipe: Any,
    requests: Iterable[Request],
    options: Options = Options(),
    *,
    encoded: Mapping[str, Encoded] | None = None,
    on_progress: OnProgress | None = None,
) -> Generator[tuple[Request, Image.Image]]:
    """Pictures in the order of their requests, each made as it is asked for.

    Requests of unequal scale are never in one batch, and the first adapter has its own scale again afterwards.
    A picture's noise comes from its own seed only: it is drawn in float32 on the CPU, so that device, precision
    and batch do not change it. In float32 on a CPU a picture changes by at most 2/255 with the batch that it is
    made in, and in a batch of one it is what diffusers itself makes of this seed.

    Args:
        pipe: a StableDiffusionXLPipeline, in eval mode; text encoders may be None with `encoded`.
        encoded: from encode_prompts, for this negative prompt and guidance; by default encoded here, at once.
    Raises: ConfigError for a size that the model cannot make, or a scale without an adapter; InjectionError if an
        adapter has lost its alpha. While iterating: ModelError for a picture that is not finite.
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
    return _generate(pipe, requests, embeddings, options, size, on_progress)


def check_options(pipe: Any, options: Options) -> None:
    """Raises: ConfigError for a size or a number of steps that this model and scheduler cannot do."""
    picture_size(pipe, options)
    most = pipe.scheduler.config.get("num_train_timesteps", 1000)
    if options.steps > most:
        raise ConfigError(f"{options.steps} steps are more than the {most} that the model was trained with.")
    try:
        copy.deepcopy(pipe.scheduler).set_timesteps(options.steps)
    except ValueError as error:
        name = type(pipe.scheduler).__name__
        raise ConfigError(f"{name} cannot do {options.steps} steps: {str(error).splitlines()[0]}") from None


def picture_size(pipe: Any, options: Options) -> tuple[int, int]:
    """Width and height in pixels. Raises: ConfigError, with the nearest that is possible."""
    native = pipe.default_sample_size
    height, width = native if isinstance(native, list | tuple) else (native, native)
    sizes = []
    for name, asked, own in (("width", options.width, width), ("height", options.height, height)):
        pixels = own * pipe.vae_scale_factor if asked is None else asked
        _check_side(name, pixels, math.lcm(8, pipe.vae_scale_factor))
        sizes.append(pixels)
    return sizes[0], sizes[1]


def _encode_requests(pipe: Any, requests: Sequence[Request], options: Options) -> list[Encoded]:
    """The embeddings of each request: at scale 0 a learned token is read as the ordinary word that it was before."""
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
        raise ConfigError(f"The prompt {_short(request.prompt)} is not among those that were encoded.")
    if options.guidance > 1 and found.negative_text is None:
        raise ConfigError(f"The prompts were encoded without guidance, and {options.guidance:g} needs it.")
    if options.guidance > 1 and found.negative_prompt != options.negative_prompt:
        raise ConfigError(
            f"The prompts were encoded with the negative prompt {_short(found.negative_prompt)}, "
            f"not {_short(options.negative_prompt)}."
        )
    return found


def _generate(
    pipe: Any,
    requests: list[Request],
    embeddings: list[Encoded],
    options: Options,
    size: tuple[int, int],
    on_progress: OnProgress | None,
) -> Generator[tuple[Request, Image.Image]]:
    done = 0
    with _scales_kept(pipe) as use_scale:
        for batch in _batches(requests, options.batch_size):
            asked = [requests[i] for i in batch]
            use_scale(asked[0].scale)

            def denoised(part: float, done: int = done, count: int = len(asked)) -> None:
                if on_progress:
                    on_progress(done + part * count)

            latents = _denoise(pipe, asked, [embeddings[i] for i in batch], options, size, denoised)
            for request, latent in zip(asked, latents, strict=True):
                yield request, _decode(pipe, latent, request)
            pipe.maybe_free_model_hooks()
            done += len(asked)


def _batches(requests: Sequence[Request], batch_size: int) -> list[range]:
    """Neighbours of one scale, as many as fit."""
    batches = []
    for _, run in itertools.groupby(range(len(requests)), key=lambda i: requests[i].scale):
        indices = list(run)
        ends = range(indices[0], indices[-1] + 1, batch_size)
        batches += [range(start, min(start + batch_size, indices[-1] + 1)) for start in ends]
    return batches


@contextmanager
def _scales_kept(pipe: Any) -> Iterator[Callable[[float | None], None]]:
    """A function that gives the first adapter a scale, or with None its own, which it has again in the end."""
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
    # Each draws its initial noise, and then whatever its scheduler adds on the way.
    generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    if hasattr(pipe.scheduler, "noise_sampler_seed"):  # DPMSolverSDE has a generator of its own
        pipe.scheduler.noise_sampler_seed = [request.seed for request in requests]

    def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [t for t in tensors if t is not None]
        return torch.stack(present).to(device, dtype) if present else None

    guided = options.guidance > 1

    def after_step(_pipe: Any, step: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        denoised((step + 1) / pipe.num_timesteps)
        return {}

    with _without_bar(pipe):
        latents: Tensor = pipe(
            prompt_embeds=stacked([e.text for e in embeddings]),
            pooled_prompt_embeds=stacked([e.pooled for e in embeddings]),
            negative_prompt_embeds=stacked([e.negative_text for e in embeddings]) if guided else None,
            negative_pooled_prompt_embeds=stacked([e.negative_pooled for e in embeddings])
            if guided
            else None,
            guidance_scale=options.guidance,
            num_inference_steps=options.steps,
            width=width,
            height=height,
            latents=noise.to(dtype),
            generator=generators,
            callback_on_step_end=after_step,
            output_type="latent",  # diffusers' own decoding fails with a float32 VAE beside a half-precision UNet
        ).images
    return latents


@torch.no_grad()
def _decode(pipe: Any, latent: Tensor, request: Request) -> Image.Image:
    """One picture at a time: the VAE's activations are the peak of memory, and its batch would change pictures."""
    vae = pipe.vae
    _check_finite(latent, request, f"the UNet in {_dtype_name(pipe.unet)}", pipe)
    upcast = needs_upcast(vae) and not next(vae.parameters()).is_meta
    try:
        if upcast:
            _cast(vae, torch.float32)
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
        _check_finite(decoded, request, f"the VAE in {_dtype_name(vae)}", pipe)
    finally:
        if upcast:
            _cast(vae, torch.float16)
    if pipe.watermark is not None:
        decoded = pipe.watermark.apply_watermark(decoded)
    image: Image.Image = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
    return image


def needs_upcast(vae: Any) -> bool:
    """Whether the VAE says of itself that float16, in which it is, is too narrow."""
    return vae.dtype == torch.float16 and bool(vae.config.get("force_upcast"))


def _cast(vae: Any, dtype: torch.dtype) -> None:
    torch.nn.Module.to(vae, dtype)  # diffusers' own method warns about every cast


def _check_finite(tensor: Tensor, request: Request, source: str, pipe: Any) -> None:
    if tensor.isfinite().all():
        return
    cures = ["sample in another precision (--precision bf16 or fp32)"] if "16" in source else []
    if "VAE" in source and "float16" in source:
        cures.append("use a VAE that stands float16 (madebyollin/sdxl-vae-fp16-fix)")
    if loaded_adapters(pipe):
        cures.append("lower the adapter's scale")
    cures.append("try another scheduler or more steps")
    raise NonFinitePicture(
        f"The picture for {_short(request.prompt)}, seed {request.seed}, is not finite: {source} made NaN or "
        f"infinite numbers. To cure it, {', or '.join(cures)}."
    )


@contextmanager
def _without_bar(pipe: Any) -> Iterator[None]:
    """diffusers' progress bar off for this pipeline while it runs; the caller shows one."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**(before or {}))


def _dtype_name(network: Any) -> str:
    return str(network.dtype).removeprefix("torch.")


# --- files -----------------------------------------------------------------------------------------------------


def write_pictures(
    pipe: Any,
    requests: Iterable[Request],
    options: Options,
    folder: Path,
    *,
    encoded: Mapping[str, Encoded] | None = None,
    details: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    team: Team | None = None,
    ending: str = "",
    grid: bool = True,
) -> list[Path]:
    """Write each picture as soon as it is made, then all of them as one labelled grid, folder/GRID_FILE.

    Pictures of one scale are made one after the other, so that batches are full; names and grid keep the order of
    the requests.

    Args:
        details: goes into the recipes: the model's name and whatever else it takes to repeat a picture.
        overwrite: replace files of the same name; otherwise the new ones take the next free names.
        team: several processes that share the work, all called with equal arguments. A batch is made by one of
            them and is the batch that one process alone would make, so the pictures are the same bit for bit.
        ending: of the pictures' names, before .png.  grid: False leaves it to the caller.
    Returns: the pictures' files in the order of the requests, then the grid's.
    Raises: ConfigError if the folder cannot be written; and what generate raises.
    """
    requests, team = list(requests), team or Team()
    batches = plan(requests, options.batch_size)
    shares = batches[team.rank :: team.size]
    rounds = math.ceil(len(batches) / team.size)
    cell = _cell(requests)
    written: dict[int, tuple[Path, Image.Image]] = {}  # request -> its file, its place in the grid

    def made(done: float) -> None:
        if on_progress and team.size == 1:
            on_progress(done)
        elif on_progress:  # as if all were as fast as this one; the last ones are done when all have said so
            on_progress(min(len(requests) - 0.5, done * team.size))

    own = [i for share in shares for i in share]
    with closing(
        generate(pipe, [requests[i] for i in own], options, encoded=encoded, on_progress=made)
    ) as pictures:
        for number in range(rounds):
            share = shares[number] if number < len(shares) else []
            for i, (request, image) in zip(share, pictures, strict=False):
                file = folder / _file_name(i + 1, request, ending)
                file = file if overwrite else free_name(file)
                save_png(image, file, recipe(pipe, request, options, details))
                written[i] = file, fitted(image, cell)
            team.gather(None)  # after each round, so that an error of one ends all before the next
    for others in team.gather(written):
        written |= others
    files = [written[i][0] for i in range(len(requests))]
    if on_progress and team.size > 1:
        on_progress(len(requests))

    def write_grid() -> Path:
        sheet = folder / GRID_FILE
        sheet = sheet if overwrite else free_name(sheet)
        thumbnails = {requests[i]: thumbnail for i, (_, thumbnail) in written.items()}
        save_png(_grid(pipe, requests, thumbnails, cell), sheet)
        return sheet

    return [*files, team.from_main(write_grid)] if files and grid else files


def plan(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """Which requests are made at a time, one scale after the other: the work that several processes share."""
    order = {scale: n for n, scale in enumerate(dict.fromkeys(request.scale for request in requests))}
    by_scale = sorted(
        range(len(requests)), key=lambda i: order[requests[i].scale]
    )  # equal ones keep their order
    batches = _batches([requests[i] for i in by_scale], batch_size)
    return [[by_scale[i] for i in batch] for batch in batches]


def _file_name(number: int, request: Request, ending: str = "") -> str:
    slug = re.sub(r"\W+", "-", request.prompt)[:40].strip("-") or "picture"
    scale = "" if request.scale is None else f"-scale{request.scale:g}"
    return f"{number:03d}-{slug}-seed{request.seed}{scale}{ending}.png"


def _cell(requests: Sequence[Request]) -> int:
    """Side in pixels of a picture in the grid, which stays below some 2000 x 16000 where that is legible."""
    columns, rows = _axes(requests)
    return max(96, min(256, 2048 // max(1, len(columns)), 16384 // max(1, len(rows))))


def _axes(requests: Sequence[Request]) -> tuple[list[Any], list[Any]]:
    """The grid's columns and rows: seeds beside each other for each prompt, or scales for each prompt and seed."""
    if any(request.scale is not None for request in requests):
        rows: list[Any] = [(request.prompt, request.seed) for request in requests]
        columns: list[Any] = [request.scale for request in requests]
    else:
        rows, columns = [request.prompt for request in requests], [request.seed for request in requests]
    return list(dict.fromkeys(columns)), list(dict.fromkeys(rows))


def _grid(
    pipe: Any, requests: Sequence[Request], thumbnails: Mapping[Request, Image.Image], cell: int
) -> Image.Image:
    columns, rows = _axes(requests)
    if all(request.scale is None for request in requests):
        pictures = [(prompt, [thumbnails.get(Request(prompt, seed)) for seed in columns]) for prompt in rows]
        return labelled_grid(pictures, [f"seed {seed}" for seed in columns], cell=cell)
    seeds = {seed for _, seed in rows}
    labelled = [
        (
            f"{prompt}\nseed {seed}" if len(seeds) > 1 else prompt,
            [thumbnails.get(Request(prompt, seed, scale)) for scale in columns],
        )
        for prompt, seed in rows
    ]
    first, *others = loaded_adapters(pipe)
    beside = "".join(f", with {other.header.token} at {other.scale:g}" for other in others)
    heads = ["as loaded" if scale is None else f"scale {scale:g}" for scale in columns]
    return labelled_grid(labelled, heads, title=f"{first.header.token} at several scales{beside}", cell=cell)


def recipe(
    pipe: Any, request: Request, options: Options, details: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything that it takes to make this picture again, as plain values."""
    width, height = picture_size(pipe, options)
    return {
        "prompt": request.prompt,
        "negative_prompt": options.negative_prompt,
        "seed": request.seed,
        "steps": options.steps,
        "guidance": options.guidance,
        "scheduler": type(pipe.scheduler).__name__,
        **_scheduler_settings(pipe.scheduler),
        "prediction_type": pipe.scheduler.config.get("prediction_type"),
        "width": width,
        "height": height,
        "batch_size": options.batch_size,
        "model": str(pipe.config.get("_name_or_path") or "unknown"),
        "precision": _dtype_name(pipe.unet),
        "vae_precision": "float32" if needs_upcast(pipe.vae) else _dtype_name(pipe.vae),
        "device": pipe._execution_device.type,
        "adapters": [
            {
                "path": str(adapter.path),
                "scale": adapter.scale if number or request.scale is None else request.scale,
                "kind": adapter.header.kind,
                "token": adapter.header.token,
                "trained_steps": adapter.header.trained_steps,
            }
            for number, adapter in enumerate(loaded_adapters(pipe))
        ],
        "versions": {
            "coeffdiff": __version__,
            "torch": str(torch.__version__),
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        **(details or {}),
    }


def _scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """What a scheduler's class alone does not say, or nothing."""
    parameters = inspect.signature(type(scheduler).__init__).parameters
    found = samplers.used(scheduler, {name: one.default for name, one in parameters.items()})
    return {"scheduler_settings": found} if found else {}


# --- runs ------------------------------------------------------------------------------------------------------


def find_newest_run(runs: Path) -> Path:
    """The run under `runs` whose adapter is the newest. Raises: AdapterError, with what to do, if none has one."""
    finished = [file for file in runs.glob(f"*/adapter/{COEFF_FILE}") if file.is_file()]
    if finished:
        return max(finished, key=lambda file: (file.stat().st_mtime_ns, str(file))).parents[1]
    begun = sorted(config.parent for config in runs.glob("*/config.yaml"))
    if begun:
        raise AdapterError(
            f"No run under {runs} has finished yet ({', '.join(str(run) for run in begun[:3])}): continue one with "
            "coeffdiff train --resume, or name an adapter with --adapter."
        )
    raise AdapterError(
        f"There is no finished run under {runs}: train one with coeffdiff train --images photos/ --token sks, or "
        "name an adapter with --adapter (none for the bare model)."
    )
