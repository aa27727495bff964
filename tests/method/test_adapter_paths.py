"""Which adapter a path means, and what is said of a path that means none; one real run stands for all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.errors import AdapterError
from coeffdiff.hosts.diffusers import load_adapter, loaded_adapters
from coeffdiff.method.adapter_file import read_header
from coeffdiff.method.adapter_paths import find_adapter, kept_steps, run_of, same_run
from coeffdiff.pocket.model import save_random
from coeffdiff.sampling.runs import every_step, steps_of
from coeffdiff.training.checkpoints import load_checkpoint
from coeffdiff.training.run_folder import RunFolder
from coeffdiff.utils.png import read_recipe


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model, photos and a run of 5 steps: checkpoints at 3 and 5, kept adapters at 2 and 4."""
    folder = tmp_path_factory.mktemp("steps")
    save_random("micro", folder / "model")
    (folder / "photos").mkdir()
    for i in range(2):
        picture = Image.radial_gradient("L").resize((64, 64)).convert("RGB").rotate(45 * i)
        picture.save(folder / f"photos/{i}.png")
    train(folder, "run", "--steps", "5", "--set", "training.checkpoint_every=3")
    return folder


def train(folder: Path, output: str, *more: str) -> None:
    subject = [
        "--model",
        folder / "model",
        "--images",
        folder / "photos",
        "--token",
        "sks",
        "--class-word",
        "ball",
    ]
    values = ("batch_size=1", "keep_adapters_every=2")
    settings = [part for value in values for part in ("--set", f"training.{value}")]
    settings += ["--set", "method.lora.rank=2", "--set", "validation.prompts=[]", "--method", "coeff+lora"]
    arguments = ["train", *map(str, subject), "--output", str(folder / output), *settings, *more]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


