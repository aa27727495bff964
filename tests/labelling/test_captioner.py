"""Networks that describe photos, and the captions that are written."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from small_labellers import SAID, save_blip, save_clipseg, save_llava, save_vit_gpt2

from coeffdiff.data.photos import read_photos
from coeffdiff.errors import ConfigError, ModelError
from coeffdiff.labelling.captioner import MOST_TOKENS, find_captioner, load_captioner
from coeffdiff.labelling.captioning import write_captions
from coeffdiff.labelling.places import caption_places

CPU = torch.device("cpu")
PICTURES = [Image.effect_noise((40, 50), 90).convert("RGB"), Image.new("RGB", (1500, 30), "red")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioners")
    return {
        "blip": save_blip(folder / "blip"),
        "llava": save_llava(folder / "llava"),
        "vit": save_vit_gpt2(folder / "vit"),
    }


def load(folder, prompt=None, dtype=torch.float32):
    return load_captioner(find_captioner(str(folder)), CPU, dtype, prompt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_decoder_says_what_its_weights_hold(models, dtype):
    """Known from how they were made; no mark of beginning or end is in it."""
    assert load(models["vit"], dtype=dtype).captions(PICTURES) == [" ".join(SAID)] * 2


def test_blip_needs_no_prompt_and_continues_one(models):
    """And ends after a number of tokens, whatever it says."""
    blip = load(models["blip"])
    assert blip.prompt is None and not blip.chat
    assert blip.captions(PICTURES) == [" ".join(["dog"] * MOST_TOKENS)] * 2
    continued = load(models["blip"], "a photo of").captions(PICTURES)
    assert continued == ["a photo of" + " dog" * MOST_TOKENS] * 2


def test_a_model_with_a_template_is_asked_in_a_conversation(models):
    """And its caption is its answer: with greedy decoding, what transformers' own pipeline makes of the same chat."""
    from transformers import pipeline

    llava = load(models["llava"])
    assert llava.chat
    said = llava.captions(PICTURES[:1])
    content = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": llava.prompt}]
    pipe = pipeline("image-text-to-text", model=llava.network, processor=llava.processor)
    options = {"do_sample": False, "max_new_tokens": 60}
    [made] = pipe(
        text=[{"role": "user", "content": content}], return_full_text=False, generate_kwargs=options
    )
    assert said == [" ".join(made["generated_text"].split())] and "ASK" not in said[0].split()[:1]
    assert len(llava.captions(PICTURES)) == 2


def test_what_is_no_captioner_is_one_sentence(models, tmp_path):
    with pytest.raises(
        ModelError, match=r"is a clipseg, and an image-to-text model of transformers is needed"
    ):
        find_captioner(str(save_clipseg(tmp_path / "clipseg")))
    with pytest.raises(ModelError, match=r"neither a folder here nor a hub id"):
        find_captioner("no/such/name")
    with pytest.raises(ConfigError, match="leave --prompt out"):
        load(models["vit"], "a photo of")


class Captioner:
    """Says of each picture the red of its first pixel; stops the second time, as Ctrl-C does."""

    def __init__(self, times=99):
        self.times = times

    def captions(self, pictures):
        self.times -= 1
        if self.times < 0:
            raise KeyboardInterrupt
        return [
            f"a dog of {picture.getpixel((0, 0))[0]}" if picture.getpixel((0, 0))[0] else ""
            for picture in pictures
        ]


@pytest.fixture
def photos(tmp_path):
    for number in range(5):
        Image.new("RGB", (6, 4), (10 * number, 0, 0)).save(tmp_path / f"{number}.png")
    return caption_places(read_photos(tmp_path).photos, overwrite=False).new


def test_each_photo_gets_its_own_caption(photos, tmp_path):
    """In batches too; a photo that nothing is said of gets none, and is handed back."""
    steps = []
    written, silent = write_captions(photos, Captioner(), "ohwx", "dog", batch_size=2, on_photo=steps.append)
    assert [photo.path.name for photo in silent] == ["0.png"] and steps == [2, 4, 5]
    expected = {f"{n}.txt": f"a ohwx dog of {10 * n}" for n in range(1, 5)}
    assert {one.file.name: one.text for one in written} == expected
    assert {file.name: file.read_text() for file in tmp_path.glob("*.txt")} == {
        k: v + "\n" for k, v in expected.items()
    }
    assert [photo.caption for photo in read_photos(tmp_path).photos] == [None, *expected.values()]


def test_ctrl_c_leaves_finished_captions_and_nothing_else(photos, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_captions(photos[1:], Captioner(times=1), "ohwx", "dog", batch_size=2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".png") == ["1.txt", "2.txt"]


def test_a_dry_run_writes_nothing(photos, tmp_path):
    written, _ = write_captions(photos, Captioner(), "<V>", None, batch_size=9, dry_run=True)
    assert written[0].text == "<V>, a dog of 10" and list(tmp_path.glob("*.txt")) == []
