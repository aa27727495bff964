"""The adapter folder: exact from saving to loading, back to the base model, and proof against damage and malice."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from coeffdiff import load_adapter
from coeffdiff.errors import AdapterError, AdapterMismatch, InjectionError
from coeffdiff.hosts.diffusers import check_architecture, fill_alphas, loaded_adapters, save_adapter
from coeffdiff.hosts.lora.layers import add_lora
from coeffdiff.hosts.unet import attention_layers, coefficients_of, inject
from coeffdiff.method.adapter_file import alphas_of, read_coefficients, read_header, read_lora, read_rows
from coeffdiff.method.adapter_header import FORMAT_VERSION, AdapterHeader, LoraHeader
from coeffdiff.method.adapter_paths import COEFF_FILE, EMBEDS_FILE, LORA_FILE, find_adapter
from coeffdiff.sampling.prompts import encode_prompts
from coeffdiff.utils.seeding import generator_for

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"  # 4 heads, 32 channels, text of width 48

# name -> what is trained. Rank, alpha and heads all differ, so that no one passes for another.
KINDS = {
    "coeff": {"kind": "coeff"},
    "lora": {"kind": "lora", "lora": LoraHeader(rank=3, alpha=3)},
    "both": {"kind": "coeff+lora", "lora": LoraHeader(rank=5, alpha=5)},
    "alpha is not rank": {"kind": "coeff+lora", "lora": LoraHeader(rank=3, alpha=7)},
    "dora": {"kind": "coeff+lora", "lora": LoraHeader(rank=3, alpha=7, dora=True)},
    "identity form": {"kind": "coeff", "form": "identity"},
    "self only": {"kind": "coeff", "targets": "self"},
    "values": {"kind": "coeff+lora", "lora": LoraHeader(rank=3, alpha=3), "mixes": "values"},
}


def trained(pipe, token, kind, lora=None, form="residual", targets="both", mixes="maps"):
    """A UNet as training leaves it, and the header of its adapter."""
    unet, heads = copy.deepcopy(pipe.unet), {}
    if lora:
        parameters = add_lora(unet, rank=lora.rank, alpha=lora.alpha, dora=lora.dora)
        for name, parameter in parameters.items():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator_for(token, name))
    if "coeff" in kind:
        layers = inject(unet, form=form, targets=targets, mixes=mixes)
        for name, coefficients in layers.items():
            drawn = torch.randn(coefficients.alpha.shape, generator=generator_for(token, name))
            coefficients.alpha.data += 0.3 * drawn
        heads = {name: c.heads for name, c in layers.items()}
    header = AdapterHeader(
        format_version=FORMAT_VERSION,
        kind=kind,
        base_model="tiny",
        token=token,
        class_word="stuffed animal",
        templates=("a photo of {token} {class_word}", "an old photo of {token}"),
        form=form,
        mixes=mixes,
        heads=heads,
        lora=lora,
        trained_steps=7,
        resolution=64,
        versions={"torch": torch.__version__},
    )
    return unet, header


@pytest.fixture(scope="module")
def shelf(built_micro, unet_call, tmp_path_factory):
    """name -> (adapter folder, what the UNet that was saved there predicts)."""
    found = {}
    for name, options in KINDS.items():
        unet, header = trained(built_micro, token=name, **options)
        folder = tmp_path_factory.mktemp("runs") / name / "adapter"
        save_adapter(folder, unet, header, {"README.md": b"# card"})
        found[name] = folder, unet_call(unet).detach()
    return found


@pytest.fixture
def pipe(micro_pipeline):
    return micro_pipeline


@pytest.fixture(scope="module")
def base(built_micro, unet_call):
    return unet_call(built_micro.unet)


every_kind = pytest.mark.parametrize("name", KINDS)


# Saved, loaded, removed


@every_kind
def test_what_was_trained_is_what_is_loaded(name, shelf, pipe, unet_call):
    """Equal output bit for bit, with LoRA, DoRA, alpha unlike the rank, other forms and targets."""
    folder, expected = shelf[name]
    adapter = load_adapter(pipe, folder)
    assert adapter.scale == 1.0 and loaded_adapters(pipe) == [adapter]
    assert torch.equal(unet_call(pipe.unet), expected)


@every_kind
def test_scale_zero_and_removal_give_the_base_model_bit_for_bit(name, shelf, pipe, unet_call, base):
    """And the UNet is the UNet of before: the same modules, processors, state and no hook."""
    modules, state = dict(pipe.unet.named_modules()), list(pipe.unet.state_dict())
    processors = {key: layer.processor for key, layer in attention_layers(pipe.unet).items()}
    folder, expected = shelf[name]
    adapter = load_adapter(pipe, folder)
    adapter.set_scale(0)
    assert torch.equal(unet_call(pipe.unet), base)
    adapter.set_scale(1)
    assert torch.equal(unet_call(pipe.unet), expected)
    adapter.remove()
    assert torch.equal(unet_call(pipe.unet), base)
    assert dict(pipe.unet.named_modules()) == modules and list(pipe.unet.state_dict()) == state
    assert {key: layer.processor for key, layer in attention_layers(pipe.unet).items()} == processors
    assert not pipe.unet._forward_pre_hooks and loaded_adapters(pipe) == []


def test_layers_of_several_depths_widths_and_heads_each_get_their_own(tiny_pipeline, unet_call, tmp_path):
    """The micro model of this file has layers of one size alone; this one has what tells SDXL's apart."""
    before = unet_call(tiny_pipeline.unet)
    unet, header = trained(tiny_pipeline, token="sks", **KINDS["alpha is not rank"])
    assert len(header.heads) == 34 and set(header.heads.values()) == {2, 4}
    save_adapter(tmp_path / "adapter", unet, header)
    adapter = load_adapter(tiny_pipeline, tmp_path / "adapter")
    assert torch.equal(unet_call(tiny_pipeline.unet), unet_call(unet))
    adapter.remove()
    assert torch.equal(unet_call(tiny_pipeline.unet), before)


def test_a_run_folder_is_as_good_as_its_adapter_folder(shelf, pipe, unet_call):
    """runs/sks and runs/sks/adapter mean the same, as text or as a path."""
    folder, expected = shelf["both"]
    assert find_adapter(folder) == find_adapter(str(folder.parent)) == folder
    assert load_adapter(pipe, str(folder.parent)).path == folder
    assert torch.equal(unet_call(pipe.unet), expected)


def test_an_adapter_loads_into_a_compiled_pipeline(shelf, pipe):
    """Names in files are free of torch.compile's prefix, and so are those of the adapter put on."""
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    adapter = load_adapter(pipe, shelf["both"][0])
    assert loaded_adapters(pipe) == [adapter]
    assert not any("_orig_mod" in name for name in adapter.header.heads)