@pytest.fixture(autouse=True)
def here(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def same(one: Path, other: Path) -> bool:
    """Tensor by tensor: the order of a header's metadata is not the same in every file."""
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def command(*arguments: str):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize(
    ("path", "folder", "step"),
    [
        ("run", "adapter", 5),
        ("run/", "adapter", 5),
        ("run/adapter", "adapter", 5),
        ("run@5", "adapter", 5),
        ("run@0005", "adapter", 5),
        ("run@last", "adapter", 5),
        ("run@2", "adapters/step-000002", 2),
        ("run/adapter@4", "adapters/step-000004", 4),
        ("run@3", "checkpoints/step-000003/adapter", 3),
        ("run/adapters/step-000002", "adapters/step-000002", 2),
        ("run/checkpoints/step-000003", "checkpoints/step-000003/adapter", 3),
        ("run/checkpoints/step-000003/optimizer.pt", "checkpoints/step-000003/adapter", 3),
        ("run/checkpoints/step-000003/adapter/coeff.safetensors", "checkpoints/step-000003/adapter", 3),
        ("run/adapter/coeff.safetensors", "adapter", 5),
        ("run/adapter/pytorch_lora_weights.safetensors", "adapter", 5),
        ("run/adapter/README.md", "adapter", 5),
        ("run/config.yaml", "adapter", 5),
        ("run/log.jsonl", "adapter", 5),
    ],
)
def test_what_a_path_means(path, folder, step):
    assert find_adapter(path) == find_adapter(Path(path)) == Path("run", folder)
    assert read_header(find_adapter(path)).trained_steps == step
    assert run_of(find_adapter(path)) == Path("run").resolve()


def test_a_kept_adapter_is_what_the_run_had_learned_then(place):
    """That of step 3 holds the checkpoint's alphas and LoRA, and the run's result is that of its last step."""
    saved = load_file("run/checkpoints/step-000003/trainables.safetensors")
    adapter = find_adapter("run@3")
    alphas = load_file(adapter / "coeff.safetensors")
    assert alphas and all(torch.equal(alphas[name], saved[name]) for name in alphas)
    assert not all(torch.equal(alphas[n], a) for n, a in load_file("run/adapter/coeff.safetensors").items())
    lora = load_file(adapter / "pytorch_lora_weights.safetensors")
    assert sorted(float(t.double().sum()) for t in lora.values()) == sorted(
        float(t.double().sum()) for name, t in saved.items() if "lora_" in name
    )
    checkpoint, result = find_adapter("run/checkpoints/step-000005"), find_adapter("run")
    for file in ("coeff.safetensors", "pytorch_lora_weights.safetensors"):
        assert same(checkpoint / file, result / file)
    assert list(kept_steps(Path("run"))) == [2, 3, 4, 5]


def test_an_adapter_is_kept_the_same_by_a_run_that_was_stopped(place):
    """Killed after step 3, with step 4 half-written: resumed, it keeps the same adapters, and no litter."""
    shutil.copytree("run", "broken")
    for gone in ("adapter", "adapters/step-000004", "checkpoints/step-000005"):
        shutil.rmtree(f"broken/{gone}")
    Path("broken/adapters/.step-000004.0123abcd").mkdir()
    with pytest.raises(
        AdapterError, match=r"has not finished.* Steps that it keeps: steps 2, 3; broken@3 is the"
    ):
        find_adapter("broken")
    assert find_adapter("broken@last") == Path("broken/checkpoints/step-000003/adapter")
    command("train", "--resume", "--output", place / "broken")
    assert sorted(f.name for f in Path("broken/adapters").iterdir()) == ["step-000002", "step-000004"]
    for name in ("coeff.safetensors", "pytorch_lora_weights.safetensors"):
        assert same(Path("broken/adapters/step-000004", name), find_adapter("run@4") / name)
    assert load_checkpoint(RunFolder(Path("broken"))).step == 5
    shutil.rmtree("broken")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (
            "run@1",
            r"Step 1 of run is not kept\. Kept are the adapters of steps 2, 3, 4, 5; .*keep_adapters_every",
        ),
        ("run@best", r"run has no scored validation .* steps 2, 3, 4, 5; name one, as run@5"),
        (
            "run@first",
            r"no adapter run@first\. A step of run is named by its number, best or last \(kept: steps 2",
        ),
        ("nowhere@3", r"There is no run nowhere"),
        ("photos@3", r"photos holds no adapter of any step"),
        ("photos", r"photos is no adapter: it has no coeff\.safetensors\. Name a run folder.*0\.png"),
        ("photos/0.png", r"0\.png is a picture and no adapter"),
        ("model", r"model is a base model in diffusers' layout and no adapter; name it with --model"),
        ("model/unet", r"model/unet/diffusion_pytorch_model\.safetensors is a part of a model"),
        ("a" * 300, r"There is no adapter a{300}"),
        ("rum", r"There is no adapter rum\. The working folder holds .*run"),
        ("run/adapters/step-2", r"step-2\. run/adapters holds step-000002, step-000004\."),
    ],
)
def test_what_is_no_adapter_says_what_it_is(path, sentence):
    with pytest.raises(AdapterError, match=sentence):
        find_adapter(path)
    result = command("inspect", path)
    assert result.exit_code == 2 and result.output.count("\n") == 1


