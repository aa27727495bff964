"""The LoRA of an adapter as a kohya file: read back by diffusers' own conversion, or refused in one sentence."""

from __future__ import annotations

import copy
import errno
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from coeffdiff import load_adapter
from coeffdiff.errors import AdapterError, ConfigError
from coeffdiff.hosts import kohya
from coeffdiff.hosts.diffusers import save_adapter
from coeffdiff.hosts.kohya import export_kohya
from coeffdiff.hosts.lora.layers import add_lora
from coeffdiff.hosts.unet import inject
from coeffdiff.method.adapter_header import AdapterHeader, LoraHeader
from coeffdiff.utils.seeding import generator_for


@pytest.fixture
def written(built_micro, tmp_path):
    """written(kind, rank=3, alpha=7, ...): an adapter folder with large random values; alpha is not the rank."""

    def write(kind, dora=False, token="ohwx"):
        unet, heads, lora, rows = copy.deepcopy(built_micro.unet), {}, None, None
        if "lora" in kind:
            lora = LoraHeader(rank=3, alpha=7, dora=dora)
            for name, p in add_lora(unet, rank=3, alpha=7, dora=dora).items():
                p.data += 0.2 * torch.randn(p.shape, generator=generator_for(name))
        if "coeff" in kind:
            heads = {name: c.heads for name, c in inject(unet).items()}
        if "token" in kind:
            widths = {"clip_l": built_micro.text_encoder, "clip_g": built_micro.text_encoder_2}
            rows = {key: torch.ones(1, e.config.hidden_size) for key, e in widths.items()}
        header = AdapterHeader(
            format_version=1,
            kind=kind,
            base_model="tiny",
            token=token,
            class_word="dog",
            heads=heads,
            lora=lora,
            vectors=1 if rows else 0,
            trained_steps=12,
            resolution=64,
        )
        folder = tmp_path / kind
        save_adapter(folder, unet, header, rows=rows)
        return folder

    return write


def test_a_kohya_file_is_the_lora_in_diffusers(written, micro_pipeline, unet_call, tmp_path):
    """load_lora_weights, which converts kohya's names itself, gives the pictures of our own LoRA to 1e-5."""
    folder = written("lora")
    done = export_kohya(folder, tmp_path / "out" / "mine.safetensors")
    assert done.embeddings == () and done.left_out == ()
    bare = unet_call(micro_pipeline.unet)
    adapter = load_adapter(micro_pipeline, folder)
    ours = unet_call(micro_pipeline.unet)
    adapter.remove()
    micro_pipeline.load_lora_weights(str(done.lora))
    theirs = unet_call(micro_pipeline.unet)
    assert (ours - bare).norm() > 0.1 * bare.norm()
    assert (theirs - ours).norm() < 1e-5 * ours.norm()


def test_each_module_has_two_matrices_and_its_alpha(written, tmp_path):
    """As many modules as the adapter's own file has pairs, with alpha 7 at rank 3, and the facts that tools show."""
    folder = written("coeff+lora")
    file = export_kohya(folder, tmp_path / "mine.safetensors", {"ss_seed": "5"}).lora
    tensors = load_file(file)
    modules = {key.split(".")[0] for key in tensors}
    assert all(name.startswith("lora_unet_") for name in modules)
    assert len(tensors) == 3 * len(modules)
    assert 2 * len(modules) == len(load_file(folder / "pytorch_lora_weights.safetensors"))
    assert all(tensors[f"{name}.alpha"].item() == 7 for name in modules)
    assert all(tensors[f"{name}.lora_down.weight"].shape[0] == 3 for name in modules)
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
    assert facts["ss_network_dim"] == "3" and facts["ss_network_alpha"] == "7" and facts["ss_seed"] == "5"
    assert facts["modelspec.trigger_phrase"] == "ohwx dog" and facts["ss_steps"] == "12"


def test_what_it_cannot_carry_is_listed_and_the_token_is_an_embedding(written, tmp_path):
    folder = written("coeff+lora+token", token="my/dog")
    done = export_kohya(folder, tmp_path / "my.safetensors")
    [sentence] = done.left_out
    assert re.match(r"alpha of \d+ layers is left out", sentence)
    assert done.embeddings == (tmp_path / "embeddings" / "my_dog.safetensors",)
    rows = load_file(done.embeddings[0])
    assert sorted(rows) == ["clip_g", "clip_l"] and all(
        torch.equal(r, torch.ones_like(r)) for r in rows.values()
    )


@pytest.mark.parametrize("kind", ["coeff", "token", "dora"])
def test_without_a_plain_lora_it_is_refused_and_nothing_is_written(kind, written, tmp_path):
    folder = written("lora", dora=True) if kind == "dora" else written(kind)
    words = {"coeff": "it holds alpha", "token": "it holds a learned token", "dora": "is a DoRA"}[kind]
    with pytest.raises(AdapterError, match=words):
        export_kohya(folder, tmp_path / "out" / "mine.safetensors")
    assert not (tmp_path / "out").exists()


def test_no_file_is_replaced(written, tmp_path):
    """Neither the LoRA's nor the embedding's; and a folder that cannot be written is refused before anything."""
    folder = written("lora+token")
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings" / "ohwx.safetensors").write_bytes(b"another's")
    with pytest.raises(
        AdapterError,
        match=r"embeddings.ohwx\.safetensors exists already .* name an --output in another folder",
    ):
        export_kohya(folder, tmp_path / "mine.safetensors")
    assert not (tmp_path / "mine.safetensors").exists()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="is not a folder"):
        export_kohya(folder, tmp_path / "file" / "mine.safetensors")


def test_an_embedding_that_is_there_is_no_obstacle(written, tmp_path):
    """Two exports of one token side by side, of which the second finds the first one's embedding."""
    folder = written("lora+token")
    first, second = (export_kohya(folder, tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert first.embeddings == second.embeddings and second.lora.is_file()
    with pytest.raises(AdapterError, match=r"two\.safetensors exists already"):
        export_kohya(folder, second.lora)


def test_an_export_that_fails_leaves_nothing_and_may_be_repeated(written, tmp_path, monkeypatch):
    """The disk is full when the LoRA is written, after the embedding. One that was there before stays."""
    folder, output = written("lora+token"), tmp_path / "out" / "mine.safetensors"
    real = kohya.atomic_write

    def full(file, **more):
        if file == output:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, **more)

    def refused():
        with monkeypatch.context() as patch:
            patch.setattr(kohya, "atomic_write", full)
            with pytest.raises(ConfigError, match=r"mine\.safetensors cannot be written: No space left"):
                export_kohya(folder, output)
        return [file for file in (tmp_path / "out").rglob("*") if file.is_file()]

    assert refused() == []
    done = export_kohya(folder, output)
    assert done.lora.is_file() and done.embeddings[0].is_file()
    done.lora.unlink()
    assert refused() == [*done.embeddings]
