"""demo(): what it leaves, what it shows, and what it refuses."""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from coeffdiff import demo as demos
from coeffdiff.cli.demo import demo as demo_command
from coeffdiff.cli.root import app
from coeffdiff.demo import Result, demo, new_places
from coeffdiff.errors import ConfigError, LaunchError
from coeffdiff.method.adapter_file import read_header
from coeffdiff.pocket.world import SETTINGS
from coeffdiff.pocket.world.subjects import DEV, EVAL, photo_scenes
from coeffdiff.training.run_folder import RunFolder
from coeffdiff.utils.locks import try_lock
from coeffdiff.utils.png import read_recipe

QUICK = {"steps": 2, "denoising_steps": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Result:
    """One demo, of a mug, from seed 3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("demo"))
        patch.setenv("XDG_CACHE_HOME", "cache")
        result = demo(subject="robot_mug", seed=3, **QUICK)
        absolute = {k: v.resolve() if isinstance(v, Path) else v for k, v in vars(result).items()}
    return Result(**absolute)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def call(*arguments: str):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_it_leaves_photos_a_run_pictures_and_a_figure(made):
    """Four things in the folder: JPEGs of 256 pixels, a finished ordinary run, two times six pictures, demo.png."""
    assert made.folder.name == "demo"
    assert sorted(p.name for p in made.folder.iterdir()) == ["demo.png", "photos", "pictures", "run"]
    photos = sorted(made.photos.iterdir())
    assert [p.name for p in photos] == ["00.jpg", "01.jpg", "02.jpg", "03.jpg", "04.jpg"]
    assert {Image.open(p).size for p in photos} == {(256, 256)}
    run = RunFolder(made.run)
    header = read_header(run.adapter)
    assert (header.base_model, header.token, header.class_word, header.trained_steps) == (
        "pocket",
        "sks",
        "mug",
        2,
    )
    assert run.settings().training.seed == 3
    for name in ("base", "adapter"):
        assert [p.name for p in sorted((made.pictures / name).iterdir())] == [
            f"{i}-{place.replace(' ', '-')}.png" for i, place in enumerate(places_of("robot_mug"), 1)
        ]


def places_of(name: str) -> tuple[str, ...]:
    return new_places(next(subject for subject in DEV if subject.name == name))


def test_both_rows_differ_in_prompt_and_adapter_alone(made):
    """The recipes: "a mug" without adapters, "sks mug" with the run's; the same seeds 3 to 8 and options."""
    for i, place in enumerate(places_of("robot_mug"), 1):
        name = f"{i}-{place.replace(' ', '-')}.png"
        base, adapted = (read_recipe(made.pictures / kind / name) for kind in ("base", "adapter"))
        assert base.pop("prompt") == f"a photo of a mug {place}"
        assert adapted.pop("prompt") == f"a photo of sks mug {place}"
        assert base.pop("adapters") == []
        assert [(a["scale"], a["trained_steps"]) for a in adapted.pop("adapters")] == [(1.0, 2)]
        assert base == adapted
        assert (base["seed"], base["steps"], base["model"]) == (2 + i, 2, "pocket")
        assert pixels(made.pictures / "base" / name).shape == (128, 128, 3)


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_base_row_is_what_sample_makes_without_an_adapter(made):
    """A picture's recipe, given to `sample --adapter none`: the same within the 2/255 of another batch."""
    file = sorted((made.pictures / "base").iterdir())[1]
    recipe = read_recipe(file)
    asked = ["--model", "pocket", "--adapter", "none", "--prompt", recipe["prompt"]]
    named = {"--seed": recipe["seed"], "--guidance": recipe["guidance"], "--steps": recipe["steps"]}
    asked += [str(part) for flag in named.items() for part in flag]
    result = call("sample", *asked, "--json")
    assert result.exit_code == 0, result.output
    alone = pixels(Path(json.loads(result.stdout)["files"][0]))
    assert abs(alone - pixels(file)).max() <= 2
    adapted = pixels(made.pictures / "adapter" / file.name)
    assert abs(adapted - pixels(file)).max() > 2


def test_the_figure_shows_what_was_made(made):
    """Photos in the first band, then the pictures twice as large, pixel for pixel; made again it is the same."""
    sheet = pixels(made.figure)
    images = {
        kind: [Image.open(file).convert("RGB") for file in sorted((made.pictures / kind).iterdir())]
        for kind in ("base", "adapter")
    }
    assert sheet.shape[1] == 6 * 256 + 5 * 14 + 2 * 41
    again = demos._sheet(made, images, places_of("robot_mug"), 3, demos.torch.device("cpu"), 19_846_788)
    assert (np.asarray(again) == sheet).all()
    for kind in images:
        for column, image in enumerate(images[kind]):
            large = np.asarray(image.resize((256, 256), Image.Resampling.LANCZOS))
            x = 41 + column * 270
            tops = [y for y in range(sheet.shape[0] - 256) if (sheet[y, x : x + 256] == large[0]).all()]
            assert any((sheet[y : y + 256, x : x + 256] == large).all() for y in tops)


def test_what_it_says_of_the_adapter_is_what_lies_there(made):
    """Four bytes for each trained number, and little beside them; alpha is a part of them."""
    stored = [file.stat().st_size for file in made.adapter.iterdir()]
    assert made.adapter_bytes == sum(stored)
    header = read_header(made.adapter)
    alphas = sum(heads**2 for heads in header.heads.values())
    weights = sum(file.stat().st_size for file in made.adapter.glob("*.safetensors"))
    assert alphas < made.trained_numbers
    assert 0.8 * weights < 4 * made.trained_numbers < weights
    assert demos.readable_size(274_000) == "274 KB" and demos.readable_size(1_060_000) == "1.1 MB"


@pytest.mark.parametrize("subject", DEV, ids=lambda subject: subject.name)
def test_the_places_are_none_that_the_photos_show(subject):
    """Six different settings of the world."""
    places = new_places(subject)
    assert len(set(places)) == 6 and set(places) <= set(SETTINGS)
    assert not set(places) & {scene.setting for scene in photo_scenes(subject)}


def test_the_command_answers_and_takes_the_next_free_folder(monkeypatch):
    """demo is taken, an empty demo-2 is not; JSON alone on stdout; without it the figure, and what to type next."""
    monkeypatch.setattr(demos, "demo", functools.partial(demo, denoising_steps=2))
    (Path("demo") / "photos").mkdir(parents=True)
    Path("demo-2").mkdir()
    quick = ("--steps", "1", "--method", "coeff", "--seed", "5")
    result = call("demo", *quick, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["figure"] == "demo-2/demo.png" and Path(answer["figure"]).is_file()
    assert (answer["method"], answer["steps"], answer["subject"]) == ("coeff", 1, "grey_sloth_plushie")
    result = call("demo", *quick)
    assert result.stdout == "demo-3/demo.png\n"
    assert (
        "coeffdiff train --images" in result.stderr
        and "coeffdiff sample --adapter demo-3/run" in result.stderr
    )


def test_the_command_has_the_functions_defaults():
    """It names them itself, since it is loaded without torch."""
    function, command = (inspect.signature(of).parameters for of in (demo, demo_command.__wrapped__))
    for name in ("subject", "method", "steps", "seed"):
        assert command[name].default == function[name].default


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--subject", "robot_mgu"], "no subject 'robot_mgu'. Did you mean robot_mug?"),
        (["--subject", EVAL[0].name], "is held back: the comparison of methods"),
        (["--steps", "0"], "training.steps"),
        (["--output", "taken"], "taken is not empty; name another --output. Nothing was changed."),
        (["--output", "taken/note.txt"], "is a file, and a folder is wanted"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(arguments, sentence):
    Path("taken").mkdir()
    Path("taken/note.txt").write_text("a note")
    result = call("demo", *arguments)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("ConfigError: ")
    assert sentence in result.stderr
    assert [p.name for p in Path().iterdir()] == ["taken"]


def test_photos_that_cannot_be_written_leave_nothing(monkeypatch):
    """A disk that is full after the first photo."""

    def full_disk(_subject, folder):
        folder.mkdir()
        (folder / "00.jpg").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demos, "write_photos", full_disk)
    with pytest.raises(
        ConfigError, match=r"The photos demo/photos cannot be written: No space left on device"
    ):
        demo(**QUICK)
    assert not Path("demo").exists()


def test_two_at_once_do_not_share_a_folder(monkeypatch):
    """The second is refused before it writes the photos of its own subject there."""
    Path("demo").mkdir()
    monkeypatch.setattr(demos, "write_photos", lambda *_: pytest.fail("the first one's photos are replaced"))
    for named in (None, Path("demo")):
        with try_lock(Path("demo")), pytest.raises(ConfigError, match="Another command is at work in demo;"):
            demo(named, **QUICK)
    assert [*Path("demo").iterdir()] == []


def test_ctrl_c_leaves_what_had_been_made(monkeypatch):
    """Exit code 130, the photos whole, no figure."""

    def interrupted(_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(demos.loop, "train", interrupted)
    result = call("demo")
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr
    assert [p.name for p in Path("demo").iterdir()] == ["photos"]


def test_several_processes_are_refused(monkeypatch):
    """They would paint the same photos."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="one process"):
        demo(**QUICK)
    assert not Path("demo").exists()