FOREIGN = {
    "kohya": (
        "lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight",
        "a LoRA in kohya's layout.*load_lora",
    ),
    "kohya's text": (
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
        "a LoRA in kohya's layout.*load_lora",
    ),
    "LyCORIS": ("lora_unet_mid_block.hada_w1_a", "LyCORIS.*convert it to a plain LoRA"),
    "diffusers": (
        "unet.mid_block.attn1.to_q.lora_A.weight",
        "a LoRA in diffusers' layout.*load_lora_weights",
    ),
    "old diffusers": ("unet.mid_block.attn1.to_q.lora.down.weight", "a LoRA in diffusers' layout"),
    "textual inversion": ("clip_g", r"a textual inversion .*load_textual_inversion"),
    "SD1 inversion": ("emb_params", r"a textual inversion .*load_textual_inversion"),
    "whole model": ("model.diffusion_model.input_blocks.0.0.weight", "a whole model and no adapter.*--model"),
    "UNet": ("down_blocks.0.resnets.0.conv1.weight", "a part of a model"),
    "IP-Adapter": ("image_proj.proj.weight", "IP-Adapter.*load_ip_adapter"),
    "diffusers' inversion": ("<sks>", r"a textual inversion .*load_textual_inversion"),
    "anything": ("blorp", r"a safetensors file of 1 tensors such as 'blorp', none of them coeffdiff's"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["style.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_foreign_file_is_named_for_what_it_is(kind, name, tmp_path, pipe_of_micro):
    """As a file and as the one file of a folder, at the command line and in Python."""
    key, sentence = FOREIGN[kind]
    save_file({key: torch.ones(2)}, tmp_path / name)
    with pytest.raises(AdapterError, match=sentence):
        load_adapter(pipe_of_micro, tmp_path / name)
    if (
        name != "pytorch_lora_weights.safetensors" or "diffusers" not in kind
    ):  # these have a sentence of their own
        with pytest.raises(AdapterError, match=sentence):
            find_adapter(tmp_path)
    result = command("sample", "--prompt", "a", "--adapter", f"{tmp_path / name}:0.5")
    assert result.exit_code == 2 and "AdapterError" in result.output


@pytest.fixture(scope="session")
def pipe_of_micro(built_micro):
    return built_micro


def test_a_foreign_lora_that_lies_in_a_run_is_not_taken_for_the_run(tmp_path):
    shutil.copytree("run", tmp_path / "run")
    for folder in ("run", "run/adapter"):
        file = tmp_path / folder / "style.safetensors"
        save_file({"lora_unet_a.lora_up.weight": torch.ones(1)}, file)
        with pytest.raises(AdapterError, match="a LoRA in kohya's layout"):
            find_adapter(file)


def test_an_adapter_under_another_name_and_a_pickle(tmp_path):
    shutil.copy("run/adapter/coeff.safetensors", tmp_path / "mine.safetensors")
    with pytest.raises(
        AdapterError, match=r"the coeff\.safetensors of an adapter under another name: give it that"
    ):
        find_adapter(tmp_path / "mine.safetensors")
    torch.save({}, tmp_path / "old.pt")
    with pytest.raises(AdapterError, match=r"old\.pt is a pickled file \(\.pt\)"):
        find_adapter(tmp_path / "old.pt")


NO_TENSORS = {
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n",
        "a git-lfs pointer .* `git lfs pull`",
    ),
    "page": (b"<!DOCTYPE html><html>404</html>", "a web page and not the file"),
    "pickle": (b"\x80\x04\x95", "a zip file or a pickle, which is not opened"),
}


@pytest.mark.parametrize("kind", NO_TENSORS)
def test_what_lies_in_place_of_the_tensors_is_named(kind, tmp_path):
    """As what a clone without git-lfs leaves: under the adapter's own name, and alone under another."""
    content, sentence = NO_TENSORS[kind]
    for name in ("coeff.safetensors", "style.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AdapterError, match=rf"{name} is {sentence}"):
            read_header(find_adapter(tmp_path / name if name[0] == "c" else tmp_path))
        (tmp_path / name).unlink()


def test_a_pickle_of_a_known_tool_is_named_unopened(tmp_path):
    torch.save({"string_to_param": {"*": torch.ones(2, 3)}}, tmp_path / "sloth.pt")
    with pytest.raises(
        AdapterError, match=r"sloth\.pt is .* a textual inversion of A1111 .*load_textual_inversion"
    ):
        find_adapter(tmp_path)
    (tmp_path / "sloth.pt").rename(tmp_path / "model.ckpt")
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02")
    with pytest.raises(AdapterError, match=r"as checkpoints of whole models are.* --model"):
        find_adapter(tmp_path)


def test_another_tools_file_under_our_name(tmp_path):
    save_file({"lora_unet_a.lora_up.weight": torch.ones(1)}, tmp_path / "coeff.safetensors")
    with pytest.raises(
        AdapterError, match=r"not written by coeffdiff.* It is a LoRA in kohya's layout.*load_lora"
    ):
        read_header(find_adapter(tmp_path))


def test_a_checkpoint_from_before_says_so(tmp_path):
    shutil.copytree("run/checkpoints/step-000003", tmp_path / "checkpoints/step-000003")
    shutil.rmtree(tmp_path / "checkpoints/step-000003/adapter")
    with pytest.raises(AdapterError, match="written before checkpoints held an adapter"):
        find_adapter(tmp_path / "checkpoints/step-000003")


def test_a_folder_with_an_at_in_its_name_means_itself(tmp_path):
    shutil.copytree("run/adapters/step-000002", tmp_path / "run@5")
    shutil.copytree("run", tmp_path / "run")
    assert find_adapter(tmp_path / "run@5") == tmp_path / "run@5"


def test_the_best_step_is_that_of_the_best_validation(tmp_path):
    """0.4 at step 2 and 4: the earlier; then 0.9 at step 1, of which nothing is kept; a cut line is passed over."""
    shutil.copytree("run", tmp_path / "run")
    log = tmp_path / "run/log.jsonl"
    scores = {1: 0.1, 2: 0.4, 3: 0.2, 4: 0.4}
    lines = [json.dumps({"step": step, "scores": {"score": score}}) for step, score in scores.items()]
    log.write_text("\n".join([*lines, '{"step": 5, "sc']))
    assert find_adapter(tmp_path / "run@best") == tmp_path / "run/adapters/step-000002"
    log.write_text("\n".join([*lines, '{"step": 1, "scores": {"score": 0.9}}']))
    with pytest.raises(AdapterError, match=r"The best validation of .* is that of step 1, which is not kept"):
        find_adapter(tmp_path / "run@best")


# --- the same adapter twice ------------------------------------------------------------------------------------


def test_the_same_adapter_twice_is_said_whatever_the_path(tmp_path):
    """RUN and its adapter, a link, a copy; two steps of a run; never the advice to train with another token."""
    (tmp_path / "link").symlink_to(Path("run").resolve())
    shutil.copytree("run/adapter", tmp_path / "copy")
    for second in (
        "run",
        "run/adapter",
        "run/adapter/coeff.safetensors",
        "run@5",
        "run/checkpoints/step-000005",
        tmp_path / "link",
        tmp_path / "copy",
    ):
        result = command("sample", "--prompt", "a", "--adapter", "run", "--adapter", f"{second}:0.5")
        assert result.exit_code == 2
        assert "the same adapter, given twice" in result.output and "--token" not in result.output
    result = command("sample", "--prompt", "a", "--adapter", "run@2", "--adapter", "run@4")
    assert result.exit_code == 2 and "two steps of one run" in result.output


def test_merging_the_same_adapter_is_said_and_steps_of_a_run_may_be_averaged(tmp_path):
    result = command("merge", "run:0.5", "run/adapter:0.5", "--output", tmp_path / "m")
    assert result.exit_code == 2 and "are the same adapter, given twice" in result.output
    result = command("merge", "run@2:0.5", "run@4:0.5", "--output", tmp_path / "m")
    assert result.exit_code == 0, result.output
    halves = [load_file(find_adapter(f"run@{step}") / "coeff.safetensors") for step in (2, 4)]
    merged = load_file(tmp_path / "m/coeff.safetensors")
    for name, alpha in merged.items():
        torch.testing.assert_close(alpha, (halves[0][name] + halves[1][name]) / 2)


def test_the_same_adapter_twice_in_python(place, micro_pipeline):
    load_adapter(micro_pipeline, "run")
    with pytest.raises(AdapterError, match="run/adapter is the same adapter, given twice"):
        load_adapter(micro_pipeline, "run/adapter")
    assert len(loaded_adapters(micro_pipeline)) == 1


# --- names that are no UTF-8 -----------------------------------------------------------------------------------


def test_an_adapter_in_a_folder_of_any_name(tmp_path, micro_pipeline, unet_call):
    """safetensors takes UTF-8 alone; the adapter is the same in a folder whose name is not, LoRA and all."""
    load_adapter(micro_pipeline, "run").set_scale(1.0)
    expected = unet_call(micro_pipeline.unet)
    loaded_adapters(micro_pipeline)[0].remove()
    odd = tmp_path / os.fsdecode(b"r\xff")
    shutil.copytree("run", odd)
    adapter = load_adapter(micro_pipeline, odd)
    assert torch.equal(unet_call(micro_pipeline.unet), expected)
    adapter.remove()
    assert list(kept_steps(odd)) == [2, 3, 4, 5] and find_adapter(f"{odd}@2").name == "step-000002"
    (odd / "adapter/coeff.safetensors").write_bytes(b"junk")
    with pytest.raises(AdapterError, match="damaged or not a safetensors"):
        load_adapter(micro_pipeline, odd)


def test_a_lora_is_saved_into_a_folder_of_any_name(place, tmp_path):
    odd = tmp_path / os.fsdecode(b"r\xff")
    train(place, str(odd), "--steps", "2")
    assert (odd / "adapter/pytorch_lora_weights.safetensors").is_file() and find_adapter(f"{odd}@2")


# --- all steps side by side ------------------------------------------------------------------------------------


def test_all_steps_are_drawn_from_equal_noise_in_one_grid(tmp_path):
    """2 prompts x 2 seeds x 4 steps: each picture is that of its step alone, to the byte, and says which it is."""
    what = ["--prompt", "a <V> ball", "--prompt", "a cat", "-n", "2", "--steps", "2"]
    result = command(
        "sample", "--adapter", "run:0.7", "--checkpoints", *what, "--output", tmp_path / "all", "--json"
    )
    files = [Path(file) for file in json.loads(result.stdout)["files"]]
    assert len(files) == 17 and files[-1].name == "grid.png"
    command("sample", "--adapter", "run@3:0.7", *what, "--output", tmp_path / "one")
    third = sorted((tmp_path / "all").glob("*-step000003.png"))
    alone = sorted((tmp_path / "one").glob("0*.png"))
    assert len(third) == len(alone) == 4
    for one, other in zip(third, alone, strict=True):
        assert Image.open(one).tobytes() == Image.open(other).tobytes()
        found = read_recipe(one)
        assert (
            found["step"] == found["adapters"][0]["trained_steps"] == 3
            and found["adapters"][0]["scale"] == 0.7
        )
    second = sorted((tmp_path / "all").glob("*-step000002.png"))
    assert Image.open(second[0]).tobytes() != Image.open(third[0]).tobytes()
    grid = Image.open(files[-1])
    assert grid.width > 4 * 64 and grid.height > 4 * 64


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--adapter", "run@3"],
            "--checkpoints needs a run folder, and run@3 is none; run has all its steps",
        ),
        (["--adapter", "photos"], "--checkpoints needs a run folder, and photos is none"),
        (["--adapter", "none"], "--checkpoints draws the steps of one run"),
        (["--adapter", "run", "--adapter", "run"], "--checkpoints draws the steps of one run"),
        (["--adapter", "run", "--scales", "0,1"], "leave --scales out"),
        (["--adapter", "run", "--compile"], "leave --compile out"),
    ],
)
def test_what_checkpoints_cannot_do_is_one_sentence(arguments, sentence):
    result = command("sample", "--prompt", "a", "--checkpoints", *arguments)
    assert result.exit_code == 2 and sentence in result.output


