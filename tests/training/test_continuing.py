"""--resume: what goes on and what is refused; photos and models count by their content, not by where they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.config.loading import load_names, load_settings
from coeffdiff.config.tree import save_settings
from coeffdiff.pocket.model import save_random
from coeffdiff.training.resuming import settings_to_resume
from coeffdiff.training.run_folder import RunFolder

SUBJECT = ["--images", "photos", "--token", "ohwx", "--class-word", "ball"]
QUICK = [
    part
    for name, value in {
        "training.batch_size": 2,
        "training.checkpoint_every": 2,
        "method.kind": "coeff+lora",
        "method.lora.rank": 2,
        "validation.prompts": "[]",
    }.items()
    for part in ("--set", f"{name}={value}")
]


@pytest.fixture(scope="session")
def begun(tmp_path_factory) -> Path:
    """A folder with a tiny model, photos, and two runs: `run` stands at step 2, `whole` has made all 4."""
    folder = tmp_path_factory.mktemp("begun")
    save_random("micro", folder / "model")
    for name in ("photos", "class"):
        (folder / name).mkdir()
        for i, size in enumerate(((90, 80), (64, 64), (50, 110))):
            picture = Image.radial_gradient("L").resize(size).convert("RGB").rotate(30 * i)
            (picture if name == "photos" else picture.transpose(Image.Transpose.ROTATE_180)).save(
                folder / name / f"{i}.png"
            )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr("coeffdiff.training.run_summary.TIMING_SECONDS", 0.0)
        for output, steps in (("run", "2"), ("whole", "4")):
            result = call("train", "--model", "model", *SUBJECT, *QUICK, "--steps", steps, "--output", output)
            assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def here(begun, tmp_path, monkeypatch) -> Path:
    """A copy of it, where a test may move and change what it likes."""
    for name in ("model", "photos", "class", "run"):
        shutil.copytree(begun / name, tmp_path / name)
    file = tmp_path / "run/config.yaml"
    file.write_text(file.read_text().replace(str(begun), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def call(*arguments: str):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def resume(*more: str, run: str = "run", steps: int = 4):
    return call("train", "--resume", "--output", run, "--steps", str(steps), *more)


def equals_the_whole(begun: Path, run: str | Path = "run", close: float = 0.0) -> None:
    for file in ("coeff", "pytorch_lora_weights"):
        mine, whole = (load_file(f"{folder}/adapter/{file}.safetensors") for folder in (run, begun / "whole"))
        assert mine.keys() == whole.keys()
        for key, tensor in mine.items():
            assert float((tensor - whole[key]).abs().max()) <= close, key


def refused(result) -> str:
    """The one sentence; the run is as it was."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert not Path("run/checkpoints/step-000004").exists()
    return result.output.strip().splitlines()[-1]


def rename_photos(here: Path) -> list[str]:
    (here / "photos").rename(here / "pictures")
    return ["--images", "pictures"]


def rename_each_photo(here: Path) -> list[str]:
    """The names now sort the other way round."""
    for i in range(3):
        (here / f"photos/{i}.png").rename(here / f"photos/z{9 - i}.png")
    return []


def move_model(here: Path) -> list[str]:
    (here / "model").rename(here / "elsewhere")
    return ["--model", "elsewhere"]


def own_vae_named(here: Path) -> list[str]:
    return ["--set", "model.vae=model/vae"]


MOVES = [rename_photos, rename_each_photo, move_model, own_vae_named]


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_equal_content_elsewhere_goes_on(begun, here, move):
    """Folder or files renamed, model moved, the model's own VAE named: the adapter is that of an unbroken run."""
    result = resume(*move(here))
    assert result.exit_code == 0, result.output
    assert "resume   run after step 2 of 4" in result.output
    equals_the_whole(begun)