def test_a_loaded_adapter_can_be_saved_again(shelf, pipe, unet_call, tmp_path, built_micro):
    """Under the name that it was loaded by: the same tensors, the same output."""
    folder, expected = shelf["alpha is not rank"]
    adapter = load_adapter(pipe, folder)
    save_adapter(tmp_path / "again", pipe.unet, adapter.header, name=adapter.name)
    for file in (COEFF_FILE, LORA_FILE):
        one, other = load_file(folder / file), load_file(tmp_path / "again" / file)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    twin = copy.deepcopy(built_micro)
    load_adapter(twin, tmp_path / "again")
    assert torch.equal(unet_call(twin.unet), expected)


@pytest.mark.parametrize("name", ["lora", "both", "alpha is not rank", "dora"])
def test_the_lora_part_is_plain_diffusers(name, shelf, pipe, built_micro, unet_call):
    """load_lora_weights of a pipeline that knows nothing of us: output equal to ours without alpha."""
    folder, _ = shelf[name]
    unet, _ = trained(built_micro, name, **(KINDS[name] | {"kind": "lora"}))
    pipe.load_lora_weights(str(folder))
    assert torch.equal(unet_call(pipe.unet), unet_call(unet))


def test_scale_applies_to_alpha_and_lora_alike(shelf, pipe, unet_call, tmp_path):
    """Scale 2 equals an adapter whose alphas, and whose LoRA alpha, are twice as large."""
    folder, _ = shelf["alpha is not rank"]
    header, alphas = read_coefficients(folder)
    double = header.model_copy(update={"lora": LoraHeader(rank=3, alpha=14)})
    rewrite(
        shutil.copytree(folder, tmp_path / "double"),
        double,
        {key: 2 * alpha for key, alpha in alphas.items()},
    )
    adapter = load_adapter(pipe, folder, scale=2)
    twice = unet_call(pipe.unet)
    adapter.remove()
    load_adapter(pipe, tmp_path / "double")
    assert torch.equal(unet_call(pipe.unet), twice)


def test_an_adapter_recommends_its_scale(shelf, pipe, unet_call, tmp_path):
    """Taken where none is given, 0 included; an explicit one wins."""
    folder = shutil.copytree(shelf["coeff"][0], tmp_path / "weak")
    change(folder, recommended_scale=0.25)
    adapter = load_adapter(pipe, folder)
    weak = unet_call(pipe.unet)
    assert adapter.scale == 0.25
    adapter.remove()
    adapter = load_adapter(pipe, folder, scale=0.0)
    assert adapter.scale == 0
    adapter.set_scale(0.25)
    assert torch.equal(unet_call(pipe.unet), weak)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(scale, shelf, pipe, unet_call, base):
    """At loading, with the pipeline as before, and later, with the adapter as before."""
    folder, expected = shelf["both"]
    with pytest.raises(AdapterError, match=r"The scale of .*adapter must be a finite number, not (nan|inf)"):
        load_adapter(pipe, folder, scale)
    assert torch.equal(unet_call(pipe.unet), base) and loaded_adapters(pipe) == []
    adapter = load_adapter(pipe, folder)
    with pytest.raises(AdapterError, match="finite number"):
        adapter.set_scale(scale)
    assert torch.equal(unet_call(pipe.unet), expected) and adapter.scale == 1


def test_several_adapters_come_on_and_off_in_any_order(shelf, pipe, unet_call, base):
    """Each alone is what it is alone, whatever else is loaded at scale 0 or was loaded before."""
    (one_folder, only_one), (other_folder, only_other) = shelf["both"], shelf["alpha is not rank"]
    one, other = load_adapter(pipe, one_folder), load_adapter(pipe, other_folder)
    together = unet_call(pipe.unet)
    assert min((together - alone).abs().max() for alone in (base, only_one, only_other)) > 0.01
    other.set_scale(0)
    assert torch.equal(unet_call(pipe.unet), only_one)
    one.set_scale(0)
    assert torch.equal(unet_call(pipe.unet), base)
    other.set_scale(1)
    assert torch.equal(unet_call(pipe.unet), only_other)
    other.remove()
    assert torch.equal(unet_call(pipe.unet), base)
    one.set_scale(1)
    assert torch.equal(unet_call(pipe.unet), only_one)
    third = load_adapter(pipe, other_folder)
    torch.testing.assert_close(unet_call(pipe.unet), together, rtol=1e-3, atol=1e-4)
    assert loaded_adapters(pipe) == [one, third] and one.name != third.name
    one.remove()
    assert torch.equal(unet_call(pipe.unet), only_other)
    third.remove()
    assert torch.equal(unet_call(pipe.unet), base)


def test_a_lora_of_somebody_else_is_left_alone(shelf, pipe, unet_call):
    """It was loaded first, it works under ours, and scale 0 and removal give back exactly its output."""
    pipe.load_lora_weights(str(shelf["lora"][0]), adapter_name="style")
    style = unet_call(pipe.unet)
    adapter = load_adapter(pipe, shelf["both"][0])
    together = unet_call(pipe.unet)
    assert not torch.allclose(together, shelf["both"][1], atol=0.01)
    adapter.set_scale(0)
    assert torch.equal(unet_call(pipe.unet), style)
    adapter.set_scale(1)
    assert torch.equal(unet_call(pipe.unet), together)
    adapter.remove()
    assert torch.equal(unet_call(pipe.unet), style)


def test_a_removed_adapter_says_so(shelf, pipe):
    """Its handle does nothing any more, least of all to another adapter of the same name."""
    adapter = load_adapter(pipe, shelf["both"][0])
    adapter.remove()
    other = load_adapter(pipe, shelf["coeff"][0])
    assert other.name == adapter.name
    for call in (adapter.remove, adapter.verify, lambda: adapter.set_scale(1)):
        with pytest.raises(AdapterError, match=r"has been removed from this pipeline; load it again"):
            call()
    other.verify()


def test_a_copy_of_a_pipeline_has_its_own_adapters(shelf, pipe, unet_call, base):
    """Removing one from the copy leaves the original's on, and its handle working."""
    folder, expected = shelf["both"]
    adapter = load_adapter(pipe, folder)
    twin = copy.deepcopy(pipe)
    (copied,) = loaded_adapters(twin)
    copied.remove()
    assert torch.equal(unet_call(twin.unet), base)
    assert torch.equal(unet_call(pipe.unet), expected)
    adapter.remove()
    assert torch.equal(unet_call(pipe.unet), base)


def test_verify_names_what_displaced_alpha(shelf, pipe):
    """Also at loading: a second adapter is not put on a UNet that has lost the first."""
    adapter = load_adapter(pipe, shelf["coeff"][0])
    adapter.verify()
    pipe.enable_attention_slicing()
    with pytest.raises(InjectionError, match="attention slicing"):
        adapter.verify()
    with pytest.raises(InjectionError, match="attention slicing"):
        load_adapter(pipe, shelf["both"][0])
    assert loaded_adapters(pipe) == [adapter] and not getattr(pipe.unet, "peft_config", None)
    adapter.remove()


