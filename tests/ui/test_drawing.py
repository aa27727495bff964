"""Pictures of the page are those of `coeffdiff sample`, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.errors import ConfigError
from coeffdiff.ui import drawing, model_memory
from coeffdiff.ui.drawing import Wanted, draw_wanted, find_adapters
from coeffdiff.utils.png import read_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A working folder in which a small random model has learned for two steps; one step is kept beside the result."""
    from coeffdiff.config.loading import load_settings
    from coeffdiff.pocket.model import save_random
    from coeffdiff.pocket.world.subjects import DEV, write_photos
    from coeffdiff.training.loop import train

    place = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        write_photos(DEV[0], Path("photos"), 2, 0, 64)
        flags = {
            "subject.images": "photos", "subject.token": "ohwx", "subject.class_word": "mug", "model.name": str(save_random("micro", place / "micro")),
            "training.steps": 2, "training.batch_size": 1, "training.resolution": 64, "validation.every": 0,
            "training.keep_adapters_every": 1, "photos.cache": "none", "method.kind": "coeff+lora",
        }  # fmt: skip
        train(load_settings(None, flags))
    return place


@pytest.mark.parametrize(
    ("page", "options"),
    [
        ({"scale": 0.7, "count": 2, "seed": 3}, ["--adapter", "runs/ohwx:0.7", "-n", "2", "--seed", "3"]),
        ({"scale": 1, "compared": [1.5, 0]}, ["--adapter", "runs/ohwx", "--scales", "0,1.5"]),
    ],
)
def test_the_page_draws_what_sample_draws(trained, monkeypatch, page, options):
    monkeypatch.chdir(trained)
    common = {"steps": 2, "guidance": 3, "width": 64, "height": 64, "scheduler": "ddim"}
    drawn = draw_wanted(Wanted("runs/ohwx", "a photo of <V> mug\n\n", **{"scale": 1.0} | page, **common))
    arguments = [
        *options,
        "--steps",
        "2",
        "--guidance",
        "3",
        "--width",
        "64",
        "--height",
        "64",
        "--scheduler",
        "ddim",
    ]
    result = CliRunner().invoke(
        app, ["sample", "--prompt", "a photo of <V> mug", "--output", f"by-hand-{page['scale']}", *arguments]
    )
    assert result.exit_code == 0, result.output
    by_hand = [Path(line) for line in result.stdout.splitlines() if line.endswith(".png")]
    assert [file.name for file in drawn.files] == [file.name for file in by_hand]
    assert [file.read_bytes() for file in drawn.files] == [file.read_bytes() for file in by_hand]
    assert read_recipe(drawn.files[0])["prompt"] == "a photo of ohwx mug"


def test_runs_and_their_steps_are_offered(trained, monkeypatch):
    monkeypatch.chdir(trained)
    assert find_adapters() == {"ohwx": "runs/ohwx", "ohwx, step 1": "runs/ohwx@1"}


@pytest.mark.parametrize(
    ("adapter", "prompts", "sentence"),
    [
        ("runs/ohwx", " \n", "There is nothing to draw"),
        ("", "a photo", "Choose an adapter"),
        ("runs/ohwx", "a photo --ar 3:2", "--ar"),
    ],
)
def test_what_cannot_be_drawn_is_said(adapter, prompts, sentence):
    with pytest.raises(ConfigError, match=sentence):
        draw_wanted(Wanted(adapter, prompts, 1.0))


@pytest.mark.parametrize(
    ("field", "label"),
    [
        ("count", "Pictures a prompt"),
        ("seed", "First seed"),
        ("steps", "Steps"),
        ("guidance", "Guidance"),
        ("scale", "Scale"),
    ],
)
def test_an_emptied_field_is_named(field, label):
    with pytest.raises(ConfigError, match=f"{label} is empty; write a number"):
        draw_wanted(Wanted("runs/ohwx", "a photo", **{"scale": 1.0} | {field: None}))


def test_fields_that_were_never_opened_ask_for_nothing(monkeypatch):
    """And memory is given back after each drawing."""
    drawn, freed = [], []
    monkeypatch.setattr(drawing, "resolve_adapter", Path)
    monkeypatch.setattr(drawing, "draw", lambda *_, **options: drawn.append(options))
    monkeypatch.setattr(model_memory, "free_memory", freed.append)
    names = ("negative_prompt", "width", "height", "scheduler", "precision", "offload")
    draw_wanted(Wanted("runs/ohwx", "a photo", 1.0, **dict.fromkeys(names)))
    draw_wanted(Wanted("runs/ohwx", "a photo", 1.0))
    assert drawn[0] == drawn[1] and len(freed) == 2
