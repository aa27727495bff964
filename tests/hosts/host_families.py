"""Tiny random models of each family that hosts/any_model is for, with inputs."""

from __future__ import annotations

import diffusers as df
import torch
import transformers as tf
from attention_oracle import flat, sharpened
from torch import nn

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TOWN = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WORDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 2, 0]])
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
IMAGE = {"image_size": 8, "patch_size": 4}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2}


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(channels=4, side=4, text=16, **others):
    """What a denoiser is given."""
    given = {"timestep": torch.tensor([3, 7]), "encoder_hidden_states": noise(2, 5, text, seed=2)}
    return {"hidden_states": noise(2, channels, side, side)} | given | others


def unet(channels=4, **others):
    """A UNet of Stable Diffusion 1.5's kind: one block with attention, one in the middle, 2 + 2 + 4 + ... layers."""
    sizes = {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "cross_attention_dim": 16,
    }
    kinds = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    model = df.UNet2DConditionModel(
        in_channels=channels, sample_size=8, **sizes | kinds | {"attention_head_dim": 2} | others
    )
    inputs = step(channels, 8)
    return model, {"sample": inputs.pop("hidden_states")} | inputs


def kandinsky():
    """Attention over image and text at once, after a norm of its own."""
    model, inputs = unet(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), attention_head_dim=8,
        resnet_time_scale_shift="scale_shift", addition_embed_type="image", addition_embed_type_num_heads=2,
        encoder_hid_dim=12, encoder_hid_dim_type="image_proj",
    )  # fmt: skip
    inputs["added_cond_kwargs"] = {"image_embeds": noise(2, 12)}
    return model, inputs | {"encoder_hidden_states": None}


def unet2d():
    config = {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_head_dim": 8,
    }
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return df.UNet2DModel(sample_size=8, **config, **blocks), {"sample": noise(2, 3, 8, 8), "timestep": 3}


