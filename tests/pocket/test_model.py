"""The architecture in sizes: counts that are public knowledge, determinism, tokenizers, pooling, saving."""

from __future__ import annotations

import importlib.util
import json
import logging
import unicodedata
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st

from coeffdiff.errors import ConfigError
from coeffdiff.pocket import model
from coeffdiff.pocket.model import build_pipeline, build_unet, save_random
from coeffdiff.pocket.sizes import SIZES
from coeffdiff.pocket.tokenizers import tokenizer_pair
from coeffdiff.utils.console import quiet_libraries

HAIR_SPACES = "".join(map(chr, range(0x2000, 0x200B)))
NETWORKS = ("text_encoder", "text_encoder_2", "vae", "unet")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tiny model gains nothing from threads, and on a busy machine waiting for them takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny():
    return build_pipeline("tiny")


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_pair()[0]


def weights(pipe):
    return {f"{n}.{k}": w for n in NETWORKS for k, w in getattr(pipe, n).state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(w, other[k]) for k, w in one.items())


def pooled(pipe, text):
    with quiet_libraries(), torch.no_grad():
        return pipe.encode_prompt(text, do_classifier_free_guidance=False)[2]


# --- sizes -----------------------------------------------------------------------------------------------------


def test_full_size_is_sdxl():
    """The numbers that the public SDXL base 1.0 has, network by network, without a byte of weights."""
    counts = {n: sum(w.numel() for w in m.parameters()) for n, m in model._networks("sdxl").items()}
    assert counts == {
        "unet": 2_567_463_684,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "vae": 83_653_863,
    }
    unet = build_unet("sdxl", device="meta")
    layers = [m for m in unet.modules() if isinstance(m, Attention)]
    assert len(layers) == 140
    assert sorted({(m.heads, sum(x.heads == m.heads for x in layers)) for m in layers}) == [
        (10, 20),
        (20, 120),
    ]
    assert SIZES["sdxl"].native_resolution == 1024


def test_tiny_differs_from_sdxl_in_numbers_only():
    """The same keyword arguments, so the same kinds of blocks and conditioning."""
    tiny, sdxl = SIZES["tiny"], SIZES["sdxl"]
    for part in ("unet", "vae", "text", "text_2"):
        assert getattr(tiny, part).keys() == getattr(sdxl, part).keys()
    words = {k: v for k, v in sdxl.unet.items() if isinstance(v, str | bool) or "types" in k}
    assert {k: tiny.unet[k] for k in words} == words
    assert tiny.native_resolution == 64


def test_tiny_has_no_two_equal_widths():
    """A transposed axis or a swapped encoder cannot fit by chance."""
    size = SIZES["tiny"]
    widths = [
        *size.unet["block_out_channels"],
        *size.vae["block_out_channels"][:-1],
        size.text["hidden_size"],
        size.text_2["hidden_size"],
        size.text_2["projection_dim"],
        size.unet["cross_attention_dim"],
    ]
    assert len(set(widths)) == len(widths)
    assert len(set(size.unet["attention_head_dim"])) == 3


