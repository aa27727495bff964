"""The models that ship: their size, how they load, what they know, and that they can be taught a subject."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPModel, CLIPTokenizerFast

from coeffdiff.config.loading import load_settings
from coeffdiff.config.schema import ModelSettings
from coeffdiff.demo import new_places
from coeffdiff.hosts.diffusers import load_adapter
from coeffdiff.metrics.encoders import load_dino
from coeffdiff.metrics.features import mean_pairwise_cosine
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.loading import load_pipeline
from coeffdiff.pocket import POCKET, POCKET_CLIP, POCKET_DINO, WEIGHTS, shipped
from coeffdiff.pocket.judges import QUESTIONS, Judges, trusted_judges
from coeffdiff.pocket.tokenizers import tokenizer_pair
from coeffdiff.pocket.world import render, sample_scene, vocabulary
from coeffdiff.pocket.world.subjects import SUBJECTS, write_photos
from coeffdiff.sampling.generation import generate
from coeffdiff.sampling.options import Options, Request
from coeffdiff.training import loop
from coeffdiff.utils.console import quiet_libraries
from pocket_build.renders import as_float
from pocket_build.workshop import MEASUREMENTS, fingerprint

SLOTH = SUBJECTS["grey_sloth_plushie"]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionXLPipeline:
    with quiet_libraries():
        pipe = StableDiffusionXLPipeline.from_pretrained(shipped(POCKET))
        pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def judges() -> Judges:
    return trusted_judges(WEIGHTS)


def pictures(pipe, prompts: list[str], steps: int = 12) -> list[Image.Image]:
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    options = Options(steps=steps, batch_size=len(requests))
    return [image for _, image in generate(pipe, requests, options)]


def seen_settings(judges: Judges, images: list[Image.Image]) -> list[str]:
    pixels = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)
    return [QUESTIONS["setting"][i] for i in judges.answers(as_float(pixels))["setting"].tolist()]


def test_all_of_it_fits_into_a_package():
    sizes = [file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()]
    assert sum(sizes) <= 64_000_000
    assert max(sizes) <= 16_000_000


def test_what_was_measured_is_of_the_weights_that_ship():
    record, own = json.loads((WEIGHTS / "record.json").read_text()), fingerprint(WEIGHTS / POCKET)
    assert {record[name]["of"] for name in MEASUREMENTS if name in record} == {own}
    assert record["score"]["unet_steps"] == record["deep"]["steps"]


def test_every_stage_shows_its_curve_to_the_last_step():
    record = json.loads((WEIGHTS / "record.json").read_text())
    curves = {
        file.stem: [json.loads(line)["step"] for line in file.open()]
        for file in (WEIGHTS / "curves").glob("*.jsonl")
    }
    assert curves.keys() == {stage for stage, facts in record.items() if "seconds" in facts}
    for stage, steps in curves.items():
        assert steps == sorted(set(steps)) and steps[-1] == record[stage]["steps"], stage


def test_the_tokenizers_that_ship_are_those_that_the_code_makes(pipe):
    """Every token has the id under which the text encoders learned it, in every process."""
    for made, ships in zip(tokenizer_pair(vocabulary()), (pipe.tokenizer, pipe.tokenizer_2), strict=True):
        assert made.get_vocab() == ships.get_vocab()
        text = "a photo of qzx red mug on top of a white rug at night"
        assert made(text).input_ids == ships(text).input_ids
    assert CLIPTokenizerFast.from_pretrained(shipped(POCKET_CLIP)).get_vocab() == pipe.tokenizer.get_vocab()


def test_pooled_output_changes_with_the_prompt(pipe):
    """Each word counts; the pooled state is that of the end token, also behind a word that means nothing."""

    def pooled(text: str) -> torch.Tensor:
        with torch.no_grad():
            ids = pipe.tokenizer_2(text, padding="max_length", return_tensors="pt").input_ids
            out = pipe.text_encoder_2(ids)
            end = (ids[0] == pipe.tokenizer_2.eos_token_id).nonzero()[0, 0]
            expected = out.last_hidden_state[:, end] @ pipe.text_encoder_2.text_projection.weight.T
        torch.testing.assert_close(out.text_embeds, expected)
        return out.text_embeds[0]

    base = pooled("a red mug in the snow")
    for other in ("a blue mug in the snow", "a red boot in the snow", "a red mug on the beach", ""):
        assert torch.cosine_similarity(base, pooled(other), dim=0) < 0.99
    nothing = torch.cosine_similarity(base, pooled("a qzx red mug in the snow"), dim=0)
    assert nothing > torch.cosine_similarity(base, pooled("a blue mug in the snow"), dim=0)


def test_it_knows_its_settings(pipe, judges):
    """Seven of eight pictures are where their prompts say."""
    places = QUESTIONS["setting"][:8]
    seen = seen_settings(judges, pictures(pipe, [f"a photo of a mug {place}" for place in places]))
    assert sum(a == b for a, b in zip(seen, places, strict=True)) >= 7


def test_clip_finds_the_caption_of_a_photo():
    """Loaded as its big namesake is: of two photos and two captions, each finds its own."""
    network = CLIPModel.from_pretrained(shipped(POCKET_CLIP)).eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(shipped(POCKET_CLIP))
    scenes = [sample_scene(i, kind=k, setting=s) for i, (k, s) in enumerate(
        [("mug", "in the snow"), ("car", "on the beach"), ("teapot", "at night")]
    )]  # fmt: skip
    images, _ = render(scenes)
    texts = [f"a photo of a {scene.kind} {scene.setting}" for scene in scenes]
    ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = network(input_ids=ids, pixel_values=images * 2.0 - 1.0).logits_per_image
    assert logits.argmax(dim=0).tolist() == logits.argmax(dim=1).tolist() == [0, 1, 2]


def test_it_learns_a_subject_and_forgets_it_at_scale_zero(tmp_path, monkeypatch, judges):
    """Five photos of the sloth, 50 steps: in places that no photo shows its pictures come at least a third of the
    way from the base model's to the photos' own likeness to each other, and still show those places. At scale 0
    they are the base model's, bit for bit."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos = [Image.open(file).convert("RGB") for file in write_photos(SLOTH, tmp_path / "photos")]
    places = new_places(SLOTH, 4)
    base_pipe = load_pipeline(find_backbone(ModelSettings(name=POCKET)), dtype=torch.float32)
    known = pictures(base_pipe, [f"a photo of a {SLOTH.class_word} {place}" for place in places])
    values = {
        "model.name": POCKET, "subject.images": str(tmp_path / "photos"), "subject.token": "sks",
        "subject.class_word": SLOTH.class_word, "training.steps": 50, "validation.prompts": [],
        "method.kind": "coeff+lora", "method.lora.learning_rate": 1e-3, "method.coeff.learning_rate": 3e-3,
        "subject.caption_dropout": 0.1,
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    result = loop.train(load_settings(None, values))
    prompts = [f"a photo of sks {SLOTH.class_word} {place}" for place in places]
    unaware = pictures(base_pipe, prompts, steps=2)
    adapter = load_adapter(base_pipe, result.adapter)
    taught = pictures(base_pipe, prompts)
    assert not any(map(_same, pictures(base_pipe, prompts, steps=2), unaware))
    adapter.set_scale(0.0)
    assert all(map(_same, pictures(base_pipe, prompts, steps=2), unaware))

    dino = load_dino(POCKET_DINO)
    likeness = dino.features(photos)
    among = (likeness @ likeness.T).masked_select(~torch.eye(len(photos), dtype=torch.bool)).mean()
    before, after = (mean_pairwise_cosine(dino.features(some), likeness) for some in (known, taught))
    assert after - before > (float(among) - before) / 3
    seen = seen_settings(judges, taught)
    assert sum(a == b for a, b in zip(seen, places, strict=True)) >= len(places) - 1


def _same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))
