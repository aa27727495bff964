"""How many numbers alpha has in well-known models, built without their weights from their public configs."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers as df
import pytest
import torch
import transformers as tf

import coeffdiff
from coeffdiff.pocket.model import build_unet

ROOT = Path(coeffdiff.__file__).parents[1]
CLIP_L = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
VIT_L = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 14,
}
BIG_G = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120}
BART = {
    "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12, "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072,
}  # fmt: skip
LLAMA_8B = {
    "vocab_size": 128_256, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14_336,
}  # fmt: skip
MODELS = {
    "ViT-B/16": lambda: tf.ViTModel(tf.ViTConfig()),
    "BERT-base": lambda: tf.BertModel(tf.BertConfig()),
    "BART-base": lambda: tf.BartModel(tf.BartConfig(**BART)),
    "CLIP-L/14, both towers": lambda: tf.CLIPModel(tf.CLIPConfig(text_config=CLIP_L, vision_config=VIT_L, projection_dim=768)),
    "Llama-3-8B": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA_8B)),
    "SDXL's UNet": lambda: build_unet("sdxl", device="meta"),
    "SDXL's text encoder": lambda: tf.CLIPTextModel(tf.CLIPTextConfig(**CLIP_L)),
    "SDXL's text encoder 2": lambda: tf.CLIPTextModelWithProjection(tf.CLIPTextConfig(**BIG_G, projection_dim=1280)),
    "SD 1.5's UNet": lambda: df.UNet2DConditionModel(cross_attention_dim=768),
    "SD 3 medium": lambda: df.SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
    ),
    "Flux.1 dev": lambda: df.FluxTransformer2DModel(guidance_embeds=True),
    "PixArt-alpha": lambda: df.PixArtTransformer2DModel(caption_channels=4096),
    "Wan 2.1 1.3B": lambda: df.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "Sana 1.6B, cross-attention": lambda: df.SanaTransformer2DModel(),
}  # fmt: skip


def table() -> dict[str, tuple[str, ...]]:
    """Rows of the README's: model, layers, numbers of alpha, share of the model's."""
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) % \|$", text, re.MULTILINE)
    return {name: tuple(rest) for name, *rest in rows}


@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_counts(name):
    """The README's table says what attach makes of the architecture."""
    with torch.device("meta"):
        model = MODELS[name]()
    size = sum(parameter.numel() for parameter in model.parameters())
    alphas = coeffdiff.attach(model, "cross" if "cross" in name else "all")
    count = sum(alpha.numel() for alpha in alphas.values())
    assert table()[name] == (str(len(alphas)), f"{count:,}", f"{100 * count / size:.2g}")


def test_the_table_has_no_other_rows():
    assert list(table()) == list(MODELS)
