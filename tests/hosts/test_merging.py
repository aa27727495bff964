"""Merging: one folder that computes what several adapters compute when they are loaded together."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coeffdiff import load_adapter
from coeffdiff.errors import AdapterError, AdapterMismatch
from coeffdiff.hosts.diffusers import save_adapter
from coeffdiff.hosts.lora.layers import add_lora
from coeffdiff.hosts.merge_checks import Part, check_parts
from coeffdiff.hosts.merging import merge_adapters
from coeffdiff.hosts.unet import inject
from coeffdiff.method.adapter_file import read_coefficients, read_header
from coeffdiff.method.adapter_header import AdapterHeader, LoraHeader, format_for
from coeffdiff.method.adapter_paths import COEFF_FILE, LORA_FILE
from coeffdiff.method.lora_layout import lora_pairs
from coeffdiff.utils.seeding import generator_for

# name -> what it is; ranks, alphas, forms and layers all differ, so that none passes for another
KINDS = {
    "coeff": {"kind": "coeff"},
    "both": {"kind": "coeff+lora", "lora": LoraHeader(rank=3, alpha=7)},
    "keys": {"kind": "lora", "lora": LoraHeader(rank=2, alpha=2), "projections": ["to_k"]},
    "self": {"kind": "coeff", "form": "identity", "targets": "self"},
    "values": {"kind": "coeff", "mixes": "values"},
    "more values": {"kind": "coeff", "mixes": "values", "form": "identity", "targets": "cross"},
    "dora": {"kind": "lora", "lora": LoraHeader(rank=2, alpha=2, dora=True)},
    "elsewhere": {"kind": "coeff", "base_model": "another"},
}


def write(
    unet, folder: Path, token: str, kind: str, lora=None, form="residual", mixes="maps", **more
) -> Path:
    """An adapter folder with large random values."""
    unet, heads = copy.deepcopy(unet), {}
    if lora:
        projections = {"targets": more["projections"]} if "projections" in more else {}
        for name, p in add_lora(
            unet, rank=lora.rank, alpha=lora.alpha, dora=lora.dora, **projections
        ).items():
            p.data += 0.2 * torch.randn(p.shape, generator=generator_for(token, name))
    if "coeff" in kind:
        for name, c in inject(unet, form=form, targets=more.get("targets", "both"), mixes=mixes).items():
            c.alpha.data += 0.3 * torch.randn(c.alpha.shape, generator=generator_for(token, name))
            heads[name] = c.heads
    header = AdapterHeader(
        format_version=format_for(mixes),
        kind=kind,
        base_model=more.get("base_model", "tiny"),
        token=token,
        class_word=f"{token} thing",
        form=form,
        mixes=mixes,
        heads=heads,
        lora=lora,
        trained_steps=len(token),
        resolution=64,
    )
    save_adapter(folder, unet, header)
    return folder


@pytest.fixture(scope="module")
def shelf(built_micro, tmp_path_factory):
    place = tmp_path_factory.mktemp("shelf")
    return {name: write(built_micro.unet, place / name, name, **options) for name, options in KINDS.items()}


@pytest.mark.parametrize(
    "weights",
    [
        {"coeff": 0.7, "both": 0.3},
        {"both": -0.5, "keys": 1.5},
        {"coeff": 1.0, "keys": 0.5},
        {"self": 0.6, "both": 0.4, "coeff": 0.2},
        {"keys": 0.5, "values": 0.7, "more values": 0.3},
    ],
    ids="+".join,
)
def test_a_merged_adapter_computes_what_they_do_together(weights, shelf, micro_pipeline, tmp_path, unet_call):
    """Of different kinds, forms, ranks and layers, with positive and negative scales; and so it does at half scale."""
    base = unet_call(micro_pipeline.unet)
    loaded = [load_adapter(micro_pipeline, shelf[name], scale) for name, scale in weights.items()]
    together = unet_call(micro_pipeline.unet)
    for adapter, scale in zip(loaded, weights.values(), strict=True):
        adapter.set_scale(scale / 2)
    half = unet_call(micro_pipeline.unet)
    for adapter in loaded:
        adapter.remove()
    assert (together - base).abs().max() > 1e-2 and (half - together).abs().max() > 1e-2
    merge_adapters([(shelf[name], scale) for name, scale in weights.items()], tmp_path / "m")
    merged = load_adapter(micro_pipeline, tmp_path / "m")
    torch.testing.assert_close(unet_call(micro_pipeline.unet), together, rtol=1e-4, atol=1e-5)
    merged.set_scale(0.5)
    torch.testing.assert_close(unet_call(micro_pipeline.unet), half, rtol=1e-4, atol=1e-5)


def test_alphas_and_loras_add_up_by_hand(shelf, tmp_path):
    """alpha = 0.7 a + 0.3 b; B A = sum of scale * alpha / rank * B_i A_i, with rank 3 + 2."""
    merge_adapters([(shelf["coeff"], 0.7), (shelf["both"], 0.3), (shelf["keys"], 2.0)], tmp_path / "m")
    (_, one), (_, two) = (read_coefficients(shelf[name]) for name in ("coeff", "both"))
    header, alphas = read_coefficients(tmp_path / "m")
    for key, alpha in alphas.items():
        torch.testing.assert_close(alpha, 0.7 * one[key] + 0.3 * two[key], rtol=1e-6, atol=1e-7)
    assert (header.kind, header.lora) == ("coeff+lora", LoraHeader(rank=5, alpha=5))
    pairs = {
        name: lora_pairs(load_file(folder / LORA_FILE), "file")
        for name, folder in {**shelf, "m": tmp_path / "m"}.items()
        if name in ("both", "keys", "m")
    }
    for module, (a, b) in pairs["m"].items():
        expected = 0.3 * 7 / 3 * pairs["both"][module][1] @ pairs["both"][module][0]
        if module in pairs["keys"]:
            expected = expected + 2.0 * pairs["keys"][module][1] @ pairs["keys"][module][0]
        torch.testing.assert_close(b @ a, expected, rtol=1e-4, atol=1e-5)


def test_every_subject_keeps_its_word(shelf, tmp_path):
    """The first token is the adapter's own; all are in the header, also after a second merge, with scales multiplied."""
    merge_adapters([(shelf["coeff"], 0.5), (shelf["both"], None)], tmp_path / "m")
    header = read_header(tmp_path / "m")
    assert (header.token, header.tokens, header.recommended_scale) == ("coeff", ("coeff", "both"), 1.0)
    again = merge_adapters([(tmp_path / "m", 0.4), (shelf["keys"], 3.0)], tmp_path / "n")
    assert [(part.token, part.scale) for part in again.merged] == [
        ("coeff", pytest.approx(0.2)),
        ("both", pytest.approx(0.4)),
        ("keys", 3.0),
    ]
    assert "| `both` | both thing | coeff+lora | 4 | 0.4 |" in (tmp_path / "n/README.md").read_text()
    assert sorted(file.name for file in (tmp_path / "n").iterdir()) == ["README.md", COEFF_FILE, LORA_FILE]