def test_another_working_directory_and_absolute_paths_go_on(begun, here, monkeypatch):
    """Begun with relative paths; config.yaml holds absolute ones, so the run goes on from anywhere."""
    (here / "far/away").mkdir(parents=True)
    monkeypatch.chdir(here / "far/away")
    again = ["--images", str(here / "photos"), "--model", str(here / "model")]
    assert resume(run=str(here / "run"), steps=3).exit_code == 0
    result = resume(*again, run="../../run")
    assert result.exit_code == 0, result.output
    equals_the_whole(begun, here / "run")


FREE = [
    *("photos.cache=other-cache", "training.log_every=3", "training.gradient_checkpointing=true"),
    *("training.checkpoint_every=3", "training.keep_checkpoints=9", "validation.every=1"),
    *("validation.guidance=1", "tracking.project=mine", "method.token.vectors=3", "training.clip_token=0.5"),
]


def test_what_alters_nothing_goes_on(begun, here):
    """Each of these given at --resume, all at once: bit for bit the adapter of the run that never had them."""
    result = resume(*(part for one in FREE for part in ("--set", one)))
    assert result.exit_code == 0, result.output
    equals_the_whole(begun)


def test_compile_and_the_backend_go_on_and_alter_rounding_alone(begun, here, monkeypatch):
    """The compiler's part is test_torch_setup.py's; here a UNet that is asked to be compiled is, and the run goes on."""
    asked = []
    monkeypatch.setattr(
        "coeffdiff.training.network.compile_blocks", lambda unet, device: asked.append(device.type)
    )
    result = resume("--compile", "--set", "method.coeff.backend=reference")
    assert result.exit_code == 0, result.output
    assert asked == ["cpu"]
    equals_the_whole(begun, close=1e-3)


def test_another_division_of_the_same_batch_goes_on(begun, here):
    """1 x 2 accumulated for 2 x 1; another product is refused with the numbers and a division that fits."""
    sentence = refused(resume("--set", "training.batch_size=3"))
    assert "took 2 samples a step over all processes, this launch would take 3 (batch 3 x 1" in sentence
    assert "Pass --set training.batch_size=2 --set training.accumulate=1" in sentence
    result = resume("--set", "training.batch_size=1", "--set", "training.accumulate=2")
    assert result.exit_code == 0, result.output
    equals_the_whole(begun, close=1e-3)


def replace(part: str):
    def change(here: Path) -> list[str]:
        file = next((here / "model" / part).glob("*.safetensors"))
        tensors = load_file(file)
        name = max(tensors, key=lambda key: tensors[key].numel())
        tensors[name] = tensors[name] + 0.01
        save_file(tensors, file, {"format": "pt"})
        return []

    change.__name__ = part
    return change


def reconfigure(file: str, **values):
    def change(here: Path) -> list[str]:
        config = json.loads((here / "model" / file).read_text())
        (here / "model" / file).write_text(json.dumps(config | values))
        return []

    change.__name__ = file
    return change


def other_vae(here: Path) -> list[str]:
    torch.manual_seed(5)
    save_random("micro", here / "other", seed=5)
    return ["--set", "model.vae=other"]


def with_pictures_of_the_class(here: Path) -> list[str]:
    return ["--set", "prior.images=class", "--set", "prior.weight=1"]


def other_photos(here: Path) -> list[str]:
    return ["--images", "class"]


def photos_gone(here: Path) -> list[str]:
    (here / "photos").rename(here / "pictures")
    return []


def model_gone(here: Path) -> list[str]:
    (here / "model").rename(here / "elsewhere")
    return []


