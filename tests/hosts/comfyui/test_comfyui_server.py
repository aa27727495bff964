"""The node in ComfyUI's own server, over HTTP, from a folder that `coeffdiff comfyui install` wrote or from a link.

Skipped unless the environment variable COMFYUI names ComfyUI's folder; scripts/test_comfyui.sh fetches one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_twins import relative
from PIL import Image
from safetensors.torch import load_file

import coeffdiff
from coeffdiff.hosts.comfyui.install import install
from comfyui_host import comfyui_folder

pytestmark = pytest.mark.skipif(comfyui_folder() is None, reason="COMFYUI names no ComfyUI")
PROMPT, STEPS, SIDE, GUIDANCE = "a photo of ohwx toy, in the snow", 3, 64, 5.0


@pytest.fixture(scope="module")
def base(on_path, tmp_path_factory):
    """A server's folders with the node installed, models, and one adapter of each layout in models/coeffdiff."""
    from comfyui_server import make_base
    from comfyui_workflow import first_latent, make_pipeline, save_latent, save_models
    from narrow_sdxl import make_adapter

    base = tmp_path_factory.mktemp("comfyui")
    make_base(base)
    install(base)
    pipe = make_pipeline(comfyui_folder())
    save_models(pipe, base / "models")
    save_latent(first_latent(pipe, 0, SIDE, STEPS), base / "input" / "start.latent")
    draw = torch.Generator().manual_seed(1)
    rows = {
        part: 0.02 * torch.randn(2, width, generator=draw)
        for part, width in (("clip_l", 768), ("clip_g", 1280))
    }
    run = base / "models" / "coeffdiff" / "toys" / "ohwx"
    make_adapter(run / "adapter", pipe.unet, kind="coeff+lora+token", rows=rows)
    (run / "config.yaml").write_text("{}")
    shutil.copytree(run / "adapter", base / "models" / "coeffdiff" / "folder")
    yield base, pipe
    shutil.rmtree(base, ignore_errors=True)  # gigabytes


@pytest.fixture(scope="module")
def server(base):
    from comfyui_server import serving

    with serving(comfyui_folder(), base[0]) as running:
        yield running


def picture(server, adapter, prompt=PROMPT, **inputs):
    """The latents that the server's sampler ends with, scaled as diffusers' are, and the picture."""
    from comfyui_workflow import LATENT_SCALE, output_file, workflow

    done = server.run(workflow(prompt, steps=STEPS, guidance=GUIDANCE, adapter=adapter, **inputs))
    assert done["status"]["status_str"] == "success", server.said()
    latent = output_file(server.base, done["outputs"]["latent"]["latents"][0])
    image = output_file(server.base, done["outputs"]["image"]["images"][0])
    return load_file(latent)["latent_tensor"] * LATENT_SCALE, np.asarray(
        Image.open(image).convert("RGB"), dtype=int
    )


@pytest.fixture(scope="module")
def first(server):
    """Latents and picture of the run in models/coeffdiff/toys/ohwx."""
    return picture(server, "toys/ohwx")


def test_the_picture_over_http_is_coeffdiffs(server, base, first):
    """Alpha, LoRA and the learned word through stock loaders and samplers: latents 1e-4, pixels within 1."""
    from coeffdiff.hosts.diffusers import load_adapter

    pipe = base[1]
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": SIDE, "width": SIDE}
    adapter = load_adapter(pipe, base[0] / "models/coeffdiff/toys/ohwx")

    def start():
        return {"generator": torch.Generator("cpu").manual_seed(0), **settings}

    wanted = pipe(PROMPT, output_type="latent", **start()).images
    pixels = np.asarray(pipe(PROMPT, **start()).images[0], dtype=int)
    adapter.remove()
    latents, image = first
    print(
        f"over HTTP, {STEPS} steps: {relative(latents, wanted):.1e} relative, pixels {abs(image - pixels).max()}"
    )
    assert relative(latents, wanted) < 1e-4
    assert abs(image - pixels).max() <= 1
    assert relative(picture(server, "toys/ohwx", prompt=PROMPT.replace("ohwx", "ohw"))[0], wanted) > 1e-3


