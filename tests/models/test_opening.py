"""sample, evaluate and merge open the base model as the adapter's run did: VAE, configs, variant, and what has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from test_base_models import original_layout
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.errors import AdapterError
from coeffdiff.method.adapter_file import read_header
from coeffdiff.pocket.model import save_random
from coeffdiff.utils.png import read_recipe

PROMPT = "a <V> in the snow"
VALUES = {
    "training.batch_size": 1,
    "method.lora.rank": 2,
    "validation.prompts": f"['{PROMPT}']",
    "validation.seeds": "[5]",
    "validation.steps": 2,
    "validation.guidance": 3,
}
QUICK = [part for name, value in VALUES.items() for part in ("--set", f"{name}={value}")]
SAME = ["--prompt", PROMPT, "--seed", "5", "--steps", "2", "--guidance", "3", "--output", "mine"]


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A tiny model, another one as a single file, a VAE of its own, photos."""
    folder = tmp_path_factory.mktemp("opening")
    save_random("micro", folder / "model")
    save_random("micro", folder / "second", seed=7)
    shutil.copytree(folder / "second/vae", folder / "vae")
    (folder / "photos").mkdir()
    Image.radial_gradient("L").resize((70, 64)).convert("RGB").save(folder / "photos/0.png")
    return folder


@pytest.fixture(autouse=True)
def here(place, tmp_path, monkeypatch):
    for name in ("model", "vae", "photos"):
        shutil.copytree(place / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def call(*arguments: str):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def train(*more: str, model: str = "model", output: str = "run", token: str = "ohwx"):
    subject = ["--images", "photos", "--token", token, "--class-word", "ball", "--output", output]
    subject += ["--method", "coeff+lora"]
    result = call("train", "--model", model, *subject, *QUICK, "--steps", "1", *more)
    assert result.exit_code == 0, result.output
    return result


def sample(*more: str):
    shutil.rmtree("mine", ignore_errors=True)
    result = call("sample", *SAME, *(more or ("--adapter", "run")))
    assert result.exit_code == 0, result.output
    return result


def preview(run: str = "run") -> Path:
    (file,) = Path(run, "samples/step-000001").glob("0*.png")
    return file


def same_pixels() -> bool:
    (mine,) = Path("mine").glob("0*.png")
    return Image.open(preview()).tobytes() == Image.open(mine).tobytes()


def refused(result) -> str:
    assert result.exit_code == 2, result.output
    assert not Path("mine").exists()
    return result.output.strip().splitlines()[-1]


def variant_model() -> tuple[str, ...]:
    """Beside the plain files others in a variant of another seed, which auto never takes."""
    save_random("micro", "other", seed=9, variant="ema")
    for file in Path("other").glob("*/*.ema.safetensors"):
        shutil.copy(file, Path("model") / file.relative_to("other"))
    return ("--set", "model.variant=ema")


def half_variant() -> tuple[str, ...]:
    """fp16 files beside the plain ones, asked for in a run that computes in float32, where auto takes the plain."""
    import torch

    save_random("micro", "other", dtype=torch.float16, variant="fp16")
    for file in Path("other").glob("*/*.fp16.safetensors"):
        shutil.copy(file, Path("model") / file.relative_to("other"))
    return ("--set", "model.variant=fp16")


def quantized() -> tuple[str, ...]:
    """With a learned token, so that the text encoders stay too."""
    pytest.importorskip("torchao", reason="needs pip install 'coeffdiff[quant]'")
    return ("--set", "model.quantize=int8", "--learn-token")


CASES = {
    "quantized": (quantized, ()),
    "as it is": (lambda: (), ()),
    "another VAE": (lambda: ("--set", "model.vae=vae"), ()),
    "a variant": (variant_model, ()),
    "fp16 files in float32": (half_variant, ()),
    "below the native resolution": (
        lambda: ("--resolution", "32"),
        ("--width", "32", "--height", "32"),
    ),
    "bf16": (lambda: ("--set", "training.precision=bf16"), ("--precision", "bf16")),
    "another scheduler in the model": (lambda: reschedule("EulerDiscreteScheduler"), ()),
}


def reschedule(name: str) -> tuple[str, ...]:
    file = Path("model/scheduler/scheduler_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": name}))
    return ()


@pytest.mark.parametrize("case", CASES)
def test_validation_pictures_are_pixel_for_pixel_those_of_sample(case):
    """The same prompt, seed, steps and guidance; where the size or the precision would differ, sample says which
    options make them equal, and they do."""
    prepare, needed = CASES[case]
    train(*prepare())
    said = sample().output
    assert same_pixels() is not bool(needed)
    assert (f"pass {' '.join(needed)} for those of run/adapter" in said) is bool(needed)
    if needed:
        assert "for those of run/adapter" not in sample("--adapter", "run", *needed).output
        assert same_pixels()