def pixart():
    config = DIT | {"cross_attention_dim": 16, "caption_channels": 16, "sample_size": 4, "norm_num_groups": 1}
    mask = {"encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])}
    return df.PixArtTransformer2DModel(**config), step(
        **mask, added_cond_kwargs={"resolution": None, "aspect_ratio": None}
    )


def sd3():
    """With the second, image-only attention of Stable Diffusion 3.5 in one block, and normalised queries."""
    config = DIT | {
        "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 12, "sample_size": 4,
        "out_channels": 4, "pos_embed_max_size": 4, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }  # fmt: skip
    return df.SD3Transformer2DModel(**config), step(pooled_projections=noise(2, 12))


def flux():
    config = {k: v for k, v in DIT.items() if k != "patch_size"} | {
        "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16, "pooled_projection_dim": 12, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    ids = {"img_ids": torch.ones(6, 3).cumsum(0), "txt_ids": torch.zeros(5, 3)}
    inputs = step(pooled_projections=noise(2, 12), **ids)
    return df.FluxTransformer2DModel(**config), inputs | {"hidden_states": noise(2, 6, 4)}


def sana():
    config = DIT | {
        "num_cross_attention_heads": 4, "cross_attention_head_dim": 4, "cross_attention_dim": 16, "caption_channels": 16,
        "sample_size": 4, "out_channels": 4,
    }  # fmt: skip
    return df.SanaTransformer2DModel(**config), step()


def auraflow():
    config = {k: v for k, v in DIT.items() if k != "num_layers"} | {
        "num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": 16, "caption_projection_dim": 16,
        "sample_size": 4, "pos_embed_max_size": 16,
    }  # fmt: skip
    return df.AuraFlowTransformer2DModel(**config), step()


def wan(**others):
    config = {k: v for k, v in DIT.items() if k != "patch_size"} | {
        "attention_head_dim": 12, "text_dim": 16, "freq_dim": 8, "ffn_dim": 24, "out_channels": 4,
    }  # fmt: skip
    return df.WanTransformer3DModel(**config | others), step() | {"hidden_states": noise(2, 4, 1, 4, 4)}


class Reader(nn.Module):
    """Somebody's own model: torch's attention with and without its weights asked for, keys of other widths, a bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.MultiheadAttention(16, 4, add_bias_kv=True)
        self.second = nn.MultiheadAttention(16, 2, kdim=6, vdim=10, batch_first=True)

    def forward(self, x, keys, values, blocked):
        x = x + self.first(x, x, x, need_weights=False)[0]
        y, weights = self.second(x, keys, values, key_padding_mask=blocked, average_attn_weights=False)
        return x + y, weights


def reader():
    blocked = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    return Reader(), {
        "x": noise(2, 4, 16),
        "keys": noise(2, 5, 6),
        "values": noise(2, 5, 10),
        "blocked": blocked,
    }


def encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2), {"src": noise(2, 6, 16), "src_key_padding_mask": PADDED == 0}


def translator():
    model = nn.Transformer(16, 4, 1, 2, 24, batch_first=True)
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    return model, {"src": noise(2, 6, 16), "tgt": noise(2, 4, 16), "tgt_mask": causal, "tgt_is_causal": True}


class Classifier(nn.Module):
    """A model of transformers inside of somebody's own, whose head attends too."""

    def __init__(self):
        super().__init__()
        self.body = tf.BertModel(tf.BertConfig(**TOWN, **SIZE))
        self.head = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, ids, mask):
        found = self.body(ids, attention_mask=mask).last_hidden_state
        return self.head(found[:, :1], found, found, key_padding_mask=mask == 0)[0]


class GroupedAttention(nn.Module):
    """Somebody's own: two heads share a key, and a learned bias falls on the scores."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.q, self.k, self.v = 4, nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 12)
        self.bias = nn.Parameter(torch.zeros(4, 5, 5))

    def forward(self, x):
        q, k, v = (
            part(x).unflatten(-1, (count, -1)).transpose(1, 2)
            for part, count in ((self.q, 4), (self.k, 2), (self.v, 2))
        )
        return nn.functional.scaled_dot_product_attention(q, k, v, self.bias, enable_gqa=True).transpose(1, 2)


def text(**others):
    return {"input_ids": WORDS, "attention_mask": PADDED} | others


def gptj():
    config = tf.GPTJConfig(**TOWN, n_embd=16, n_layer=2, n_head=4, rotary_dim=2, n_positions=16)
    return tf.GPTJModel(config), text()


def vilt():
    config = tf.ViltConfig(**SIZE, **IMAGE, vocab_size=40, num_images=1, max_image_length=-1)
    return tf.ViltModel(config), text(pixel_values=noise(2, 3, 8, 8), pixel_mask=torch.ones(2, 8, 8))


def swin2():
    config = tf.Swinv2Config(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=2
    )
    return tf.Swinv2Model(config), {"pixel_values": noise(2, 3, 16, 16)}


def siglip():
    """Layers that call the interface, and a pooling head of torch's attention."""
    return tf.SiglipVisionModel(tf.SiglipVisionConfig(**SIZE, **IMAGE)), {"pixel_values": noise(2, 3, 8, 8)}


def blip():
    return tf.BlipVisionModel(tf.BlipVisionConfig(**SIZE, **IMAGE)), {"pixel_values": noise(2, 3, 8, 8)}


# name: (model and inputs, layers with alpha, targets)
FAMILIES = {
    "sd15": (unet, 8, "all"),
    "sd21": (lambda: unet(attention_head_dim=(1, 4), use_linear_projection=True), 8, "all"),
    "sd15-inpainting": (lambda: unet(9, out_channels=4), 8, "all"),
    "kandinsky2": (kandinsky, 4, "all"),
    "unet2d": (unet2d, 4, "all"),
    "pixart": (pixart, 4, "all"),
    "sd3": (sd3, 3, "all"),
    "flux": (flux, 2, "all"),
    "sana": (sana, 2, "cross"),
    "auraflow": (auraflow, 2, "all"),
    "wan": (wan, 4, "all"),
    "multihead": (reader, 2, "all"),
    "encoder": (encoder, 2, "all"),
    "transformer": (translator, 5, "all"),
    "own": (lambda: (nn.Sequential(GroupedAttention()), {"input": noise(2, 5, 16)}), 1, "all"),
    "bert-and-multihead": (lambda: (Classifier(), {"ids": WORDS, "mask": PADDED}), 3, "all"),
    "siglip": (siglip, 3, "all"),
    "mpnet": (lambda: (tf.MPNetModel(tf.MPNetConfig(**TOWN, **SIZE)), text()), 2, "all"),
    "blip": (blip, 2, "all"),
    "vilt": (vilt, 2, "all"),
    "gptj": (gptj, 2, "all"),
    "swinv2": (swin2, 4, "all"),
    "deberta": (lambda: (tf.DebertaV2Model(tf.DebertaV2Config(**TOWN, **SIZE)), text()), 2, "all"),
    "bloom": (
        lambda: (tf.BloomModel(tf.BloomConfig(**TOWN, hidden_size=16, n_layer=2, n_head=4)), text()),
        2,
        "all",
    ),
    "falcon": (lambda: (tf.FalconModel(tf.FalconConfig(**TOWN, **SIZE, alibi=False)), text()), 2, "all"),
}
# Their rotary positions or their softmax run in float32 whatever the model's precision is, in the model's own code too
FLOAT32_INSIDE = {"flux", "wan", "gptj", "bloom"}


def build(name):
    torch.manual_seed(0)
    model, inputs = FAMILIES[name][0]()
    return sharpened(model), inputs


def outputs(model, inputs):
    torch.manual_seed(0)  # ViLT draws the order of its patches
    return flat(model(**inputs))