def test_all_steps_are_scored_in_one_table(vit, clip, tmp_path):
    """A row for each step, in order, and which is highest by which score instead of a mean over steps."""
    protocol = ["--limit", "1", "-n", "1", "--drift-pictures", "0", "--steps", "1", "--width", "64"]
    arguments = [*protocol, "--height", "64", "--dino", vit, "--clip", clip, "--output", tmp_path / "scores"]
    result = command("evaluate", "run", "--checkpoints", *arguments)
    assert result.exit_code == 0, result.output
    rows = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("run@")]
    assert rows == ["run@2", "run@3", "run@4", "run@5"]
    assert "dino is highest at step" in result.stdout and "\nmean" not in result.stdout
    found = json.loads((tmp_path / "scores/evaluation.json").read_text())["runs"]
    assert [one["trained_steps"] for one in found] == [2, 3, 4, 5] and found[0]["subject"] == "photos"


def test_evaluating_the_same_twice_is_refused():
    result = command("evaluate", "run", "run/adapter", "--output", "scores")
    assert (
        result.exit_code == 2
        and "run/adapter and run are the same adapter at the same scale" in result.output
    )
    assert every_step([("run", 0.5)]) == [(f"run@{step}", 0.5) for step in (2, 3, 4, 5)]
    assert list(steps_of("run/adapter")[1]) == [2, 3, 4, 5]


def test_a_scale_behind_a_step_that_is_no_number():
    result = command("sample", "--prompt", "a", "--adapter", "run@3:strong")
    assert result.exit_code == 2 and "the scale 'strong' is not a number" in result.output


def test_a_config_two_folders_up_makes_no_run(place, tmp_path, monkeypatch):
    """Results that somebody put on a shelf, beside a config.yaml of their own: two adapters, of no run."""
    shelf = tmp_path / "shelf"
    for name, step in (("cat", 2), ("dog", 4)):
        shutil.copytree(place / f"run/adapters/step-{step:06d}", shelf / name)
    for folder in (tmp_path, shelf):
        (folder / "config.yaml").write_text("subject: {images: elsewhere}\n")
    assert [run_of(shelf / name) for name in ("cat", "dog")] == [None, None]
    assert not same_run(shelf / "cat", shelf / "dog")