def test_a_merged_adapter_mixes_what_its_parts_do(shelf, tmp_path):
    """A LoRA mixes nothing and decides nothing; maps are written in the format that all readers know."""
    of_maps = merge_adapters([(shelf["keys"], 1.0), (shelf["coeff"], 1.0)], tmp_path / "maps")
    of_values = merge_adapters([(shelf["keys"], 1.0), (shelf["values"], 1.0)], tmp_path / "values")
    assert (of_maps.mixes, of_maps.format_version) == ("maps", 1)
    assert (of_values.mixes, of_values.format_version) == ("values", 2)
    assert read_header(tmp_path / "values") == of_values
    assert "(coeff+lora, mixing values)" in (tmp_path / "values/README.md").read_text()


def test_a_merged_adapter_takes_all_of_its_words(shelf, tmp_path, micro_pipeline):
    """None of its subjects can be loaded beside it: a prompt could not tell them apart."""
    merge_adapters([(shelf["coeff"], 0.5), (shelf["keys"], 0.5)], tmp_path / "m")
    load_adapter(micro_pipeline, tmp_path / "m")
    with pytest.raises(AdapterError, match=r"both use the token 'keys'"):
        load_adapter(micro_pipeline, shelf["keys"])


def test_what_cannot_be_merged_is_one_sentence(shelf, tmp_path, built_micro):
    """And leaves nothing behind, nor changes what is there."""

    def refuse(adapters, error, sentence, **more):
        with pytest.raises(error, match=sentence):
            merge_adapters(adapters, tmp_path / "m", **more)
        assert not list(tmp_path.glob("*m*"))

    one, two = (shelf["coeff"], 0.5), (shelf["both"], 0.5)
    refuse([one], AdapterError, "Merging takes at least two adapters")
    refuse([one, (shelf["dora"], 1.0)], AdapterError, r"dora is a DoRA, .* load it beside")
    refuse([one, (shelf["both"], 0.0)], AdapterError, "must be a finite number other than 0, not 0")
    refuse(
        [one, (shelf["both"], float("nan"))], AdapterError, "must be a finite number other than 0, not nan"
    )
    refuse([one, (shelf["both"], 1e39)], AdapterError, "The sum is not finite")
    refuse(
        [one, (shelf["elsewhere"], 1.0)],
        AdapterMismatch,
        r"was trained on tiny and .* on another\. .*pass --model",
    )
    refuse([one, (tmp_path / "nowhere", 1.0)], AdapterError, "There is no adapter")
    refuse(
        [(shelf["values"], 1.0), (shelf["keys"], 1.0), one],
        AdapterError,
        r"coeff mixes attention maps and .*values mixes values, .*; load them together instead\.$",
    )
    twin = write(built_micro.unet, tmp_path / "tw", "COEFF", "coeff")
    refuse([one, (twin, 1.0)], AdapterError, "both use the token 'COEFF'; .* Train one of them with another")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(AdapterError, match=r"full is not empty; name another --output"):
        merge_adapters([one, two], tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["file"]
    header = merge_adapters([one, (shelf["elsewhere"], 1.0)], tmp_path / "given", base_model="third")
    assert header.base_model == "third"


def test_a_learned_token_whose_file_is_gone_is_seen_in_the_header(shelf):
    whole, lost = (read_header(shelf[name]) for name in ("both", "coeff"))
    lost = lost.model_copy(update={"vectors": 1})
    parts = [Part(shelf["both"], whole, 1.0, {}, {}), Part(shelf["coeff"], lost, 1.0, {}, {})]
    with pytest.raises(AdapterError, match="coeff has a learned token, which cannot be merged; load"):
        check_parts(parts, None)


def test_other_shapes_are_another_architecture(shelf, tmp_path, built_micro, monkeypatch):
    """A layer with other heads, and projections of another width."""
    from coeffdiff.hosts import merging

    real_header, alphas = read_coefficients(shelf["coeff"])
    layer = next(iter(real_header.heads))
    other = real_header.model_copy(
        update={"heads": real_header.heads | {layer: real_header.heads[layer] + 1}}
    )
    monkeypatch.setattr(
        merging, "read_coefficients", lambda f: (other if f.name == "coeff" else read_header(f), alphas)
    )
    with pytest.raises(AdapterMismatch, match=r"heads in .* different architecture"):
        merge_adapters([(shelf["both"], 1.0), (shelf["coeff"], 1.0)], tmp_path / "m")
    monkeypatch.undo()
    real = merging.read_lora

    def narrow(folder, header):
        tensors = real(folder, header)
        return {
            k: t[:, :-1] if folder.name == "keys" and ".lora.down." in k else t for k, t in tensors.items()
        }

    monkeypatch.setattr(merging, "read_lora", narrow)
    with pytest.raises(AdapterMismatch, match=r"matrices that do not fit together"):
        merge_adapters([(shelf["both"], 1.0), (shelf["keys"], 1.0)], tmp_path / "m")


def test_ranks_that_are_too_many_are_refused(shelf, tmp_path, monkeypatch):

    monkeypatch.setattr("coeffdiff.hosts.merging._MOST_RANKS", 4)
    with pytest.raises(AdapterError, match=r"ranks add up to 5, and an adapter has at most 4"):
        merge_adapters([(shelf["both"], 1.0), (shelf["keys"], 1.0)], tmp_path / "m")