def test_tiny_weights_depend_on_the_seed_alone(tiny):
    """Equal from equal seeds, different from others, and the global random state is left alone."""
    state = torch.get_rng_state()
    torch.manual_seed(123)
    again, other = build_pipeline("tiny"), build_pipeline("tiny", seed=1)
    torch.set_rng_state(state)
    ours, others = weights(tiny), weights(other)
    assert equal(ours, weights(again))
    assert not any(torch.equal(w, others[k]) for k, w in ours.items() if w.ndim > 1)
    build_pipeline("tiny")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_unet_alone_is_the_pipelines(tiny):
    assert equal(build_unet("tiny").state_dict(), tiny.unet.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_rounding_of_float32(tiny, dtype):
    rounded = {k: w.to(dtype) for k, w in weights(tiny).items()}
    assert equal(rounded, weights(build_pipeline("tiny", dtype=dtype)))


def test_no_two_tensors_and_no_two_chunks_are_alike(monkeypatch):
    """A tensor longer than a chunk is not the same chunk again, and its values do not depend on the chunks."""
    whole = build_unet("tiny").mid_block.attentions[0].proj_in.weight
    monkeypatch.setattr(model, "_CHUNK", 100)
    parts = build_unet("tiny").mid_block.attentions[0].proj_in.weight.flatten()
    assert not torch.equal(parts[:100], parts[100:200])
    assert parts.std() == pytest.approx(whole.std().item(), rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_keep_their_size(dtype):
    """Prediction, latents and pictures have a spread near one, in bf16 as well."""
    pipe = build_pipeline("tiny", dtype=dtype)
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=g).to(dtype)
    text, text_pooled = torch.randn(2, 77, 48, generator=g), torch.randn(2, 36, generator=g)
    conditions = {
        "text_embeds": text_pooled.to(dtype),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
    }
    with torch.no_grad():
        for t in (0, 500, 999):
            out = pipe.unet(latents, torch.tensor(t), text.to(dtype), added_cond_kwargs=conditions).sample
            assert 0.5 < out.float().std() < 2
        assert 0.3 < pipe.vae.decode(latents).sample.float().std() < 3
        picture = torch.rand(2, 3, 64, 64, generator=g).mul(2).sub(1).to(dtype)
        scaled = pipe.vae.encode(picture).latent_dist.mode() * pipe.vae.config.scaling_factor
        assert 0.3 < scaled.float().std() < 3


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"no model size 'huge'; the sizes are micro, tiny, pocket"):
        build_pipeline("huge")
    with pytest.raises(ConfigError, match=r"'sample' is neither epsilon nor v_prediction"):
        build_pipeline("tiny", prediction_type="sample")


# --- text ------------------------------------------------------------------------------------------------------


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_tokenizes_and_decodes(tokenizer, text):
    """One known id a byte between begin and end, and back to the same letters (CLIP drops blanks and case)."""
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert all(0 <= i < 514 for i in ids)
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    if not any(mark in normal for mark in ("</w>", "<|")):  # the vocabulary's own marks
        blanks = str.maketrans(
            "", "", "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + HAIR_SPACES
        )
        assert len(ids) - 2 == len(normal.translate(blanks).encode())
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(decoded.split()) == "".join(normal.split())


def test_emoji_and_accents_come_back(tokenizer):
    """CLIP writes a blank between a word and what follows it, and composes accents (e + U+0301 is é)."""
    text = unicodedata.normalize("NFD", "Café 🦥 in the snow!")
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == "café 🦥 in the snow !"


def test_specials_are_sdxls():
    """End of text is the highest id; the first pads with it and the second with "!" (id 0), also inside a prompt."""
    first, second = tokenizer_pair()
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 514 and first.eos_token_id == 513 and first.bos_token_id == 512
    assert first.pad_token_id == 513
    assert (second.pad_token, second.pad_token_id) == ("!", 0)
    assert first("a!", padding="max_length").input_ids == [512, 64 + 256, 256, *[513] * 74]
    assert second("a!", padding="max_length").input_ids == [512, 64 + 256, 0, 513, *[0] * 73]


@pytest.mark.parametrize(
    ("prompt", "end"),
    [("", 1), ("a cat", 5), ("a photo of a sloth in the snow", 24), ("x" * 75, 76), ("x" * 500, 76)],
)
def test_pooling_finds_the_end_of_text(tiny, prompt, end):
    """Begin, one token a letter, end: the pooled output is the projected state at the end token and no other."""
    with quiet_libraries(), torch.no_grad():
        ids = tiny.tokenizer_2(
            prompt, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        ).input_ids
        assert ids[0, end] == 513
        states = tiny.text_encoder_2(ids).last_hidden_state
        expected = states[:, end] @ tiny.text_encoder_2.text_projection.weight.T
    torch.testing.assert_close(pooled(tiny, prompt), expected)


