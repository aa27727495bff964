"""SDXL's architecture in several sizes, built from configs alone: random weights, no download, nothing trained here."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import BpeTrainer

from coeffdiff.console import quiet_libraries
from coeffdiff.errors import ConfigError
from coeffdiff.files import appearing
from coeffdiff.seeding import generator_for

with quiet_libraries():  # already the import says what is not installed
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PredictionType = Literal["epsilon", "v_prediction"]
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77  # begin and end included, in every CLIP
_CHUNK = 1 << 22  # numbers drawn at a time: 16 MiB of float32 beside the weights, whatever their dtype
_SHARD = "20GB"  # one file a network, as on the hub; the writers stream, so it costs no memory


@dataclass(frozen=True)
class Size:
    """Keyword arguments of the four networks; what is not named has the library's default, as in SDXL."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    text_2: dict[str, Any]

    @property
    def native_resolution(self) -> int:
        """Side in pixels of the pictures that the UNet is made for."""
        return self.unet["sample_size"] * 2 ** (len(self.vae["block_out_channels"]) - 1)


def _unet(
    *,
    channels: tuple[int, ...],
    heads: tuple[int, ...],
    depths: tuple[int, ...],
    groups: int,
    text_width: int,
    pooled_width: int,
    time_id_width: int,
    sample_size: int,
    layers: int = 2,
) -> dict[str, Any]:
    """Three levels, of which the first has no attention, as in SDXL; of two levels both have it."""
    plain = len(channels) - 2
    return {
        "sample_size": sample_size,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",) * plain,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "transformer_layers_per_block": depths,
        # Despite its name diffusers reads this as the number of heads.
        "attention_head_dim": heads,
        "cross_attention_dim": text_width,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_id_width,
        # The pooled text, then six time ids: original size, crop, target size.
        "projection_class_embeddings_input_dim": pooled_width + 6 * time_id_width,
    }


def _vae(
    *, channels: tuple[int, ...], layers: int, groups: int, scaling: float, sample_size: int
) -> dict[str, Any]:
    return {
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "block_out_channels": channels,
        "layers_per_block": layers,
        "latent_channels": 4,
        "norm_num_groups": groups,
        "sample_size": sample_size,
        "scaling_factor": scaling,
        "force_upcast": True,
    }


def _text(
    *, vocabulary: int, width: int, layers: int, heads: int, projection: int, activation: str
) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": projection,
        "hidden_act": activation,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": 0,
        "pad_token_id": 1,
        # SDXL's own value. It is no token's id: transformers takes a 2 as "pool at the highest id", and the end
        # of text is the highest id of our tokenizers as of CLIP's, whatever the embedding's size.
        "eos_token_id": 2,
    }


SIZES: dict[str, Size] = {
    # For tests. Widths and head counts all differ, and the VAE has its own scaling factor, so that a transposed
    # axis or an SDXL number written into the code fails. The first level with attention is the widest: from there
    # LoRA must be able to overfit one latent although everything else is frozen and random.
    "tiny": Size(
        unet=_unet(
            channels=(12, 32, 24),
            heads=(1, 2, 4),
            depths=(1, 1, 2),
            groups=4,
            text_width=20 + 28,
            pooled_width=36,
            time_id_width=10,
            sample_size=8,
        ),
        vae=_vae(channels=(4, 8, 16, 16), layers=1, groups=4, scaling=0.8, sample_size=64),
        text=_text(vocabulary=514, width=20, layers=2, heads=5, projection=20, activation="quick_gelu"),
        text_2=_text(vocabulary=514, width=28, layers=3, heads=4, projection=36, activation="gelu"),
    ),
    # What the package ships, see build.py. Two levels, so that 16 x 16 and 8 x 8 both have attention; many narrow
    # heads, so that there is something to mix.
    "pocket": Size(
        unet=_unet(
            channels=(96, 160),
            heads=(6, 10),
            depths=(1, 1),
            layers=1,
            groups=8,
            text_width=96 + 128,
            pooled_width=128,
            time_id_width=32,
            sample_size=16,
        ),
        vae=_vae(channels=(24, 48, 96, 128), layers=1, groups=4, scaling=1.0, sample_size=128),
        text=_text(vocabulary=768, width=96, layers=3, heads=4, projection=128, activation="quick_gelu"),
        text_2=_text(vocabulary=768, width=128, layers=3, heads=4, projection=128, activation="gelu"),
    ),
    # The public configs of stabilityai/stable-diffusion-xl-base-1.0.
    "sdxl": Size(
        unet=_unet(
            channels=(320, 640, 1280),
            heads=(5, 10, 20),
            depths=(1, 2, 10),
            groups=32,
            text_width=768 + 1280,
            pooled_width=1280,
            time_id_width=256,
            sample_size=128,
        ),
        vae=_vae(channels=(128, 256, 512, 512), layers=2, groups=32, scaling=0.13025, sample_size=1024),
        text=_text(vocabulary=49408, width=768, layers=12, heads=12, projection=768, activation="quick_gelu"),
        text_2=_text(vocabulary=49408, width=1280, layers=32, heads=20, projection=1280, activation="gelu"),
    ),
}

