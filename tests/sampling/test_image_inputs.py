"""img2img, inpainting and ControlNet: the pictures of diffusers' own pipelines, with the adapter; mistakes before."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from typer.testing import CliRunner

from coeffdiff import load_adapter
from coeffdiff.cli.root import app
from coeffdiff.errors import ConfigError
from coeffdiff.hosts.diffusers import save_adapter
from coeffdiff.hosts.unet import inject
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.pocket.model import save_random
from coeffdiff.sampling.generation import generate
from coeffdiff.sampling.image_inputs import ImageOptions, pipeline_for, read_inputs
from coeffdiff.sampling.options import Options, Request
from coeffdiff.utils.png import read_recipe

PROMPT, SEED, SIDE = "a ball", 7, 64


@pytest.fixture(scope="module")
def shop(built_micro, tmp_path_factory) -> Path:
    """A folder with the tiny model, an adapter of random alphas, a ControlNet, and pictures of 96 x 64 pixels."""
    folder = tmp_path_factory.mktemp("shop")
    save_random("micro", folder / "model")
    unet, generator = copy.deepcopy(built_micro.unet), torch.Generator().manual_seed(3)
    layers = inject(unet)
    for layer in layers.values():
        layer.alpha.data += 0.3 * torch.randn(layer.alpha.shape, generator=generator)
    header = AdapterHeader(
        format_version=1,
        kind="coeff",
        base_model=str(folder / "model"),
        token="sks",
        heads={name: layer.heads for name, layer in layers.items()},
        trained_steps=5,
        resolution=SIDE,
    )
    save_adapter(folder / "adapter", unet, header)
    control = ControlNetModel.from_unet(copy.deepcopy(built_micro.unet))
    for parameter in control.parameters():  # its last layers begin at zero, and would steer nothing
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    control.save_pretrained(folder / "control")
    x, y = np.meshgrid(np.linspace(0, 1, 96), np.linspace(0, 1, 64))
    pixels = np.stack([x, y, 1 - x], -1)
    Image.fromarray((255 * pixels).astype("uint8")).save(folder / "photo.png")
    Image.fromarray((255 * (x > 0.5)).astype("uint8")).save(folder / "mask.png")
    Image.fromarray((255 * (np.sin(40 * x) > 0)).astype("uint8")).save(folder / "edges.png")
    return folder


TASKS = {  # task -> diffusers' pipeline, what is given
    "img2img": ("Img2Img", ["init"]),
    "inpaint": ("Inpaint", ["init", "mask"]),
    "control": ("ControlNet", ["control"]),
    "control img2img": ("ControlNetImg2Img", ["init", "control"]),
    "control inpaint": ("ControlNetInpaint", ["init", "mask", "control"]),
}


def asked(shop: Path, given: list[str], **more) -> ImageOptions:
    files = {"init": "init_image", "mask": "mask_image", "control": "control_image"}
    names = {"init": "photo.png", "mask": "mask.png", "control": "edges.png"}
    options = {files[part]: shop / names[part] for part in given}
    if "control" in given:
        options["controlnet"] = str(shop / "control")
    return ImageOptions(**options, **more)


def picture(pipe, inputs, options, count=1) -> list[np.ndarray]:
    requests = [Request(PROMPT, SEED + number) for number in range(count)]
    return [np.asarray(image, int) for _, image in generate(pipe, requests, options, images=inputs)]


@pytest.mark.parametrize("task", TASKS)
def test_the_picture_is_that_of_diffusers_with_the_adapter_in_it(task, shop, micro_pipeline):
    """Within 1/255, in float32; alone or second in a batch; and the adapter and each input change it."""
    name, given = TASKS[task]
    strength = {"strength": 0.8} if "init" in given else {}
    inputs, options = read_inputs(asked(shop, given, **strength), Options(steps=4), SIDE, 8)
    assert (options.width, options.height) == (80, 56)  # 3 : 2 at the area of 64 x 64, in multiples of 8
    network = ControlNetModel.from_pretrained(shop / "control") if "control" in given else None
    micro_pipeline.set_progress_bar_config(disable=True)
    adapter = load_adapter(micro_pipeline, shop / "adapter")
    pipe = pipeline_for(micro_pipeline, inputs, network)
    [ours] = picture(pipe, inputs, options)

    kind = getattr(diffusers, f"StableDiffusionXL{name}Pipeline")
    their = kind(**micro_pipeline.components, **({"controlnet": network} if network else {}))
    their.set_progress_bar_config(disable=True)
    call = {"image": inputs.init or inputs.control, **strength}
    if inputs.mask:
        call["mask_image"] = inputs.mask
    if inputs.control:
        call["controlnet_conditioning_scale"] = 1.0  # diffusers' default is 0.8 in one of the three
    if inputs.init and inputs.control:
        call["control_image"] = inputs.control
    if name != "Img2Img":
        call |= {"width": 80, "height": 56}
    generator = torch.Generator().manual_seed(SEED)
    theirs = their(PROMPT, num_inference_steps=4, guidance_scale=5.0, generator=generator, **call).images[0]
    assert np.abs(ours - np.asarray(theirs, int)).max() <= 1

    [_, second] = picture(pipe, inputs, Options(4, width=80, height=56, batch_size=2), count=2)
    [alone] = list(generate(pipe, [Request(PROMPT, SEED + 1)], options, images=inputs))
    assert np.abs(second - np.asarray(alone[1], int)).max() <= 2
    adapter.set_scale(0)
    assert np.abs(picture(pipe, inputs, options)[0] - ours).max() > 2


def test_outside_the_mask_the_picture_stays(shop, micro_pipeline, monkeypatch):
    """The latents of the left half, black in the mask, are those of the picture, whatever is drawn in the right one."""
    inputs, options = read_inputs(asked(shop, ["init", "mask"]), Options(steps=3), SIDE, 8)
    assert inputs.strength == 1
    latents = []
    monkeypatch.setattr(
        "coeffdiff.sampling.generation._decode", lambda _, latent, __: latents.append(latent) or inputs.init
    )
    pipe = pipeline_for(micro_pipeline, inputs)
    picture(pipe, inputs, options)
    picture(pipe, replace(inputs, mask=Image.new("L", inputs.mask.size)), options)
    drawn, kept = latents
    assert torch.equal(drawn[..., :4], kept[..., :4])
    assert (drawn - kept)[..., 6:].abs().mean() > 0.1


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({}, (80, 56)),
        ({"width": 64}, (64, 40)),
        ({"height": 64}, (96, 64)),
        ({"width": 32, "height": 32}, (32, 32)),
    ],
)
def test_the_size_follows_the_first_picture(given, size, shop):
    inputs, options = read_inputs(asked(shop, ["init", "mask"]), Options(**given), SIDE, 8)
    assert (options.width, options.height) == inputs.init.size == inputs.mask.size == size


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--mask-image photo.png", "--mask-image needs a picture to begin from: --init-image"),
        ("--strength 0.5", "--strength needs a picture to begin from"),
        ("--init-image photo.png --strength 0", "--strength must lie above 0 and be at most 1, not 0"),
        ("--init-image photo.png --strength 0.1 --steps 5", "--strength 0.1 of 5 steps leaves no step"),
        ("--init-image nowhere.png", "The picture nowhere.png cannot be read: No such file"),
        ("--init-image note.txt", "The picture note.txt cannot be read: its content is none of JPEG"),
        ("--init-image photo.png --mask-image small.png", "small.png is 9 x 9 pixels and photo.png 96 x 64"),
        ("--controlnet control", "--controlnet and --control-image belong together"),
        ("--control-image photo.png", "--controlnet and --control-image belong together"),
        ("--controlnet model --control-image photo.png", "--controlnet model holds no config.json"),
        (
            "--controlnet model/unet --control-image photo.png",
            "is a UNet2DConditionModel, and a ControlNetModel",
        ),
        (
            "--controlnet other --control-image photo.png",
            "belongs to another model: its cross_attention_dim is 7",
        ),
        ("--controlnet half --control-image photo.png", "is incomplete: diffusion_pytorch_model.safetensors"),
        (
            "--controlnet photo.png --control-image photo.png",
            "photo.png is a file; pass a hub id or a folder",
        ),
        ("--controlnet control --control-image photo.png --control-scale nan", "must be a finite number"),
    ],
)
def test_a_mistake_is_one_sentence_before_weights_are_read(arguments, sentence, shop, tmp_path, monkeypatch):
    for name in ("model", "adapter", "control", "photo.png"):
        (tmp_path / name).symlink_to(shop / name)
    (tmp_path / "note.txt").write_text("a note")
    Image.new("L", (9, 9)).save(tmp_path / "small.png")
    config = json.loads((shop / "control/config.json").read_text())
    for folder, changes in (("other", {"cross_attention_dim": 7}), ("half", {})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config | changes))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("coeffdiff.sampling.session.load_pipeline", _only_outlines())
    result = CliRunner().invoke(app, ["sample", "--adapter", "adapter", "--prompt", "a", *arguments.split()])
    assert result.exit_code == 2, result.output
    [line] = [line for line in result.stderr.splitlines() if "Error: " in line]
    assert sentence in line
    assert not (tmp_path / "samples").exists()


def _only_outlines():
    from coeffdiff.sampling.session import load_pipeline

    def load(*args, parts=None, **more):
        assert parts == (), "weights were read"
        return load_pipeline(*args, parts=parts, **more)

    return load


def test_every_input_stands_in_the_recipe(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [
        "--init-image",
        "photo.png",
        "--strength",
        "0.5",
        "--mask-image",
        "mask.png",
        "--control-scale",
        "0.7",
    ]
    given += ["--controlnet", "control", "--control-image", "edges.png"]
    given = [str(shop / word) if (shop / word).exists() else word for word in given]
    line = [
        "sample",
        "--adapter",
        str(shop / "adapter"),
        "--prompt",
        "a <V>",
        "--steps",
        "2",
        "--json",
        *given,
    ]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    recipe = read_recipe(Path(json.loads(result.stdout)["files"][0]))
    assert recipe["strength"] == 0.5 and recipe["control_scale"] == 0.7
    assert recipe["controlnet"] == str(shop / "control")
    assert (recipe["width"], recipe["height"]) == (80, 56)
    for name, file in (("init_image", "photo"), ("mask_image", "mask"), ("control_image", "edges")):
        assert recipe[name]["path"] == str(shop / f"{file}.png") and len(recipe[name]["sha256"]) == 64


def test_a_negative_control_scale_is_refused():
    with pytest.raises(ConfigError, match="finite"):
        ImageOptions(controlnet="a", control_image=Path("b"), control_scale=-1)
