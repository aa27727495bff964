"""What `coeffdiff sample` does, from Python: open a session, check, load, draw."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.errors import AdapterError, ConfigError, ModelError
from coeffdiff.hosts.diffusers import save_adapter
from coeffdiff.hosts.unet import inject
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.models.opening import Asked
from coeffdiff.pocket.model import save_random
from coeffdiff.sampling.drawing import draw
from coeffdiff.sampling.options import Options
from coeffdiff.sampling.selection import Selection
from coeffdiff.sampling.session import open_session, read_adapters
from coeffdiff.utils.png import read_recipe

QUICK = Options(steps=2, batch_size=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("session") / "model"
    save_random("micro", folder)
    return folder


@pytest.fixture(scope="module")
def adapter(built_micro, model) -> Path:
    """Random alphas on the tiny model, token sks."""
    unet = copy.deepcopy(built_micro.unet)
    layers, generator = inject(unet), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in layers.values():
            layer.alpha.copy_(torch.randn(layer.alpha.shape, generator=generator))
    header = AdapterHeader(
        format_version=1, kind="coeff", base_model=str(model), token="sks", trained_steps=7, resolution=64,
        heads={name: layer.heads for name, layer in layers.items()},
    )  # fmt: skip
    save_adapter(model.parent / "adapter", unet, header)
    return model.parent / "adapter"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_draw_makes_the_pictures_of_the_command(adapter):
    """The same names, pixels and recipes, and the files in the same order."""
    arguments = ["sample", "--adapter", str(adapter), "--prompt", "a <V>", "--prompt", "snow", "-n", "2"]
    arguments += ["--steps", "2", "--batch-size", "2", "--scheduler", "ddim", "--output", "command"]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    drawn = draw(
        ["a <V>", "snow"],
        Selection(((adapter, None),)),
        QUICK,
        seeds=range(2),
        scheduler="ddim",
        output=Path("python"),
    )
    assert drawn.folder == Path("python")
    assert [Path("command") / file.name for file in drawn.files] == [*map(Path, told.stdout.splitlines())]
    for file in drawn.files:
        twin = Path("command") / file.name
        assert ImageChops.difference(Image.open(file), Image.open(twin)).getbbox() is None
        if file.name != "grid.png":
            assert read_recipe(file) == read_recipe(twin)


def test_without_a_folder_pictures_go_to_the_next_free_one(model):
    """The bare model: samples/001, then samples/002."""
    folders = [draw(["snow"], options=QUICK, asked=Asked(str(model))).folder for _ in range(2)]
    assert folders == [Path("samples/001"), Path("samples/002")]


def test_a_wait_of_more_than_a_minute_is_announced(adapter, capsys):
    """The estimate gets the number of pictures; 61 seconds are announced, 60 are not."""
    asked = []

    def estimate(seconds: float):
        return lambda _pipe, _options, pictures, _device: asked.append(pictures) or seconds

    for seconds in (60, 61):
        draw(
            ["snow"],
            Selection(((adapter, 1.0),)),
            Options(steps=1),
            seeds=range(3),
            estimate=estimate(seconds),
        )
    assert asked == [3, 3]
    expected = [line for line in capsys.readouterr().err.splitlines() if line.startswith("expect")]
    assert len(expected) == 1 and expected[0].startswith("expect   about 1 min 1 s on this ")


def test_a_session_is_checked_before_it_is_loaded(adapter, model):
    """The outline has a scheduler and tokenizers and no network; what does not fit is an error of its own."""
    session = open_session(read_adapters([adapter]), device=torch.device("cpu"))
    session.check_adapter(session.adapters[0])
    outline = session.outline()
    assert outline.unet is None and outline.vae is None and outline.scheduler is not None
    assert (session.base.name, session.dtype) == (str(model), torch.float32)
    with pytest.raises(AdapterError, match="the same adapter, given twice"):
        read_adapters([adapter, adapter])
    assert len(read_adapters([adapter, adapter], together=False)) == 2
    with pytest.raises(ModelError, match="nowhere"):
        open_session(session.adapters, Asked(model="nowhere"))
    offloaded = open_session(session.adapters, offload="model", device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="no GPU is used here"):
        offloaded.refuse_offload()