# As in SDXL's scheduler_config.json; the prediction type is added.
_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
}


def size_named(name: str) -> Size:
    """Raises: ConfigError for a name that is not in SIZES."""
    try:
        return SIZES[name]
    except KeyError:
        raise ConfigError(f"There is no model size {name!r}; the sizes are {', '.join(SIZES)}.") from None


def unet_config(size: str) -> dict[str, Any]:
    """A copy of the UNet's keyword arguments, the caller's to change. Raises: ConfigError for an unknown size."""
    return copy.deepcopy(size_named(size).unet)


def vae_config(size: str) -> dict[str, Any]:
    """A copy of the VAE's keyword arguments. Raises: ConfigError for an unknown size."""
    return copy.deepcopy(size_named(size).vae)


def text_configs(size: str) -> tuple[CLIPTextConfig, CLIPTextConfig]:
    """The two text encoders' configs. Raises: ConfigError for an unknown size."""
    found = size_named(size)
    return CLIPTextConfig(**found.text), CLIPTextConfig(**found.text_2)


def tokenizer_pair(words: Sequence[str] = ()) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Two CLIP tokenizers over bytes, with merges that make one token of each of `words`: any text encodes.

    The ids are CLIP's first 512 (the 256 bytes, then the same as the last byte of a word), then what was merged,
    then begin and end of text, which is the highest id. The first pads with end of text and the second with "!"
    (id 0), as in SDXL. Without words there are no merges: one token a byte.
    """
    symbols = _byte_symbols()
    merges = _merges(words, symbols)
    known = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *("".join(pair) for pair in merges),
        BEGIN,
        END,
    ]
    vocabulary = {word: number for number, word in enumerate(known)}
    first, second = (
        CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), pad_token=pad, model_max_length=MAX_TOKENS)
        for pad in (END, "!")
    )
    return first, second


def _merges(words: Sequence[str], symbols: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges in order, learned until each word is whole."""
    if not words:
        return []
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = WhitespaceSplit()
    trainer = BpeTrainer(
        vocab_size=2 * len(symbols) + sum(map(len, words)),  # more than it can need
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=list(symbols),
        # Ties between pairs go by ids. Letters that end a word would get theirs in an order that changes from call
        # to call (tokenizers 0.23), unless they are known from the start.
        special_tokens=[symbol + "</w>" for symbol in symbols],
        show_progress=False,
    )
    learner.train_from_iterator(sorted(words), trainer)
    return [(first, second) for first, second in json.loads(learner.to_str())["model"]["merges"]]


def _byte_symbols() -> list[str]:
    """The visible character that byte-level BPE writes for each byte, in CLIP's order (so "!" comes first).

    Bytes that Latin-1 prints stand for themselves; the other 68 take the code points from 256 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = 256 - len(visible)
    return [chr(code) for code in visible] + [chr(256 + extra) for extra in range(hidden)]


def build_unet(size: str, *, device: str = "cpu", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The UNet alone, with the weights that build_pipeline gives it; on "meta" it has shapes and no weights."""
    unet = _on_meta(UNet2DConditionModel, unet_config(size))
    return unet if device == "meta" else _fill(unet, ("unet", seed), dtype).to(device)


def parameter_count(size: str) -> int:
    """Numbers in all four networks, counted without memory for them. Raises: ConfigError for an unknown size."""
    return sum(weight.numel() for network in _networks(size).values() for weight in network.parameters())


