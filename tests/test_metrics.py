"""Similarity of pictures: by hand, and through a ViT in the hub's own format."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from coeffdiff.errors import ModelError
from coeffdiff.metrics import load_dino, mean_pairwise_cosine


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder as the hub holds it: random weights, 32 pixels."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=32,
        patch_size=8,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def test_mean_pairwise_cosine_by_hand():
    """(1, 0) and (0, 1) against (1, 0) and (0.6, 0.8): cosines 1, 0.6, 0, 0.8, mean 0.6."""
    pictures = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    photos = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert mean_pairwise_cosine(pictures, photos) == pytest.approx(0.6)


def test_features_are_of_unit_length_whatever_the_picture(vit):
    """Any size and mode, and the batch does not matter."""
    encoder = load_dino(vit)
    pictures = [
        Image.new("RGB", (50, 20), "red"), Image.new("L", (32, 32), 90), Image.new("RGBA", (7, 90), (1, 250, 9, 128)),
    ]  # fmt: skip
    features = encoder.features(pictures)
    assert features.shape == (3, 24) and features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(encoder.features(pictures, batch_size=1), features)
    assert mean_pairwise_cosine(features[:1], features[:1]) == pytest.approx(1.0)
    assert not torch.allclose(features[0], features[1], atol=1e-3)


def test_features_are_the_class_token_of_normalised_pixels(vit):
    """By hand: grey 127.5 / 255 is 0 after (x - 0.5) / 0.5, and the network's first token is normalised."""
    network = ViTModel.from_pretrained(vit, add_pooling_layer=False)
    pixels = torch.full((1, 3, 32, 32), 51 / 255 / 0.5 - 1.0)
    with torch.no_grad():
        token = network(pixel_values=pixels).last_hidden_state[:, 0]
    got = load_dino(vit).features([Image.new("RGB", (32, 32), (51, 51, 51))])
    torch.testing.assert_close(got, torch.nn.functional.normalize(token, dim=-1), atol=1e-5, rtol=1e-4)


def test_an_encoder_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_dino(str(tmp_path / "nowhere"))
