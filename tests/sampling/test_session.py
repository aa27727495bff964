"""What `coeffdiff sample` does, from Python: open a session, check, load, draw."""

from __future__ import annotations

import copy
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.errors import AdapterError, AdapterMismatch, ConfigError, ModelError
from coeffdiff.hosts.diffusers import save_adapter
from coeffdiff.hosts.lora.layers import add_lora
from coeffdiff.hosts.unet import inject
from coeffdiff.method.adapter_header import AdapterHeader, LoraHeader
from coeffdiff.method.adapter_paths import COEFF_FILE, LORA_FILE
from coeffdiff.models.opening import Asked
from coeffdiff.pocket.model import save_random
from coeffdiff.sampling.drawing import draw
from coeffdiff.sampling.options import Options
from coeffdiff.sampling.selection import Selection
from coeffdiff.sampling.session import Session, open_session, read_adapters
from coeffdiff.utils.locks import try_lock
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


def test_a_folder_that_another_command_writes_to_is_refused(model, monkeypatch):
    """Before the model is loaded. A command that fails leaves no empty folder."""
    monkeypatch.setattr(Session, "load", lambda self: pytest.fail("the base model was loaded"))
    asked = {"options": QUICK, "asked": Asked(str(model))}
    Path("pictures").mkdir()
    with (
        try_lock(Path("pictures")),
        pytest.raises(ConfigError, match="Another command is at work in pictures"),
    ):
        draw(["snow"], output=Path("pictures"), **asked)

    def fail(self: Session) -> None:
        assert Path("samples/001").is_dir()  # no other command will take it
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "load", fail)
    with pytest.raises(KeyboardInterrupt):
        draw(["snow"], **asked)
    assert [place.name for place in Path().iterdir()] == ["pictures"]


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


def missing(file: Path) -> None:
    file.unlink()


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def foreign(file: Path) -> None:
    save_file({key.replace("attn1", "attn7"): tensor for key, tensor in load_file(file).items()}, file)


def too_high(file: Path) -> None:
    """Rank 3, where the header says 2."""
    save_file(
        {key: torch.ones([3 if n == 2 else n for n in t.shape]) for key, t in load_file(file).items()}, file
    )


def not_a_number(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4] + struct.pack("<f", float("nan")))


def empty(file: Path) -> None:
    save_file({}, file)


@pytest.mark.parametrize(
    ("name", "damage", "error", "sentence"),
    [
        (LORA_FILE, missing, AdapterError, f"is incomplete: {LORA_FILE} is missing"),
        (LORA_FILE, cut_off, AdapterError, f"{LORA_FILE} cannot be read; it is damaged"),
        (LORA_FILE, foreign, AdapterMismatch, "attn7.* is no linear layer of this UNet"),
        (LORA_FILE, too_high, AdapterMismatch, "but this UNet needs"),
        (LORA_FILE, empty, AdapterError, "is not a LoRA of this layout: it is empty"),
        (COEFF_FILE, not_a_number, AdapterError, r"\.alpha is not finite float32"),
    ],
)
def test_a_damaged_adapter_is_found_before_the_model_is_loaded(
    name, damage, error, sentence, built_micro, model, tmp_path, monkeypatch
):
    unet = copy.deepcopy(built_micro.unet)
    add_lora(unet, rank=2, alpha=2.0)
    header = AdapterHeader(
        format_version=1, kind="coeff+lora", base_model=str(model), token="sks", trained_steps=7, resolution=64,
        heads={layer: c.heads for layer, c in inject(unet).items()}, lora=LoraHeader(rank=2, alpha=2.0),
    )  # fmt: skip
    save_adapter(tmp_path / "adapter", unet, header)
    session = open_session(read_adapters([tmp_path / "adapter"]), device=torch.device("cpu"))
    session.check_adapter(session.adapters[0])
    damage(tmp_path / "adapter" / name)
    monkeypatch.setattr(Session, "load", lambda self: pytest.fail("the base model was loaded"))
    with pytest.raises(error, match=sentence):
        draw(["a <V>"], Selection(((tmp_path / "adapter", None),)), QUICK)
