"""SDXL's architecture in several sizes, and Stable Diffusion 1.5's: the configs of networks and schedulers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

from coeffdiff.errors import ConfigError
from coeffdiff.method.families import Family, family_of_unet
from coeffdiff.utils.console import quiet_libraries

with quiet_libraries():  # the import itself prints notes on missing packages
    from diffusers import EulerDiscreteScheduler, PNDMScheduler
    from transformers import CLIPTextConfig

PredictionType = Literal["epsilon", "v_prediction"]
MAX_TOKENS = 77  # begin and end included, in every CLIP
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


@dataclass(frozen=True)
class Size:
    """Keyword arguments of the networks; all others have the library's default, as in the public models.

    text_2: None in Stable Diffusion 1.5, which has one text encoder.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    text_2: dict[str, Any] | None

    @property
    def family(self) -> Family:
        return family_of_unet(self.unet)

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
    attended: int = 2,
) -> dict[str, Any]:
    """The last `attended` levels have attention, as SDXL's last two of three have."""
    plain = len(channels) - attended
    return {
        "sample_size": sample_size,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * attended,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("CrossAttnUpBlock2D",) * attended + ("UpBlock2D",) * plain,
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


def _sd15_unet(*, channels: tuple[int, ...], groups: int, text_width: int, **others: Any) -> dict[str, Any]:
    """All levels but the last have attention, each with as many heads."""
    attended = len(channels) - 1
    return {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D",) * attended + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attended,
        "block_out_channels": channels,
        "layers_per_block": 2,
        "norm_num_groups": groups,
        "attention_head_dim": 8,  # the number of heads, despite its name
        "cross_attention_dim": text_width,
        **others,
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


# Of the two sizes for tests
_TEST_VAE = _vae(channels=(4, 8, 16, 16), layers=1, groups=4, scaling=0.8, sample_size=64)
_TEST_TEXT = _text(vocabulary=514, width=20, layers=2, heads=5, projection=20, activation="quick_gelu")
_TEST_TEXT_2 = _text(vocabulary=514, width=28, layers=3, heads=4, projection=36, activation="gelu")

SIZES: dict[str, Size] = {
    # For tests that only need a whole model: a quarter of tiny's layers, so several times faster to load, to train
    # and to sample from.
    "micro": Size(
        unet=_unet(
            channels=(12, 32),
            heads=(1, 4),
            depths=(1, 1),
            layers=1,
            attended=1,
            groups=4,
            text_width=20 + 28,
            pooled_width=36,
            time_id_width=10,
            sample_size=8,
        ),
        vae=_TEST_VAE,
        text=_TEST_TEXT,
        text_2=_TEST_TEXT_2,
    ),
    # For tests of all that a model is built of. Widths and head counts all differ, and the VAE has its own scaling
    # factor, so that a transposed axis or an SDXL number written into the code fails. The first level with attention
    # is the widest: from there LoRA must be able to overfit one latent although all else is frozen and random.
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
        vae=_TEST_VAE,
        text=_TEST_TEXT,
        text_2=_TEST_TEXT_2,
    ),
    # What the package ships, see README.md. As in SDXL the finest level has no attention, and most transformer blocks
    # lie at the coarsest and in the middle: 56 attention layers with 5,600 alphas, 76 % of the numbers in these blocks.
    # Many narrow heads, so that there is something to mix.
    "pocket": Size(
        unet=_unet(
            channels=(96, 160),
            heads=(6, 10),
            depths=(1, 7),
            layers=1,
            attended=1,
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
    # Stable Diffusion 1.5's architecture: for tests, and the public configs.
    "sd15-micro": Size(
        unet=_sd15_unet(
            channels=(32, 12),
            groups=4,
            text_width=20,
            sample_size=8,
            attention_head_dim=4,
        ),
        vae=_TEST_VAE,
        text=_TEST_TEXT,
        text_2=None,
    ),
    "sd15": Size(
        unet=_sd15_unet(channels=(320, 640, 1280, 1280), groups=32, text_width=768),
        vae=_vae(channels=(128, 256, 512, 512), layers=2, groups=32, scaling=0.18215, sample_size=512),
        text=_text(vocabulary=49408, width=768, layers=12, heads=12, projection=768, activation="quick_gelu"),
        text_2=None,
    ),
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


def text_configs(size: str) -> tuple[CLIPTextConfig, ...]:
    """The text encoders' configs. Raises: ConfigError for an unknown size."""
    configs = size_named(size)
    return tuple(CLIPTextConfig(**text) for text in (configs.text, configs.text_2) if text)


def euler_scheduler(prediction_type: PredictionType = "epsilon") -> EulerDiscreteScheduler:
    """SDXL's own scheduler. Raises: ConfigError for an unknown prediction type."""
    _check_prediction(prediction_type)
    return EulerDiscreteScheduler(**_SCHEDULER, prediction_type=prediction_type)


def pndm_scheduler(prediction_type: PredictionType = "epsilon") -> PNDMScheduler:
    """Stable Diffusion 1.5's own scheduler. Raises: ConfigError for an unknown prediction type."""
    _check_prediction(prediction_type)
    return PNDMScheduler(
        **{
            key: _SCHEDULER[key] for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
        },
        steps_offset=1,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )


def _check_prediction(prediction_type: str) -> None:
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ConfigError(f"The prediction type {prediction_type!r} is neither epsilon nor v_prediction.")