def test_runs_and_adapter_folders_are_listed(server):
    """A run by its name, an adapter folder by its own; and the node's package is the copy."""
    info = server.get("/object_info/LoadCoeffdiffAdapter")["LoadCoeffdiffAdapter"]
    assert info["display_name"] == "Load coeffdiff adapter"
    assert info["input"]["required"]["adapter"][1]["options"] == ["folder", "toys/ohwx"]
    where = server.base / "custom_nodes" / "coeffdiff" / "coeffdiff"
    assert (
        f"coeffdiff {coeffdiff.__version__}: the node and its package are in {where}"
        in server.log.read_text()
    )


def test_a_typed_path_takes_the_lists_place(server, first):
    run = server.base / "models" / "coeffdiff" / "toys" / "ohwx"
    assert torch.equal(picture(server, "folder", path=f'"{run}"')[0], first[0])


@pytest.mark.parametrize(
    ("adapter", "path", "sentence"),
    [
        ("none", "", "No adapter is chosen. Put a run or an adapter folder into"),
        ("gone", "", "There is no adapter"),
        ("folder", "/nowhere/ohwx", "There is no adapter /nowhere/ohwx"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(server, adapter, path, sentence):
    from comfyui_workflow import workflow

    with pytest.raises(RuntimeError, match=sentence):
        server.run(workflow(PROMPT, steps=STEPS, guidance=GUIDANCE, adapter=adapter, path=path))


def test_an_adapter_that_is_trained_again_is_loaded_again(server):
    """ComfyUI keeps what nodes have given: the same workflow again draws nothing, but after a training it does."""
    from comfyui_workflow import workflow
    from narrow_sdxl import NARROW, make_adapter, make_unet

    drawn = workflow(PROMPT, steps=STEPS, guidance=GUIDANCE, adapter="toys/ohwx", strength=0.5)
    assert server.run(drawn)["outputs"]["latent"]
    assert server.run(drawn)["outputs"] == {}
    folder = server.base / "models" / "coeffdiff" / "toys" / "ohwx" / "adapter"
    shutil.rmtree(folder)
    make_adapter(folder, make_unet(NARROW), kind="coeff", seed=5)
    assert server.run(drawn)["outputs"]["latent"]


def test_the_workflow_to_drag_in_fits_this_comfyui(server):
    """Each of its nodes exists, its links join an output with an input of the same kind, and its widgets are as many."""
    graph = json.loads(
        (server.base / "custom_nodes/coeffdiff/example_workflows/load_adapter.json").read_text()
    )
    nodes = {node["id"]: node for node in graph["nodes"]}
    for node in nodes.values():
        info = server.get(f"/object_info/{node['type']}")[node["type"]]
        inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
        slots = {slot["name"]: slot["type"] for slot in node["inputs"]}
        assert slots == {name: how[0] for name, how in inputs.items() if name in slots}
        assert [slot["type"] for slot in node["outputs"]] == info["output"]
        controls = sum(bool(how[1].get("control_after_generate")) for how in inputs.values() if len(how) > 1)
        assert len(node["widgets_values"]) == len(inputs) - len(slots) + controls, node["type"]
    for _, source, output, target, slot, kind in graph["links"]:
        assert nodes[source]["outputs"][output]["type"] == nodes[target]["inputs"][slot]["type"] == kind


def test_a_link_beside_an_installed_package(base, tmp_path):
    """custom_nodes/coeffdiff as a link to the package's folder, and `coeffdiff` importable as pip makes it."""
    from comfyui_server import make_base, serving

    make_base(tmp_path)
    package = Path(coeffdiff.__file__).parent
    (tmp_path / "custom_nodes" / "coeffdiff").symlink_to(package / "hosts" / "comfyui")
    site = tmp_path / "site"
    site.mkdir()
    (site / "coeffdiff").symlink_to(package)
    with serving(comfyui_folder(), tmp_path, site) as running:
        assert "LoadCoeffdiffAdapter" in running.get("/object_info/LoadCoeffdiffAdapter")
        assert f"are in {site / 'coeffdiff'}" in running.log.read_text()