CHANGES = [
    (replace("unet"), r"The UNet of \S+model is another than when run began: was \w+/\w+, now \w+/\w+"),
    (replace("vae"), "The VAE of .* is another than when run began"),
    (replace("text_encoder"), "The first text encoder of .* is another"),
    (replace("text_encoder_2"), "The second text encoder of .* is another"),
    (reconfigure("vae/config.json", scaling_factor=0.5), "The VAE of .* is another"),
    (
        reconfigure("scheduler/scheduler_config.json", prediction_type="v_prediction"),
        "The noise schedule of .*prediction_type=epsilon.*now .*prediction_type=v_prediction",
    ),
    (other_vae, "The VAE of .* is another .*Name the one .* with --set model.vae, or start a new run"),
    (with_pictures_of_the_class, "prior.weight was 0.0, now 1.0; prior.images was None, now '?class"),
    (other_photos, "The photos, masks or captions have changed since run began"),
    (photos_gone, r"took its photos from \S+photos, which is not there any more.*--images DIR"),
    (model_gone, r"took its base model from \S+model, which is not there any more.*--model DIR"),
]


@pytest.mark.parametrize(("change", "sentence"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_alters_everything_is_refused_with_both_values(here, change, sentence):
    """Weights, configs, VAE, photos under the old name: one sentence before anything is encoded."""
    import re

    result = resume(*change(here))
    assert re.search(sentence, refused(result)), result.output
    assert "encoding" not in result.output


def test_a_model_that_is_saved_anew_is_the_same(begun, here):
    """Shards, other names of files and configs that a newer library filled up with defaults alter nothing."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(here / "model/unet")
    shutil.rmtree(here / "model/unet")
    unet.save_pretrained(here / "model/unet", max_shard_size="200KB")
    assert len(list((here / "model/unet").glob("*.safetensors"))) > 1
    result = resume()
    assert result.exit_code == 0, result.output
    equals_the_whole(begun)


def test_a_checkpoint_of_an_older_version_goes_on_where_it_lies(begun, here):
    """It does not say what its model was, so another place is refused and its own, however written, goes on."""
    for file in (here / "run/checkpoints").glob("*/state.json"):
        state = json.loads(file.read_text())
        assert state.pop("model").keys() == {
            *("scheduler", "unet", "vae", "text_encoder", "text_encoder_2"),
        }
        file.write_text(json.dumps(state))
    shutil.copytree("model", "copy")
    assert "model.name was" in refused(resume("--model", "copy"))
    result = resume("--model", "./model")
    assert result.exit_code == 0, result.output
    equals_the_whole(begun)


def test_fewer_steps_than_are_made_are_refused_and_none_left_is_said(here):
    """At step 2: --steps 1 is refused at once; --steps 2 of a run without an adapter says that nothing is left."""
    result = resume(steps=1)
    assert "run is at step 2 already, and 1 are asked for" in refused(result)
    assert "encoding" not in result.output
    shutil.rmtree("run/adapter")
    result = resume(steps=2)
    assert result.exit_code == 0, result.output
    assert "after step 2, its last: nothing is left to train, the adapter is written" in result.output
    assert Path("run/adapter/coeff.safetensors").is_file()


def test_the_config_of_a_run_holds_absolute_paths(here):
    """Whatever was given relative."""
    text = Path("run/config.yaml").read_text()
    for name in ("photos", "model", "run"):
        assert f": {here / name}\n" in text


@pytest.mark.parametrize(
    ("began", "given"),
    [
        ({"prior.weight": 0.5, "prior.images": "class"}, "prior.images=pictures"),
        ({"training.lr_schedule": "constant_with_warmup", "training.warmup_steps": 2}, "training.warmup_steps=2"),
        ({"training.optimizer_args.eps": 1e-6}, "training.optimizer_args={eps: 1.0e-6}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_setting_that_means_something_beside_the_runs_own_may_be_given_alone(tmp_path, began, given):
    """As the sentence on a folder that has gone tells one to."""
    run = RunFolder(tmp_path)
    save_settings(load_settings(None, began | {"subject.token": "sks"}), run.config)
    load_names(None, {}, [given])
    name, _, value = given.partition("=")
    continued = settings_to_resume(run, None, {}, [given])
    if name == "prior.images":
        assert str(continued.prior.images) == value
    else:
        assert continued == run.settings()