def test_a_scale_is_set_wholly_or_not_at_all(shelf, pipe):
    """Alpha is gone: LoRA, which could still be scaled, stays at the scale of the rest."""
    adapter = load_adapter(pipe, shelf["both"][0])
    scaling = [dict(m.scaling) for m in pipe.unet.modules() if hasattr(m, "lora_A")]
    pipe.enable_attention_slicing()
    for scale in (0.5, 0):
        with pytest.raises(InjectionError, match=r"alpha is gone from .* attention slicing"):
            adapter.set_scale(scale)
    assert [dict(m.scaling) for m in pipe.unet.modules() if hasattr(m, "lora_A")] == scaling
    assert adapter._scale == 1
    adapter.remove()
    pipe.unet.set_default_attn_processor()
    lora = load_adapter(pipe, shelf["lora"][0])  # has no alpha that could be gone
    pipe.enable_attention_slicing()
    lora.set_scale(0.5)


def test_an_adapter_from_inference_mode_can_be_used_outside(shelf, pipe, unet_call):
    """Loaded in it, or moved in it, as offloading does in the middle of a picture."""
    folder, expected = shelf["both"]
    with torch.inference_mode():
        adapter = load_adapter(pipe, folder)
    pipe.unet.conv_in.requires_grad_(True)
    out = unet_call(pipe.unet)
    assert torch.equal(out, expected)
    out.sum().backward()
    adapter.set_scale(0.5)
    with torch.inference_mode():
        pipe.unet._apply(torch.clone)
    adapter.set_scale(0.25)
    scales = {float(c.scale) for c in coefficients_of(pipe.unet, adapter.name).values()}
    assert scales == {0.25}


def test_alphas_go_to_their_layers_or_nowhere(pipe):
    """fill_alphas is exact in both directions: nothing missing, nothing left over."""
    layers = inject(pipe.unet)
    alphas = {key: alpha + 1 for key, alpha in alphas_of(layers).items()}
    fill_alphas(layers, alphas)
    assert all((c.alpha == 1).all() for c in layers.values())
    key = f"{LAYER}.alpha"
    for wrong in ({k: a for k, a in alphas.items() if k != key}, alphas | {"what.alpha": torch.ones(2, 2)}):
        with pytest.raises(AdapterError, match=rf"({key}|what\.alpha) has no counterpart \(1 in all\)"):
            fill_alphas(layers, wrong)


# What a folder says of itself


@every_kind
def test_the_header_reads_back_as_it_was(name, shelf, built_micro):
    """Every field, through JSON, without touching a tensor."""
    _, header = trained(built_micro, name, **KINDS[name])
    assert read_header(shelf[name][0]) == header


def test_an_adapter_that_says_nothing_of_values_mixes_maps(shelf, pipe, unet_call, tmp_path):
    """Those of format 1, written before values could be mixed, load as they did."""
    folder, expected = shutil.copytree(shelf["coeff"][0], tmp_path / "old"), shelf["coeff"][1]
    header = json.loads(read_header(folder).model_dump_json())
    del header["mixes"]
    rewrite(folder, json.dumps(header | {"format_version": 1}))
    assert load_adapter(pipe, folder).header.mixes == "maps"
    assert torch.equal(unet_call(pipe.unet), expected)


def test_a_folder_holds_what_the_contract_says(shelf):
    """alpha in float32 under layer names; a plain LoRA file only with LoRA; the extras as they were given."""
    folder, _ = shelf["coeff"]
    assert {path.name for path in folder.iterdir()} == {COEFF_FILE, "README.md"}
    assert (folder / "README.md").read_bytes() == b"# card"
    tensors = load_file(folder / COEFF_FILE)
    assert len(tensors) == 8 and tensors[f"{LAYER}.alpha"].shape == (4, 4)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    folder, _ = shelf["lora"]
    assert {path.name for path in folder.iterdir()} == {COEFF_FILE, LORA_FILE, "README.md"}
    assert load_file(folder / COEFF_FILE) == {}
    assert all(key.startswith("unet.") and ".lora." in key for key in load_file(folder / LORA_FILE))


def test_saving_from_a_narrow_unet_keeps_alpha_wide(pipe, tmp_path):
    """float32 in, float32 out, bit for bit, whatever the UNet's own precision."""
    unet, header = trained(pipe, "x", "coeff")
    before = alphas_of(coefficients_of(unet))
    nn.Module.to(unet, torch.bfloat16)
    save_adapter(tmp_path / "a", unet, header)
    after = read_coefficients(tmp_path / "a")[1]
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_header_field_is_checked_when_it_is_made():
    """What the writer may not write, no reader has to cope with."""
    good = {
        "format_version": 1,
        "kind": "lora",
        "base_model": "m",
        "token": "t",
        "trained_steps": 1,
        "resolution": 8,
    }
    AdapterHeader(**good)
    for bad in (
        {"token": ""},
        {"token": "a\nb"},
        {"kind": "dora"},
        {"trained_steps": -1},
        {"class_word": "\x1b[2J"},
    ):
        with pytest.raises(ValueError):
            AdapterHeader(**(good | bad))


