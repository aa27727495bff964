"""Scores of pictures: by hand, and through a ViT and a CLIP in the hub's own format."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, ViTModel

from coeffdiff.errors import ModelError, ShapeError
from coeffdiff.metrics.encoders import Encoders, encoders_for, load_clip, load_dino
from coeffdiff.metrics.features import diversity, drift, mean_cosine_among, mean_pairwise_cosine
from coeffdiff.metrics.pictures import plain_text, references_of, score_pictures
from coeffdiff.pocket import POCKET_CLIP, POCKET_DINO, shipped
from coeffdiff.pocket.model import tokenizer_pair


def pictures_of(count: int, seed: int, side: int = 32) -> list[Image.Image]:
    noise = np.random.default_rng(seed)
    return [Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


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


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def raw_dino(folder: str, pictures: list[Image.Image]) -> np.ndarray:
    """Class tokens as the network gives them: of any length, one picture at a time, pixels prepared here."""
    network = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    rows = []
    for picture in pictures:
        pixels = torch.tensor(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        with torch.no_grad():
            rows.append(network(pixel_values=pixels).last_hidden_state[0, 0].double().numpy())
    return np.array(rows)


def raw_clip(folder: str, pictures: list[Image.Image], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    network = CLIPModel.from_pretrained(folder)
    mean, std = (
        np.array(v, dtype=np.float32)
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    seen, read = [], []
    with torch.no_grad():
        for picture in pictures:
            pixels = torch.tensor((np.asarray(picture, dtype=np.float32) / 255 - mean) / std)
            found = network.vision_model(pixel_values=pixels.permute(2, 0, 1)[None]).pooler_output
            seen.append(network.visual_projection(found)[0].double().numpy())
        for text in texts:
            ids = torch.tensor([tokenizer_pair()[0](text).input_ids])
            read.append(
                network.text_projection(network.text_model(input_ids=ids).pooler_output)[0].double().numpy()
            )
    return np.array(seen), np.array(read)


def test_every_score_agrees_with_an_independent_computation(vit, clip):
    """Four pictures, three photos (two with masks): the definitions as double loops over raw features, in numpy."""
    pictures, photos = pictures_of(4, seed=1), pictures_of(3, seed=2)
    texts = ["a photo of a ball", "a photo of a ball", "a ball at night", "a ball at night"]
    left = np.zeros((32, 32), dtype=np.uint8)
    left[:, :16] = 255
    masks = [Image.fromarray(left), None, Image.fromarray(left.T.copy())]
    encoders = Encoders(load_dino(vit), load_clip(clip))
    references = references_of(encoders, photos, masks)
    got = score_pictures(encoders, references, pictures, texts)

    cut = []
    for photo, mask in ((photos[0], left), (photos[2], left.T)):
        pixels = np.asarray(photo).copy()
        pixels[mask == 0] = 128
        cut.append(Image.fromarray(pixels))
    dino = {name: raw_dino(vit, list(of)) for name, of in (("p", pictures), ("r", photos), ("c", cut))}
    seen, read = raw_clip(clip, pictures, texts)
    clips = {"p": seen, "r": raw_clip(clip, photos, [])[0], "c": raw_clip(clip, cut, [])[0]}
    expected = {}
    for name, features in (("dino", dino), ("clip_i", clips)):
        for key, to in ((name, "r"), (f"{name}_masked", "c")):
            expected[key] = np.mean([cosine(p, r) for p in features["p"] for r in features[to]])
    expected["clip_t"] = np.mean([cosine(p, t) for p, t in zip(seen, read, strict=True)])
    assert got == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in expected.values()}) == 5  # or a mix-up would pass

    features = encoders.dino.features(pictures)
    by_prompt = np.mean([1 - cosine(dino["p"][0], dino["p"][1]), 1 - cosine(dino["p"][2], dino["p"][3])])
    assert diversity([features[:2], features[2:]]) == pytest.approx(by_prompt, abs=1e-5)
    moved = 1 - np.mean([cosine(dino["p"][i], dino["r"][i]) for i in range(3)])
    assert drift(features[:3], encoders.dino.features(photos)) == pytest.approx(moved, abs=1e-5)
    among = np.mean([cosine(dino["r"][i], dino["r"][j]) for i, j in ((0, 1), (0, 2), (1, 2))])
    assert mean_cosine_among(references.whole["dino"]) == pytest.approx(among, abs=1e-5)


def test_masks_of_pictures_are_used_where_they_are_known(vit):
    """The photo itself with its own mask is at a cosine of 1; whole it is not."""
    photo, mask = pictures_of(1, seed=3)[0], Image.new("L", (64, 64))
    mask.paste(255, (20, 20, 40, 40))
    encoders = Encoders(dino=load_dino(vit))
    references = references_of(encoders, [photo], [mask])
    both = score_pictures(encoders, references, [photo], ["x"], picture_masks=[mask])
    assert both["dino_masked"] == pytest.approx(1.0, abs=1e-5)
    assert score_pictures(encoders, references, [photo], ["x"])["dino_masked"] < 0.999


def test_scores_are_those_of_the_encoders_at_hand(vit, clip):
    """No CLIP: no clip_i and no clip_t; no masks: no masked scores."""
    pictures, photos = pictures_of(2, seed=1), pictures_of(2, seed=2)
    for encoders, expected in (
        (Encoders(dino=load_dino(vit)), {"dino"}),
        (Encoders(clip=load_clip(clip)), {"clip_i", "clip_t"}),
        (Encoders(), set()),
    ):
        found = score_pictures(encoders, references_of(encoders, photos), pictures, ["a", "b"])
        assert found.keys() == expected


def test_diversity_by_hand():
    """(1,0),(0,1): 1. Three of which two agree: pairs 1, 0, 0, so 2/3. A single picture says nothing."""
    one, other = [1.0, 0.0], [0.0, 1.0]
    assert diversity([torch.tensor([one, other])]) == pytest.approx(1.0)
    assert diversity([torch.tensor([one, one, other])]) == pytest.approx(2 / 3)
    groups = [torch.tensor([one, other]), torch.tensor([one, one]), torch.tensor([one])]
    assert diversity(groups) == pytest.approx(0.5)
    assert diversity([torch.tensor([one])]) is None


def test_drift_pairs_row_by_row():
    """Rows swapped: every pair is at right angles, although the sets are the same."""
    features = torch.eye(3)
    assert drift(features, features) == pytest.approx(0.0)
    assert drift(features, features.roll(1, 0)) == pytest.approx(1.0)
    with pytest.raises(ShapeError, match="cannot be paired"):
        drift(features, features[:1])


def test_encoders_load_as_the_hub_has_held_them_for_years(vit, clip, tmp_path):
    """Pickled weights with what later versions no longer look for, processors under their former names."""
    extra = {
        vit: {"pooler.dense.weight": torch.zeros(24, 24), "pooler.dense.bias": torch.zeros(24)},
        clip: {"text_model.embeddings.position_ids": torch.arange(77)[None]},
    }
    former = {
        vit: {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 2,
              "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
        clip: {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32,
               "do_center_crop": True, "resample": 3},
    }  # fmt: skip
    pictures = pictures_of(3, seed=5, side=41)
    for new, load in ((vit, load_dino), (clip, load_clip)):
        old = tmp_path / Path(new).name
        shutil.copytree(new, old)
        weights = load_file(old / "model.safetensors")
        (old / "model.safetensors").unlink()
        torch.save(weights | extra[new], old / "pytorch_model.bin")
        (old / "preprocessor_config.json").write_text(json.dumps(former[new]))
        torch.testing.assert_close(load(str(old)).features(pictures), load(new).features(pictures))


def test_long_texts_are_cut_at_what_the_network_reads(clip):
    encoder = load_clip(clip)
    long = "word " * 200
    found = encoder.text_features([long, "a ball"])
    assert found.shape == (2, 14)
    torch.testing.assert_close(found[0], encoder.text_features([long + "more"])[0])
    torch.testing.assert_close(found[1], encoder.text_features(["a ball"])[0])  # whatever the padding


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("a photo of sks ball in the snow", "a photo of ball in the snow"),
        ("a photo of SKS", "a photo of"),
        ("a photo of sksball", "a photo of sksball"),
    ],
)
def test_the_token_is_no_text_to_be_aligned_with(prompt, plain):
    assert plain_text(prompt, "sks") == plain


def test_pocket_is_judged_by_its_own():
    """And any other model by DreamBooth's two, which are looked for by name."""
    encoders = encoders_for("pocket")
    assert encoders.names() == {"dino": POCKET_DINO, "clip": POCKET_CLIP}
    assert encoders.dino.features(pictures_of(1, 0, 128)).shape == (1, 192)
    text = encoders.clip.text_features(["a photo of a red mug", "a photo of a car at night"])
    assert text.shape == (2, 96) and float(text[0] @ text[1]) < 0.9
    assert (
        encoders_for("other", dino=str(shipped(POCKET_DINO)), clip=POCKET_CLIP).names()["clip"] == POCKET_CLIP
    )


def test_encoders_that_cannot_be_had_are_one_sentence_at_once(vit, clip, tmp_path, monkeypatch):
    """Offline, of the wrong kind, incomplete: said in a sentence and without a minute of retries."""
    from huggingface_hub import HfApi, constants

    def unreachable(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    begun = time.monotonic()
    with pytest.raises(
        ModelError, match=r"The encoder facebook/dino-vits16 cannot be loaded: .* hub cannot be reached"
    ):
        encoders_for("stabilityai/stable-diffusion-xl-base-1.0")
    assert time.monotonic() - begun < 5
    with pytest.raises(ModelError, match="is a clip, not a vision transformer"):
        load_dino(clip)
    with pytest.raises(ModelError, match="is a vit, not a CLIP"):
        load_clip(vit)
    with pytest.raises(ModelError, match="neither a folder here nor a hub id"):
        load_clip("no/such/name")
    half = tmp_path / "half"
    shutil.copytree(vit, half)
    tensors = load_file(half / "model.safetensors")
    tensors.pop("layernorm.weight")
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"half cannot be loaded: its weights lack layernorm\.weight"):
        load_dino(str(half))