def test_the_run_tells_where_an_older_adapter_does_not():
    """An adapter as the version before wrote it: config.yaml beside it says which VAE; without it nobody knows."""
    train("--set", "model.vae=vae")
    file = Path("run/adapter/coeff.safetensors")
    header = json.loads(read_header(Path("run/adapter")).model_dump_json())
    assert (header.pop("base")["vae"], header["format_version"]) == (str(Path("vae").resolve()), 3)
    save_file(
        load_file(file), file, {"format": "pt", "coeffdiff": json.dumps(header | {"format_version": 1})}
    )
    assert f"vae      {Path('vae').resolve()}" in sample().output
    assert same_pixels()
    shutil.copytree("run/adapter", "alone")
    assert "vae      " not in sample("--adapter", "alone").output


def test_an_adapter_without_another_vae_is_written_for_older_readers():
    """Format 1, as before; one that says VAE and format 1 is damaged."""
    train()
    header = read_header(Path("run/adapter"))
    assert header.format_version == 1
    assert header.base and header.base.vae is None
    file = Path("run/adapter/coeff.safetensors")
    wrong = json.loads(header.model_dump_json())
    wrong["base"]["vae"] = "/somewhere"
    save_file(load_file(file), file, {"format": "pt", "coeffdiff": json.dumps(wrong)})
    with pytest.raises(AdapterError, match=r"has a damaged header \(base\)"):
        read_header(Path("run/adapter"))


def test_a_single_files_configs_are_remembered(tiny_pipeline):
    """sample --adapter RUN needs no --model-config; where they have moved, the sentence names the option."""
    shutil.rmtree("model")
    save_random("tiny", "model")  # its blocks are those that single files have
    save_file(original_layout(tiny_pipeline), "single.safetensors", {"format": "pt"})
    train("--set", "model.config=model", model="single.safetensors")
    sample()
    assert same_pixels()
    (mine,) = Path("mine").glob("0*.png")
    assert read_recipe(mine)["model_config"] == read_recipe(preview())["model_config"]
    Path("model").rename("moved")
    shutil.rmtree("mine")
    assert "--model-config if its configs have" in refused(call("sample", *SAME, "--adapter", "run"))
    sample("--adapter", "run", "--model-config", "moved")
    assert same_pixels()


def test_a_vae_that_has_gone_or_changed_is_one_sentence_and_another_can_be_named():
    """Gone, then back with other weights: refused; --vae names the moved one, itself, or the model's own."""
    train("--set", "model.vae=vae")
    Path("vae").rename("moved")
    for command in (["sample", *SAME, "--adapter", "run"], ["evaluate", "run", "--output", "mine"]):
        sentence = refused(call(*command))
        assert "was trained with the VAE" in sentence and "is not there any more; pass --vae" in sentence
    sample("--adapter", "run", "--vae", "moved")
    assert same_pixels()
    shutil.copytree("model/vae", "vae")
    shutil.rmtree("mine")
    for command in (["sample", *SAME, "--adapter", "run"], ["evaluate", "run", "--output", "mine"]):
        sentence = refused(call(*command))
        assert "is another than when run/adapter was trained: was" in sentence
    sample("--adapter", "run", "--vae", "vae")
    with_it = Image.open(next(Path("mine").glob("0*.png"))).tobytes()
    assert not same_pixels()
    sample("--adapter", "run", "--vae", "none")
    assert Image.open(next(Path("mine").glob("0*.png"))).tobytes() == with_it


def test_two_adapters_with_different_vaes_ask_which_one():
    """One sentence with the options, in sample and merge; with --vae they go together, and a merged adapter keeps it."""
    train()
    train("--set", "model.vae=vae", output="other", token="zkw")
    both = ["--adapter", "run", "--adapter", "other"]
    vae = Path("vae").resolve()
    plain = [part if part != PROMPT else "an ohwx zkw" for part in SAME]
    for command in (["sample", *plain, *both], ["merge", "run", "other", "--output", "mine"]):
        sentence = refused(call(*command))
        assert (
            "run/adapter was trained with the base model's own VAE and other/adapter with the VAE" in sentence
        )
        assert f"--vae none or --vae {vae}" in sentence
    assert call("sample", *plain, *both, "--vae", "vae").exit_code == 0
    assert call("merge", "run", "other", "--output", "merged", "--vae", "vae").exit_code == 0
    header = read_header(Path("merged"))
    assert header.base and (header.base.vae, header.format_version) == (str(vae), 3)
    shutil.rmtree("mine")
    assert f"vae      {vae}" in call("sample", *plain, "--adapter", "merged").output


def test_a_base_model_with_other_weights_is_told_and_drawn():
    """The model's folder now holds another UNet: sample and evaluate say so, as fine-tunes are legitimate bases."""
    train()
    assert "not what run/adapter was trained with" not in sample().output
    save_random("micro", "new", seed=3)
    shutil.rmtree("model/unet")
    shutil.copytree("new/unet", "model/unet")
    assert "the UNet of" in (said := sample().output) and "is not what run/adapter was trained with" in said