# Written whole or not at all


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failure_in_the_middle_leaves_the_old_adapter(pipe, tmp_path, monkeypatch):
    """The disk fills up between two files: the old folder is untouched and nothing lies about."""
    unet, header = trained(pipe, "old", **KINDS["both"])
    save_adapter(tmp_path / "adapter", unet, header)
    before = contents(tmp_path)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    unet, header = trained(pipe, "new", **KINDS["both"])
    monkeypatch.setattr("coeffdiff.hosts.diffusers.save_lora", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(tmp_path / "adapter", unet, header)
    assert contents(tmp_path) == before
    with pytest.raises(OSError, match="No space left"):
        save_adapter(tmp_path / "deep" / "first", unet, header)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    save_adapter(tmp_path / "adapter", unet, header)
    assert read_header(tmp_path / "adapter").token == "new"
    assert contents(tmp_path).keys() == before.keys()


# Refusals: each one sentence, printable, and the pipeline afterwards is the base model


def rewrite(folder, header=None, tensors=None, metadata=None):
    """coeff.safetensors anew: with another header, other tensors, or metadata of one's own."""
    file = folder / COEFF_FILE
    with safe_open(file, framework="pt") as opened:
        kept = dict(opened.metadata())
    if header is not None:
        kept["coeffdiff"] = header if isinstance(header, str) else header.model_dump_json()
    tensors = load_file(file) if tensors is None else tensors
    save_file(tensors, file, metadata=kept if metadata is None else metadata)


def change(folder, **fields):
    """coeff.safetensors with some of the header's fields replaced, unchecked."""
    with safe_open(folder / COEFF_FILE, framework="pt") as opened:
        header = json.loads(opened.metadata()["coeffdiff"])
    rewrite(folder, json.dumps(header | fields))


def alphas(folder, edit):
    """coeff.safetensors after edit(its tensors), its header as before."""
    tensors = load_file(folder / COEFF_FILE)
    edit(tensors)
    rewrite(folder, tensors=tensors)


def loras(folder, edit):
    tensors = load_file(folder / LORA_FILE)
    edit(tensors)
    save_file(tensors, folder / LORA_FILE)


def raw(folder, header, data=b"", length=None):
    """coeff.safetensors from its parts: 8 bytes of length, JSON, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / COEFF_FILE).write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + data
    )


def cut(file, size):
    content = file.read_bytes()
    file.write_bytes(content[:size])


KEY, LORA_KEY = f"{LAYER}.alpha", f"unet.{LAYER}.to_k.lora.down.weight"
UNREADABLE = "cannot be read; it is damaged or not a safetensors file"
FLOAT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

# name -> (adapter that is damaged, how, the sentence)
DAMAGED = {
    # the folder
    "no LoRA file": (
        "both",
        lambda f: (f / LORA_FILE).unlink(),
        "is incomplete: pytorch_lora_weights.* is missing",
    ),
    "a LoRA too many": (
        "coeff",
        lambda f: save_file({"a": torch.ones(1)}, f / LORA_FILE),
        r"does not belong here: coeff\.safetensors says that this adapter has no LoRA",
    ),
    "only a LoRA": (
        "lora",
        lambda f: (f / COEFF_FILE).unlink(),
        r"holds a plain LoRA without coeff\.safetensors",
    ),
    "nothing": (
        "coeff",
        lambda f: (f / COEFF_FILE).unlink(),
        r"is no adapter: it has no coeff\.safetensors\. Name a",
    ),
    # the file
    "empty": ("coeff", lambda f: cut(f / COEFF_FILE, 0), UNREADABLE),
    "seven bytes": ("coeff", lambda f: cut(f / COEFF_FILE, 7), UNREADABLE),
    "half": ("coeff", lambda f: cut(f / COEFF_FILE, (f / COEFF_FILE).stat().st_size // 2), UNREADABLE),
    "a byte short": ("coeff", lambda f: cut(f / COEFF_FILE, -1), UNREADABLE),
    "LoRA cut": (
        "both",
        lambda f: cut(f / LORA_FILE, -100),
        f"pytorch_lora_weights.safetensors {UNREADABLE}",
    ),
    "text": ("coeff", lambda f: (f / COEFF_FILE).write_text("no tensors" * 99), UNREADABLE),
    "a web page": (
        "coeff",
        lambda f: (f / COEFF_FILE).write_text("<html>404</html>" * 99),
        r"coeff\.safetensors is a web page and not the file that it should be; download it again",
    ),
    "pickle": (
        "coeff",
        lambda f: torch.save({}, f / COEFF_FILE),
        r"coeff\.safetensors is a zip file or a pickle, which is not opened, and no safetensors file",
    ),
    "foreign": (
        "coeff",
        lambda f: rewrite(f, metadata={"format": "pt"}),
        "was not written by coeffdiff: its header has",
    ),
    "no metadata": (
        "coeff",
        lambda f: save_file({"a": torch.ones(2)}, f / COEFF_FILE),
        "was not written by coeffdiff",
    ),
    # the header
    "newer": (
        "coeff",
        lambda f: change(f, format_version=FORMAT_VERSION + 1),
        "has format 5; this coeffdiff reads up to 4. Update it",
    ),
    "newer and strange": (
        "coeff",
        lambda f: rewrite(f, '{"format_version": 9, "kind": 1}'),
        "has format 9; this",
    ),
    "no JSON": ("coeff", lambda f: rewrite(f, "{sks"), r"damaged header \(its JSON\)"),
    "a list": ("coeff", lambda f: rewrite(f, "[]"), r"damaged header \(its structure\)"),
    "a number": ("coeff", lambda f: rewrite(f, "7"), r"damaged header \(its structure\)"),
    "nothing said": ("coeff", lambda f: rewrite(f, "{}"), r"damaged header \(format_version\)"),
    "mixing what nobody mixes": (
        "coeff",
        lambda f: change(f, mixes="queries"),
        r"damaged header \(mixes\)",
    ),
    "values where they were unknown": (
        "coeff",
        lambda f: change(f, format_version=1, mixes="values"),
        r"damaged header \(mixes\)",
    ),
    "kind unknown": ("coeff", lambda f: change(f, kind="loha"), r"damaged header \(kind\)"),
    "kind without alpha": (
        "coeff",
        lambda f: change(f, kind="lora"),
        "says it is of kind lora, but its header describes",
    ),
    "kind with LoRA": (
        "coeff",
        lambda f: change(f, kind="coeff+lora"),
        r"of kind coeff\+lora, but its header describes",
    ),
    "LoRA unsaid": ("both", lambda f: change(f, lora=None), r"of kind coeff\+lora, but its header describes"),
    "alpha unsaid": ("both", lambda f: change(f, heads={}), r"of kind coeff\+lora, but its header describes"),
    "rank of zero": (
        "both",
        lambda f: change(f, lora={"rank": 0, "alpha": 1}),
        r"damaged header \(lora\.rank\)",
    ),
    "rank of a billion": (
        "both",
        lambda f: change(f, lora={"rank": 10**9, "alpha": 1}),
        r"damaged header \(lora\.rank\)",
    ),
    "alpha of zero": (
        "both",
        lambda f: change(f, lora={"rank": 5, "alpha": 0}),
        r"damaged header \(lora\.alpha\)",
    ),
    "infinite scale": (
        "coeff",
        lambda f: change(f, recommended_scale=float("inf")),
        r"header \(recommended_scale\)",
    ),
    "long token": ("coeff", lambda f: change(f, token="x" * 201), r"damaged header \(token\)"),
    "control characters in the token": (
        "coeff",
        lambda f: change(f, token="sks\x1b[2J"),
        r"damaged header \(token\)",
    ),
    "control characters in a template": (
        "coeff",
        lambda f: change(f, templates=["a\x07"]),
        r"header \(templates\)",
    ),
    "control characters in a version": (
        "coeff",
        lambda f: change(f, versions={"a": "\r"}),
        r"header \(versions\)",
    ),
    "control characters in a key of the header": (
        "coeff",
        lambda f: change(f, versions={"\r\x1b[2J": 3}),
        r"damaged header \(versions\)",
    ),
    "control characters in a layer": (
        "coeff",
        lambda f: change(f, heads={"\x1b]0;x\x07": 2}),
        r"header \(heads\)",
    ),
    "a layer name of a megabyte": ("coeff", lambda f: change(f, heads={"x" * 2**20: 2}), r"header \(heads\)"),
    "half a surrogate": ("coeff", lambda f: change(f, base_model="\ud800"), r"damaged header \(base_model\)"),
    "a JSON bomb": ("coeff", lambda f: rewrite(f, "[" * 100_000), r"damaged header \(its JSON\)"),
    "a number of a million digits": (
        "coeff",
        lambda f: rewrite(f, "1" * 1_000_000),
        r"damaged header \(its JSON\)",
    ),
    # the tensors
    "NaN": (
        "coeff",
        lambda f: alphas(f, lambda t: t[KEY].fill_(float("nan"))),
        "attn2.alpha is not finite float32",
    ),
    "infinity": (
        "coeff",
        lambda f: alphas(f, lambda t: t[KEY][0].fill_(float("inf"))),
        "is not finite float32",
    ),
    "half precision": (
        "coeff",
        lambda f: alphas(f, lambda t: t.update({KEY: t[KEY].half()})),
        "is not finite float32",
    ),
    "whole numbers": (
        "coeff",
        lambda f: alphas(f, lambda t: t.update({KEY: t[KEY].int()})),
        "is not finite float32",
    ),
    "a tensor less": (
        "coeff",
        lambda f: alphas(f, lambda t: t.pop(KEY)),
        "does not hold what its header says: .*attn2.alpha",
    ),
    "a tensor more": (
        "coeff",
        lambda f: alphas(f, lambda t: t.update({"x.alpha": torch.ones(2, 2)})),
        r"does not hold what its header says: x\.alpha is missing, foreign or of another shape",
    ),
    "another shape": (
        "coeff",
        lambda f: alphas(f, lambda t: t.update({KEY: torch.ones(2, 8)})),
        "does not hold what its header says: .*attn2.alpha is missing, foreign",
    ),
    "heads of a billion": (
        "coeff",
        lambda f: change(f, heads={LAYER: 10**9}),
        "does not hold what its header says",
    ),
    "control characters in a tensor's name": (
        "coeff",
        lambda f: alphas(f, lambda t: t.update({"\x1b[31m": torch.ones(2)})),
        r"coeff\.safetensors has a tensor name that is overlong or has control characters",
    ),
    "LoRA of NaN": (
        "both",
        lambda f: loras(f, lambda t: t[LORA_KEY].fill_(float("nan"))),
        "not a finite number",
    ),
    "LoRA of whole numbers": (
        "both",
        lambda f: loras(f, lambda t: t.update({LORA_KEY: t[LORA_KEY].int()})),
        "pytorch_lora_weights.safetensors: unet.*lora.down.weight holds something that is not a finite number",
    ),
    "LoRA in 8 bits": (
        "both",
        lambda f: loras(f, lambda t: t.update({LORA_KEY: t[LORA_KEY].to(torch.float8_e4m3fn)})),
        "holds something that is not a finite number",
    ),
    "LoRA with a stranger": (
        "both",
        lambda f: loras(f, lambda t: t.update({"text_encoder.x": torch.ones(2)})),
        r"has LoRA for text_encoder, where coeff.safetensors names none",
    ),
    "LoRA with control characters": (
        "both",
        lambda f: loras(f, lambda t: t.update({"\x1b[31m": torch.ones(2)})),
        r"lora_weights\.safetensors has a tensor name that is overlong or has control characters",
    ),
    "empty LoRA": (
        "both",
        lambda f: save_file({}, f / LORA_FILE),
        "is not a LoRA of this layout: it is empty",
    ),
    # the safetensors container itself
    "a length beyond the file": ("coeff", lambda f: raw(f, {}, length=2**40), UNREADABLE),
    "a length beyond all files": ("coeff", lambda f: raw(f, {}, length=2**64 - 1), UNREADABLE),
    "a length of zero": ("coeff", lambda f: raw(f, {"a": FLOAT}, bytes(8), length=0), UNREADABLE),
    "offsets beyond the file": (
        "coeff",
        lambda f: raw(f, {"a": FLOAT | {"data_offsets": [0, 8]}}),
        UNREADABLE,
    ),
    "negative offsets": (
        "coeff",
        lambda f: raw(f, {"a": FLOAT | {"data_offsets": [-8, 0]}}, bytes(8)),
        UNREADABLE,
    ),
    "backward offsets": (
        "coeff",
        lambda f: raw(f, {"a": FLOAT | {"data_offsets": [8, 0]}}, bytes(8)),
        UNREADABLE,
    ),
    "overlapping offsets": ("coeff", lambda f: raw(f, {"a": FLOAT, "b": FLOAT}, bytes(8)), UNREADABLE),
    "a hole": ("coeff", lambda f: raw(f, {"a": FLOAT | {"data_offsets": [8, 16]}}, bytes(16)), UNREADABLE),
    "a shape beyond its data": (
        "coeff",
        lambda f: raw(f, {"a": FLOAT | {"shape": [2**62, 2**62]}}, bytes(8)),
        UNREADABLE,
    ),
    "a negative shape": ("coeff", lambda f: raw(f, {"a": FLOAT | {"shape": [-2]}}, bytes(8)), UNREADABLE),
    "a header that is larger than any": (
        "coeff",
        lambda f: raw(f, b'{"a":' + b" " * (5 * 2**20) + b"1}"),
        r"coeff\.safetensors has a header of 5 MiB; no coeff\.safetensors needs more than 4",
    ),
    "a LoRA header that is larger than any": (
        "both",
        lambda f: (f / LORA_FILE).write_bytes(struct.pack("<Q", 5 * 2**20) + b"{}".ljust(5 * 2**20)),
        r"lora_weights\.safetensors has a header of 5 MiB; no pytorch_lora_weights\.safetensors needs more than 4",
    ),
    "100,000 keys": (
        "coeff",
        lambda f: raw(f, {str(i): FLOAT | {"shape": [0], "data_offsets": [0, 0]} for i in range(60_000)}),
        "was not written by coeffdiff",
    ),
    "every key twice": (
        "coeff",
        lambda f: raw(f, b'{"a":%b,"a":%b}' % ((json.dumps(FLOAT).encode(),) * 2), bytes(8)),
        f"{UNREADABLE}|was not written by coeffdiff",
    ),
    "metadata twice": (
        "coeff",
        lambda f: raw(f, b'{"__metadata__":{},"__metadata__":{"coeffdiff":"1"}}'),
        ".",
    ),
    "the same LoRA tensor under two names": (
        "both",
        lambda f: loras(
            f, lambda t: t.update({LORA_KEY.replace("lora.down", "lora_A"): t[LORA_KEY].clone()})
        ),
        "holds a tensor under two names",
    ),
    "a shape of a thousand dimensions": (
        "both",
        lambda f: loras(
            f, lambda t: t.update({LORA_KEY: t[LORA_KEY].reshape([*t[LORA_KEY].shape, *[1] * 60])})
        ),
        r"is \(5, \d+, and 60 more\), but this UNet needs",
    ),
    "steps without end": (
        "coeff",
        lambda f: change(f, trained_steps=10**4000),
        r"header \((trained_steps|its JSON)\)",
    ),
    "a version without end": (
        "coeff",
        lambda f: change(f, format_version=10**400),
        r"damaged header \(format_version\)",
    ),
    "an unknown dtype": ("coeff", lambda f: raw(f, {"a": FLOAT | {"dtype": "P99"}}, bytes(8)), UNREADABLE),
    "a nested header": ("coeff", lambda f: raw(f, b'{"a":' * 50_000), UNREADABLE),
    "control characters in a bad name": (
        "coeff",
        lambda f: raw(f, {"\x1b[31m": FLOAT | {"data_offsets": [8, 0]}}, bytes(8)),
        UNREADABLE,
    ),
}


@pytest.fixture(scope="module")
def untouched(built_micro):
    """One pipeline for all refusals: the next one would notice what the last one left."""
    return copy.deepcopy(built_micro)


@pytest.fixture
def refuse(untouched, unet_call, base):
    """refuse(path, sentence): load_adapter raises it, on one printable line, and the pipeline is the base model."""
    modules = [name for name, _ in untouched.unet.named_modules()]

    def check(path, sentence, error=AdapterError):
        with pytest.raises(error, match=sentence) as caught:
            load_adapter(untouched, path)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
        assert torch.equal(unet_call(untouched.unet), base)
        assert [name for name, _ in untouched.unet.named_modules()] == modules
        assert loaded_adapters(untouched) == [] and not getattr(untouched.unet, "peft_config", None)

    return check


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_refused_in_one_sentence(damage, shelf, tmp_path, refuse):
    """Truncated, foreign, inconsistent and hostile files: AdapterError, and nothing has changed."""
    name, break_it, sentence = DAMAGED[damage]
    folder = shutil.copytree(shelf[name][0], tmp_path / "adapter")
    break_it(folder)
    refuse(folder, sentence)


def test_a_file_far_too_large_is_not_even_opened(shelf, tmp_path, refuse):
    """65 MiB of coefficients would be 1,300 SDXLs; here it is a sparse file."""
    folder = shutil.copytree(shelf["coeff"][0], tmp_path / "adapter")
    with (folder / COEFF_FILE).open("r+b") as file:
        file.truncate(65 * 2**20)
    refuse(folder, r"coeff\.safetensors has 65 MiB; no coeff\.safetensors is that large")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process of its own with a limit")
@pytest.mark.parametrize("name", ["coeff", "both"])
def test_hostile_files_do_not_take_gigabytes(name, shelf, tmp_path, untouched):
    """Within 512 MiB of further address space: a header of lists upon lists, and a LoRA of 7 GiB of nothing."""
    folder = shutil.copytree(shelf[name][0], tmp_path / "adapter")
    if name == "coeff":
        rewrite(folder, "[" + "{}," * 1_300_000 + "{}]")
    else:
        shape = [2**20, 1792]
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}
        text = json.dumps({"unet.x.lora.down.weight": entry}).encode()
        (folder / LORA_FILE).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(folder / LORA_FILE, 8 + len(text) + entry["data_offsets"][1])
    child = os.fork()
    if not child:
        code = 3
        try:
            # Address space that is mapped but not used counts too, so the LoRA's own file comes on top
            room = 2**29 + (7 * 2**30 if name == "both" else 0)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room,) * 2)
            load_adapter(untouched, folder)
        except AdapterError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_path_that_is_no_adapter_says_what_it_is(shelf, tmp_path, refuse):
    """Nothing there; a run that has not finished; a file of something else."""
    refuse(tmp_path / "sks", r"There is no adapter .*sks\.$")
    (tmp_path / "config.yaml").touch()
    refuse(tmp_path, r"The run .* has no adapter yet: it has not finished\. Continue it with train --resume")
    (tmp_path / "notes.md").write_text("mine")
    refuse(tmp_path / "notes.md", r"notes\.md is no adapter, .* Name a run folder or its adapter folder")


def test_an_adapter_of_another_architecture_is_a_mismatch(shelf, tmp_path, refuse, pipe):
    """Another number of heads, a layer that is not there, another width: with the model that it was trained on."""
    folder = shutil.copytree(shelf["coeff"][0], tmp_path / "adapter")
    header, tensors = read_coefficients(folder)
    other = header.model_copy(update={"heads": header.heads | {LAYER: 20}})
    rewrite(folder, other, tensors | {KEY: torch.zeros(20, 20)})
    sentence = rf"has 20 x 20 coefficients for {LAYER}, but this UNet has 4 heads there\. The adapter was trained on tiny"
    refuse(folder, sentence, AdapterMismatch)
    with pytest.raises(AdapterMismatch, match=sentence):
        check_architecture(pipe.unet, other, folder)

    renamed = {name.replace("mid_block", "mid_block.9"): heads for name, heads in header.heads.items()}
    rewrite(
        folder,
        header.model_copy(update={"heads": renamed}),
        {key.replace("mid_block", "mid_block.9"): tensor for key, tensor in tensors.items()},
    )
    refuse(folder, r"coefficients for mid_block\.9\..* but this UNet has no such layer", AdapterMismatch)

    folder = shutil.copytree(shelf["lora"][0], tmp_path / "lora")
    loras(folder, lambda t: t.update({LORA_KEY: torch.zeros(3, 2048)}))
    refuse(folder, r"lora_A\.weight is \(3, 2048\), but this UNet needs \(3, 48\)", AdapterMismatch)


def test_a_lora_of_another_rank_than_promised_is_refused(shelf, tmp_path, refuse):
    """The header says 4, the tensors 5; alpha is already on when this is found, and comes off."""
    folder = shutil.copytree(shelf["both"][0], tmp_path / "adapter")
    change(folder, lora={"rank": 4, "alpha": 5})
    refuse(folder, r"is \(5, \d+\), but this UNet needs \(4, \d+\)", AdapterMismatch)


def test_two_adapters_of_one_token_are_refused(shelf, tmp_path, pipe, unet_call):
    """A prompt could not tell them apart; capitals do not help, since CLIP sees none."""
    folder, expected = shelf["both"]
    load_adapter(pipe, folder)
    twin = shutil.copytree(shelf["coeff"][0], tmp_path / "twin")
    change(twin, token="BOTH")
    with pytest.raises(
        AdapterError, match=r"twin and .*adapter both use the token 'BOTH'; .* another --token"
    ):
        load_adapter(pipe, twin)
    assert torch.equal(unet_call(pipe.unet), expected) and len(loaded_adapters(pipe)) == 1


def damaged(content, draw):
    """The bytes of a file with up to five of them changed, the first ones more often, and sometimes cut off."""
    content, anywhere = bytearray(content), st.integers(0, 16) | st.integers(0, len(content) - 1)
    for position, byte in draw(st.lists(st.tuples(anywhere, st.integers(0, 255)), min_size=1, max_size=5)):
        content[position] = byte
    return content[: draw(anywhere)] if draw(st.integers(0, 4)) == 0 else content


many_times = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@given(data=st.data())
@many_times
def test_random_damage_never_escapes(data, shelf, tmp_path, untouched):
    """Bytes changed or cut off anywhere in coeff.safetensors: AdapterError, or an adapter that loads. Nothing else."""
    folder = tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / COEFF_FILE).write_bytes(damaged((shelf["coeff"][0] / COEFF_FILE).read_bytes(), data.draw))
    try:
        adapter = load_adapter(untouched, folder)
    except AdapterError as error:
        assert str(error).isprintable()
    else:
        adapter.remove()


@given(data=st.data())
@many_times
def test_random_damage_to_a_lora_never_escapes(data, shelf, tmp_path):
    """The same for the other file, as far as reading it goes."""
    header = read_header(shelf["both"][0])
    (tmp_path / LORA_FILE).write_bytes(damaged((shelf["both"][0] / LORA_FILE).read_bytes(), data.draw))
    try:
        assert all(tensor.isfinite().all() for tensor in read_lora(tmp_path, header).values())
    except AdapterError as error:
        assert str(error).isprintable()


# A learned token

WIDTHS = {"clip_l": 20, "clip_g": 28}


def rows_of(token, vectors):
    return {
        key: torch.randn(vectors, width, generator=generator_for(token, key)) for key, width in WIDTHS.items()
    }


@pytest.fixture(scope="module")
def token_shelf(built_micro, tmp_path_factory):
    """token -> adapter folder: one alone with two vectors, one with alpha and LoRA."""
    found = {}
    for token, vectors, options in (("sks", 2, KINDS["both"]), ("ohwx", 1, {"kind": "coeff"})):
        unet, header = trained(built_micro, token=token, **options)
        header = header.model_copy(update={"kind": f"{header.kind}+token", "vectors": vectors})
        found[token] = tmp_path_factory.mktemp("tokens") / token / "adapter"
        save_adapter(found[token], unet, header, rows=rows_of(token, vectors))
    header = header.model_copy(update={"kind": "token", "token": "zwx", "heads": {}, "vectors": 3})
    found["zwx"] = tmp_path_factory.mktemp("tokens") / "zwx" / "adapter"
    save_adapter(found["zwx"], built_micro.unet, header, rows=rows_of("zwx", 3))
    return found


def reads(pipe, text="a sks and ohwx, zwx"):
    """What both text encoders make of a text, and how."""
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
    return embeds, pooled


def test_a_learned_token_is_exact_from_saving_to_removal(token_shelf, pipe, unet_call, base):
    """Loaded bit for bit, at scale 0 and after removal the very tokenizers, matrices and pooling of before."""
    plain = reads(pipe)
    tokenizers, encoders = (pipe.tokenizer, pipe.tokenizer_2), (pipe.text_encoder, pipe.text_encoder_2)
    matrices = [encoder.get_input_embeddings() for encoder in encoders]
    adapter = load_adapter(pipe, token_shelf["sks"])
    ids = torch.tensor(pipe.tokenizer("sks", add_special_tokens=False).input_ids)
    for encoder, (key, rows) in zip(encoders, rows_of("sks", 2).items(), strict=True):
        assert torch.equal(encoder.get_input_embeddings()(ids), rows), key
    learned = reads(pipe)
    assert not torch.equal(learned[1], plain[1])
    adapter.set_scale(0)
    assert all(torch.equal(now, then) for now, then in zip(reads(pipe), plain, strict=True))
    assert torch.equal(unet_call(pipe.unet), base)
    adapter.set_scale(0.5)
    assert all(torch.equal(now, then) for now, then in zip(reads(pipe), learned, strict=True))
    adapter.remove()
    assert all(torch.equal(now, then) for now, then in zip(reads(pipe), plain, strict=True))
    assert (
        pipe.tokenizer is tokenizers[0] and pipe.tokenizer_2 is tokenizers[1] and len(pipe.tokenizer) == 514
    )
    assert [encoder.get_input_embeddings() for encoder in encoders] == matrices
    assert pipe.text_encoder.eos_token_id == pipe.text_encoder_2.text_model.eos_token_id == 2
    assert torch.equal(unet_call(pipe.unet), base)


def test_several_learned_tokens_at_once(token_shelf, pipe):
    """Three adapters, each with a token of its own; taken off one by one, the others read as if it had never come."""
    plain = reads(pipe)
    alone = load_adapter(pipe, token_shelf["zwx"])
    only = reads(pipe)
    others = [load_adapter(pipe, token_shelf[token]) for token in ("sks", "ohwx")]
    together = reads(pipe)
    assert not torch.equal(together[0], only[0])
    alone.remove()
    again = load_adapter(pipe, token_shelf["zwx"])
    assert all(torch.equal(now, then) for now, then in zip(reads(pipe), together, strict=True))
    for other in others:
        other.remove()
    assert all(torch.equal(now, then) for now, then in zip(reads(pipe), only, strict=True))
    again.remove()
    assert all(torch.equal(now, then) for now, then in zip(reads(pipe), plain, strict=True))


def test_parts_of_text_that_were_put_away_are_restored_as_well(token_shelf, pipe):
    """The pipeline has them no longer when the adapter is switched off and removed, and again when it reads."""
    plain, names = reads(pipe), ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    adapter = load_adapter(pipe, token_shelf["sks"])
    for act in (lambda: adapter.set_scale(0), lambda: adapter.set_scale(1), adapter.remove):
        parts = {name: getattr(pipe, name) for name in names}
        for name in names:
            setattr(pipe, name, None)
        act()
        for name, part in parts.items():
            setattr(pipe, name, part)
        on = bool(loaded_adapters(pipe)) and adapter.scale == 1
        assert torch.equal(reads(pipe)[0], plain[0]) == (not on)
    assert "save_pretrained" not in vars(pipe.text_encoder) and "save_pretrained" not in vars(pipe.tokenizer)


def test_two_unets_that_share_text_encoders_have_tokens_of_their_own(token_shelf, pipe):
    """An adapter on each: the second takes no name that the first one's token has."""
    other = type(pipe)(**pipe.components | {"unet": copy.deepcopy(pipe.unet)})
    first = load_adapter(pipe, token_shelf["sks"])
    load_adapter(other, token_shelf["ohwx"])
    for token, vectors in (("sks", 2), ("ohwx", 1)):
        assert len(pipe.tokenizer(token, add_special_tokens=False).input_ids) == vectors
        assert min(pipe.tokenizer(token, add_special_tokens=False).input_ids) >= 514
    first.verify_text(pipe)
    first.remove()
    assert min(pipe.tokenizer("ohwx", add_special_tokens=False).input_ids) == 514


def test_a_scale_is_refused_where_the_token_would_not_be_read(token_shelf, pipe):
    """Another tokenizer has taken the place of the one that reads it: alpha and LoRA keep their scale."""
    own, pipe.tokenizer = pipe.tokenizer, copy.deepcopy(pipe.tokenizer)
    another, pipe.tokenizer = pipe.tokenizer, own
    adapter = load_adapter(pipe, token_shelf["sks"])
    pipe.tokenizer = another
    with pytest.raises(InjectionError, match="this pipeline's tokenizer has been replaced since"):
        adapter.set_scale(0.5)
    assert {float(c.scale) for c in coefficients_of(pipe.unet, adapter.name).values()} == {1.0}
    pipe.tokenizer = own
    adapter.set_scale(0.5)


def test_one_token_learned_twice_is_refused(token_shelf, pipe):
    load_adapter(pipe, token_shelf["sks"])
    learned = reads(pipe)
    with pytest.raises(AdapterError, match=r"is the same adapter, given twice"):
        load_adapter(pipe, token_shelf["sks"])
    assert all(torch.equal(now, then) for now, then in zip(reads(pipe), learned, strict=True))


def test_a_pipeline_that_would_not_read_the_token_is_refused(token_shelf, pipe):
    """Prompts encoded by another pipeline around the same UNet, which has its own tokenizers."""
    other = copy.deepcopy(pipe)
    load_adapter(pipe, token_shelf["ohwx"])
    other.unet = pipe.unet
    encode_prompts(pipe, ["a ohwx"])
    with pytest.raises(InjectionError, match="A learned token is gone from this pipeline's text encoders"):
        encode_prompts(other, ["a ohwx"])
    pipe.text_encoder = None
    with pytest.raises(AdapterError, match="this pipeline has not all of them with their tokenizers"):
        load_adapter(pipe, token_shelf["zwx"])
    assert len(loaded_adapters(pipe)) == 1


def embeds(folder, edit):
    tensors = load_file(folder / EMBEDS_FILE)
    edit(tensors)
    save_file(tensors, folder / EMBEDS_FILE)


DAMAGED_TOKENS = {
    "missing": (lambda f: (f / EMBEDS_FILE).unlink(), "is incomplete: learned_embeds.safetensors is missing"),
    "cut off": (
        lambda f: cut(f / EMBEDS_FILE, 100),
        "learned_embeds.safetensors cannot be read; it is damaged",
    ),
    "a huge header": (
        lambda f: (f / EMBEDS_FILE).write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "learned_embeds.safetensors cannot be read; it is damaged",
    ),
    "far too large": (
        lambda f: (f / EMBEDS_FILE).open("r+b").truncate(65 * 2**20),
        "has 65 MiB; no learned_embeds.safetensors is that large",
    ),
    "another number of vectors": (
        lambda f: embeds(f, lambda t: t.update(clip_g=torch.ones(3, 28))),
        r"does not hold 2 vectors each for clip_l and clip_g, as its adapter says, but clip_g \(3, 28\), clip_l",
    ),
    "one encoder only": (lambda f: embeds(f, lambda t: t.pop("clip_l")), r"but clip_g \(2, 28\)\."),
    "another tool's keys": (
        lambda f: save_file({"emb_params": torch.ones(2, 20)}, f / EMBEDS_FILE),
        r"but emb_params \(2, 20\)\.",
    ),
    "nothing": (lambda f: save_file({}, f / EMBEDS_FILE), "but nothing"),
    "three dimensions": (
        lambda f: embeds(f, lambda t: t.update(clip_l=torch.ones(2, 20, 1))),
        r"clip_l \(2, 20, 1\)",
    ),
    "NaN": (
        lambda f: embeds(f, lambda t: t["clip_l"].fill_(float("nan"))),
        "clip_l holds something that is not",
    ),
    "integers": (
        lambda f: embeds(f, lambda t: t.update(clip_l=torch.ones(2, 20, dtype=torch.int64))),
        "clip_l holds something that is not a finite number",
    ),
    "an escape sequence as a name": (
        lambda f: save_file({"\x1b[2J": torch.ones(2, 20)}, f / EMBEDS_FILE),
        "has a tensor name that is overlong or has control characters",
    ),
    "foreign": (
        lambda f: change(f, kind="coeff+lora", vectors=0),
        "does not belong here: coeff.safetensors says that this adapter has no learned token",
    ),
    "a kind without it": (lambda f: change(f, kind="coeff+lora"), "its header describes something else"),
    "a kind without vectors": (lambda f: change(f, vectors=0), "its header describes something else"),
    "too many vectors": (lambda f: change(f, vectors=10**9), r"damaged header \(vectors\)"),
}


@pytest.mark.parametrize("damage", DAMAGED_TOKENS)
def test_a_damaged_token_is_refused_in_one_sentence(damage, token_shelf, tmp_path, refuse):
    break_it, sentence = DAMAGED_TOKENS[damage]
    folder = shutil.copytree(token_shelf["sks"], tmp_path / "adapter")
    break_it(folder)
    refuse(folder, sentence)


def test_a_token_of_another_model_is_a_mismatch(token_shelf, tmp_path, refuse, untouched):
    """Its vectors are of another width; alpha is already on when this is found, and comes off."""
    folder = shutil.copytree(token_shelf["sks"], tmp_path / "adapter")
    embeds(folder, lambda t: t.update(clip_g=torch.ones(2, 1280)))
    sentence = r"shape \(2, 1280\) for clip_g, but this model's text_encoder_2 has embeddings of width 28"
    refuse(folder, sentence, AdapterMismatch)
    assert len(untouched.tokenizer) == 514 and untouched.text_encoder.eos_token_id == 2


@given(data=st.data())
@many_times
def test_random_damage_to_a_token_never_escapes(data, token_shelf, tmp_path):
    header = read_header(token_shelf["sks"])
    (tmp_path / EMBEDS_FILE).write_bytes(damaged((token_shelf["sks"] / EMBEDS_FILE).read_bytes(), data.draw))
    try:
        assert all(tensor.isfinite().all() for tensor in read_rows(tmp_path, header).values())
    except AdapterError as error:
        assert str(error).isprintable()