def test_pooled_output_changes_with_every_word(tiny):
    """First, middle and last word each count; what lies beyond 77 tokens does not."""
    base = pooled(tiny, "a red cat")
    for other in ("the red cat", "a blue cat", "a red dog"):
        assert (pooled(tiny, other) - base).abs().max() > 0.01
    assert torch.equal(pooled(tiny, "x" * 80), pooled(tiny, "x" * 75 + "yyyyy"))


# --- saving ----------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_loads_in_plain_diffusers(tmp_path, tiny):
    """Every tensor and the tokenizers are equal, and so is a picture but for the order of additions.

    Plain diffusers maps the file into memory, where tensors lie unaligned, and the kernels then add differently.
    """
    folder = save_random("tiny", tmp_path / "deep" / "er" / "tiny")
    with quiet_libraries():
        loaded = StableDiffusionXLPipeline.from_pretrained(folder)
    assert equal(weights(tiny), weights(loaded))
    for name in ("tokenizer", "tokenizer_2"):
        ours, theirs = getattr(tiny, name), getattr(loaded, name)
        assert (
            ours("Ab 🦥!", padding="max_length").input_ids == theirs("Ab 🦥!", padding="max_length").input_ids
        )
        assert theirs.model_max_length == 77
    images = []
    for pipe in (tiny, loaded):
        pipe.set_progress_bar_config(disable=True)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        result = pipe("a cat", latents=noise, num_inference_steps=2, height=64, width=64, output_type="pt")
        images.append(result.images)
    assert images[0].shape == (1, 3, 64, 64) and images[0].std() > 0.05
    torch.testing.assert_close(*images, atol=1e-4, rtol=0)


def test_prediction_type_and_variant_are_stored(tmp_path):
    """v_prediction is in the scheduler's config; fp16 is in the weights' names, as on the hub."""
    folder = save_random(
        "tiny", tmp_path / "v", dtype=torch.float16, variant="fp16", prediction_type="v_prediction"
    )
    assert (
        json.loads((folder / "scheduler/scheduler_config.json").read_text())["prediction_type"]
        == "v_prediction"
    )
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.safetensors")) == [
        "text_encoder/model.fp16.safetensors",
        "text_encoder_2/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]


def test_an_existing_folder_is_refused(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match=r"there already exists; nothing is overwritten"):
        save_random("tiny", tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_half_written(tmp_path, monkeypatch, failure):
    def fails(self, folder, **_):
        (Path(folder) / "unet").mkdir()
        raise failure

    monkeypatch.setattr(StableDiffusionXLPipeline, "save_pretrained", fails)
    expected = ConfigError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save_random("tiny", tmp_path / "new")
    if expected is ConfigError:
        assert str(caught.value) == f"{tmp_path / 'new'} cannot be written: No space left on device."
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/new cannot be written: File exists \(.*file\)\."):
        save_random("tiny", tmp_path / "file" / "new")


def test_libraries_are_quiet_inside_and_as_before_outside(tmp_path, capfd):
    from diffusers.utils import logging as d
    from transformers.utils import logging as t

    before = [(x.get_verbosity(), x.is_progress_bar_enabled()) for x in (d, t)]
    with pytest.raises(ZeroDivisionError), quiet_libraries():
        logging.getLogger("diffusers.x").error("loud")
        raise ZeroDivisionError
    save_random("tiny", tmp_path / "new")
    assert [(x.get_verbosity(), x.is_progress_bar_enabled()) for x in (d, t)] == before
    assert capfd.readouterr() == ("", "")


# --- the script ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "scripts" / "make_random_sdxl.py"
    spec = importlib.util.spec_from_file_location("make_random_sdxl", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_and_says_what(script, tmp_path, capsys):
    """703,923 numbers of two bytes are 1 MB."""
    folder = tmp_path / "t"
    assert script.main(["--size", "tiny", "--output", str(folder), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert f"Writing {folder}" in out and "703,923 random numbers in bfloat16, 1 MB" in out
    assert json.loads((folder / "text_encoder/config.json").read_text())["dtype"] == "bfloat16"


def test_the_script_refuses_in_one_sentence(script, tmp_path, capsys):
    assert script.main(["--size", "tiny", "--output", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "already exists" in printed.err