def build_pipeline(
    size: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    prediction_type: PredictionType = "epsilon",
) -> StableDiffusionXLPipeline:
    """A complete pipeline with random weights, on CPU, in eval mode.

    Every tensor is drawn in float32 from a generator of its own, seeded by (seed, network, name), and rounded to
    dtype as it is written: the global random state stays as it was, and full-size SDXL needs its own weights'
    memory and 16 MiB more.

    Args:
        size: a key of SIZES.
        dtype: of all four networks, the VAE included (see coeffdiff.backbone for how it is loaded).
        prediction_type: goes into the scheduler's config.
    Raises: ConfigError for an unknown size or prediction type.
    """
    scheduler = euler_scheduler(prediction_type)
    tokenizer, tokenizer_2 = tokenizer_pair()
    return StableDiffusionXLPipeline(
        **{name: _fill(network, (name, seed), dtype) for name, network in _networks(size).items()},
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def save_random(
    size: str,
    folder: Path | str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    prediction_type: PredictionType = "epsilon",
    variant: str | None = None,
) -> Path:
    """Write build_pipeline(...) as a diffusers folder, tokenizers included, and return its path.

    The folder appears under its name only when it is complete. variant ("fp16") goes into the weights' file names.

    Raises: ConfigError if the folder exists or cannot be written.
    """
    folder = Path(folder)
    size_named(size), euler_scheduler(prediction_type)  # refused before minutes of drawing
    refuse_existing(folder)
    try:
        with appearing(folder) as unfinished, quiet_libraries():
            unfinished.mkdir()
            pipe = build_pipeline(size, seed=seed, dtype=dtype, prediction_type=prediction_type)
            pipe.save_pretrained(unfinished, safe_serialization=True, variant=variant, max_shard_size=_SHARD)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}{where}.") from error
    return folder


def refuse_existing(folder: Path) -> None:
    """Raises: ConfigError if there is anything at this path."""
    if os.path.lexists(folder):
        raise ConfigError(f"{folder} already exists; nothing is overwritten, so give a folder that does not.")


def euler_scheduler(prediction_type: PredictionType = "epsilon") -> EulerDiscreteScheduler:
    """SDXL's own. Raises: ConfigError for an unknown prediction type."""
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ConfigError(f"The prediction type {prediction_type!r} is neither epsilon nor v_prediction.")
    return EulerDiscreteScheduler(**_SCHEDULER, prediction_type=prediction_type)


def _networks(size: str) -> dict[str, Any]:
    """The four networks of a size, on meta."""
    text, text_2 = text_configs(size)
    return {
        "text_encoder": _on_meta(CLIPTextModel, text),
        "text_encoder_2": _on_meta(CLIPTextModelWithProjection, text_2),
        "vae": _on_meta(AutoencoderKL, vae_config(size)),
        "unet": _on_meta(UNet2DConditionModel, unet_config(size)),
    }


def _on_meta(network: type, config: Any) -> Any:
    """The network with shapes and no memory; its own initialization would cost minutes and be thrown away."""
    with torch.device("meta"):
        return network(**config) if isinstance(config, dict) else network(config)


@torch.no_grad()
def _fill(network: Any, seed: tuple[object, ...], dtype: torch.dtype) -> Any:
    """Give a network from _on_meta memory and random weights in dtype, scaled so that activations keep their size.

    Matrices and convolutions: normal / sqrt(inputs of an output), and 3 x 3 convolutions 1.68 times that, because
    SiLU comes before them and keeps 0.355 of a normal's second moment. Embeddings: normal. Norms: one. Biases: zero.
    """
    # Not network.to(dtype): diffusers' own warns about every cast.
    network = torch.nn.Module.to(network, dtype).to_empty(device="cpu")
    for prefix, module in network.named_modules():
        for name, weight in module.named_parameters(prefix, recurse=False):
            if name.endswith("bias"):
                weight.zero_()
            elif weight.ndim == 1:
                weight.fill_(1.0)
            else:
                inputs = 1 if isinstance(module, torch.nn.Embedding) else weight[0].numel()
                after_silu = weight.shape[2:] == (3, 3)
                _draw(weight, (1.68 if after_silu else 1.0) * inputs**-0.5, generator_for(*seed, name))
            weight.requires_grad_(False)
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if not name.endswith("position_ids"):
                raise NotImplementedError(f"nothing is known about the buffer {name}")
            buffer.copy_(torch.arange(buffer.shape[-1]))
    return network.eval()


def _draw(weight: torch.Tensor, scale: float, generator: torch.Generator) -> None:
    flat = weight.view(-1)
    for part in flat.split(_CHUNK):
        part.copy_(torch.randn(len(part), generator=generator).mul_(scale))
