"""Tiny random encoders in the hub's format, and examples that they can tell apart."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

# 2 layers of 4 heads, 16 wide
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
WORDS = ["[PAD]", "[UNK]", "sun", "rain", "snow", *(f"word{number}" for number in range(20))]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with bert (texts), vit (pictures of 8 pixels), siglip (both), bart (encoder-decoder), resnet
    (no attention)."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    texts = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    pictures = tf.ViTImageProcessor(size={"height": 8, "width": 8})
    bart = tf.BartConfig(
        vocab_size=len(WORDS), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
    )  # fmt: skip
    resnet = tf.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    bert = tf.BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **SIZE)
    siglip = tf.SiglipConfig(
        text_config={"vocab_size": len(WORDS), "eos_token_id": 1, "bos_token_id": 1, **SIZE},
        vision_config={"image_size": 8, "patch_size": 4, **SIZE},
    )
    for name, model, processor in (
        ("bert", tf.BertModel(bert), texts),
        ("bart", tf.BartModel(bart), texts),
        ("vit", tf.ViTForImageClassification(tf.ViTConfig(image_size=8, patch_size=4, **SIZE)), pictures),
        ("siglip", tf.SiglipModel(siglip), pictures),
        ("resnet", tf.ResNetModel(resnet), pictures),
    ):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def weather(tmp_path_factory):
    """A CSV of three classes, twelve texts each: the class's own word among two that say nothing."""
    file = tmp_path_factory.mktemp("texts") / "weather.csv"
    draw = torch.Generator().manual_seed(0)
    rows = ["text,label"]
    for name in ("sun", "rain", "snow"):
        for _ in range(12):
            noise = [f"word{number}" for number in torch.randint(20, (2,), generator=draw).tolist()]
            rows.append(f"{' '.join([name, *noise, name])},{name}")
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def shades(tmp_path):
    """A folder of two class folders, four pictures each: dark and light."""
    for name, base in (("dark", 20), ("light", 200)):
        (tmp_path / "shades" / name).mkdir(parents=True)
        for number in range(4):
            shade = (base + 5 * number, base, base)
            Image.new("RGB", (8, 8), shade).save(tmp_path / "shades" / name / f"{number}.png")
    return tmp_path / "shades"
