"""How networks are found, fetched and refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hub_stand_in import Repo
from safetensors.torch import load_file, save_file
from small_labellers import SAID, save_segformer, save_vit_gpt2

from coeffdiff.errors import ConfigError, ModelError
from coeffdiff.labelling.captioner import find_captioner, load_captioner
from coeffdiff.labelling.networks import named_device, what_is_lacking
from coeffdiff.labelling.segmenter import find_segmenter, load_segmenter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    return save_vit_gpt2(tmp_path_factory.mktemp("captioner"))


def test_a_model_comes_from_the_hub_with_what_it_needs(captioner, hub, tmp_path):
    """Weights in several files, chat templates and tokenizers; no weights of other libraries. The second time offline."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    sharded = tmp_path / "sharded"
    shutil.copytree(captioner, sharded)
    (sharded / "model.safetensors").unlink()
    AutoModelForImageTextToText.from_pretrained(captioner).save_pretrained(sharded, max_shard_size="8KB")
    files = {file.name: file.read_bytes() for file in sharded.iterdir()}
    assert sum(name.startswith("model-0") for name in files) > 1
    hub.repos["me/captioner"] = Repo()
    hub.repos["me/captioner"].commit(
        files | {"tf_model.h5": b"x", "chat_template.jinja": b"x", "a.onnx": b"x"}
    )
    for down in (False, True):
        hub.down = down
        found = find_captioner("me/captioner")
        assert load_captioner(found, CPU, torch.float32).captions([Image.new("RGB", (9, 9))]) == [
            " ".join(SAID)
        ]
    assert set(hub.fetched()) == {*files, "chat_template.jinja"}


def test_without_a_network_it_is_said_how_to_get_the_model(hub):
    """The weights of some are still in PyTorch's own format."""
    hub.down = True
    with pytest.raises(
        ModelError, match=r"hf download me/captioner .*--include '\*\.bin' --include '\*\.safetensors'"
    ):
        find_captioner("me/captioner")


def test_weights_that_are_no_segmenters_are_refused(tmp_path):
    """transformers would fill the head with noise: as in SegFormer's backbones, which have none."""
    folder = save_segformer(tmp_path, {0: "wall", 1: "dog"})
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "decode_head" not in k},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        ModelError, match=r"its weights lack decode_head\..* of a SegformerForSemanticSegmentation"
    ):
        load_segmenter(find_segmenter(str(folder)), "dog", CPU)


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "nothing-known"}, {"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}]
)
def test_a_folder_that_transformers_does_not_know_is_one_sentence(tmp_path, config):
    """Code of its own is not run, nor does a question for it wait for an answer."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"^The model .* cannot be loaded: .*; an image-to-text model of transf"
    ):
        find_captioner(str(tmp_path))


def test_a_library_that_is_lacking_is_named():
    """With the words of transformers."""
    said = "\nXProcessor requires the Torchvision library but it was not found in your environment. Check"
    sentence = r"not installed \(`pip install torchvision`\): XProcessor requires the Torch"
    with pytest.raises(ModelError, match=sentence), what_is_lacking("me/model"):
        raise ImportError(said)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "xpu", ""])
def test_a_device_that_is_not_there_is_one_sentence(name):
    with pytest.raises(
        ConfigError, match=f"--device {name} c.*; leave it out, or name cpu, cuda, cuda:1 or mps"
    ):
        named_device(name)


def test_devices_by_name():
    assert named_device(None) is None and named_device("cpu") == CPU
