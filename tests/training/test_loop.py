"""train(): what it leaves, that it can be broken off anywhere, and that it does not matter who does the work."""

from __future__ import annotations

import gc
import importlib.util
import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from forking import Fork, fork_ranks, fork_run
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel

from coeffdiff.config.loading import load_settings
from coeffdiff.config.schema import TrainingSettings
from coeffdiff.config.tree import with_values
from coeffdiff.errors import ConfigError, NonFiniteLoss, ResumeError
from coeffdiff.method.adapter_file import read_header
from coeffdiff.method.coefficients import Coefficients
from coeffdiff.models.loading import load_pipeline
from coeffdiff.pocket.model import save_random
from coeffdiff.sampling.output import write_pictures
from coeffdiff.training import loop, metric_buffer, network, run_outputs
from coeffdiff.training import step as step_module
from coeffdiff.training.resuming import settings_to_resume
from coeffdiff.training.run_folder import RunFolder
from coeffdiff.training.trainables import Trainables

METHODS = ("coeff", "lora", "coeff+lora")
# All of the loss that draws or teaches, beside the plain one; pictures of the class lie where `here` puts them
TAUGHT = {"prior.weight": 0.7, "subject.caption_dropout": 0.4, "training.noise_offset": 0.1}
PICTURES = TAUGHT | {"prior.images": "class"}
WORKER = str(Path(__file__).with_name("ddp_worker.py"))
LAUNCH = (
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--main_process_port",
    "0",
)


@pytest.fixture(scope="session")
def micro_folder(tmp_path_factory) -> Path:
    return save_random("micro", tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with three photos of two shapes, and one with pictures of their class; runs and caches stay in it."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "class").mkdir()
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (80, 60), colour).save(tmp_path / f"class/{colour}.png")
    for i, size in enumerate(((90, 80), (64, 64), (50, 110))):
        Image.radial_gradient("L").resize(size).convert("RGB").rotate(30 * i).save(
            tmp_path / f"photos/{i}.png"
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Its trial step would be taken for training's where optimizer steps are watched
    monkeypatch.setattr("coeffdiff.training.resolve.check_optimizer", lambda *_: None)


def settings_for(model: Path, output: str, **values):
    values = {
        "model.name": str(model),
        "subject.images": "photos",
        "subject.token": "sks",
        "subject.class_word": "ball",
        "output": output,
        "training.steps": 6,
        "training.batch_size": 2,
        "method.kind": "coeff+lora",
        "method.lora.rank": 3,
        "method.lora.learning_rate": 1e-3,
        "validation.prompts": [],
        **values,
    }
    return load_settings(None, values)


def command_line(model: Path, output: str, *more: str) -> list[str]:
    values = {"training.batch_size": 2, "method.lora.rank": 3, "validation.prompts": "[]"}
    values |= {"method.lora.learning_rate": 1e-3}
    extra = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    subject = ["--images", "photos", "--token", "sks", "--class-word", "ball", "--method", "coeff+lora"]
    return ["train", "--model", str(model), *subject, "--output", output, *extra, *more]


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    adapter = Path(run) / "adapter"
    return {k: t for file in sorted(adapter.glob("*.safetensors")) for k, t in load_file(file).items()}


def assert_same(one: str | Path, other: str | Path) -> None:
    first, second = weights(one), weights(other)
    assert first
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


def assert_close(one: str | Path, other: str | Path) -> None:
    """Alpha within 1e-3 of max |alpha|, losses within 1e-4. LoRA's entries are not held one by one: where a
    gradient is rounding alone, Adam makes a full step of its sign."""
    first, second = (load_file(f"{run}/adapter/coeff.safetensors") for run in (one, other))
    largest = max(float(alpha.abs().max()) for alpha in first.values())
    assert largest > 0.01
    assert max(float((first[k] - second[k]).abs().max()) for k in first) < 1e-3 * largest
    for name in ("loss", "loss_prior"):
        losses = [[line[name] for line in logged(run) if name in line] for run in (one, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-7)


def logged(run: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_what_the_contract_says(micro_folder, method):
    """Settings resolved, one log line a step, a checkpoint, and an adapter that describes itself."""
    result = loop.train(
        settings_for(micro_folder, "run", **{"method.kind": method, "training.checkpoint_every": 4})
    )
    assert result.adapter == Path("run/adapter")
    assert load_settings(Path("run/config.yaml")).training.resolution == 64
    lines = logged("run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "lr", "alpha", "grad_norm", "seconds", "peak_gib", "skipped"} <= lines[0].keys()
    assert [path.name for path in RunFolder(Path("run")).checkpoints()] == ["step-000006", "step-000004"]
    header = read_header(Path("run/adapter"))
    assert (header.token, header.class_word, header.kind, header.trained_steps) == ("sks", "ball", method, 6)
    assert header.base_model == str(micro_folder.resolve())
    assert (header.lora is not None) == ("lora" in method)
    if "coeff" in method:
        assert len(header.heads) == 8
        assert 0 < lines[0]["alpha"] < lines[-1]["alpha"]
        alphas = load_file("run/adapter/coeff.safetensors")
        mean = torch.cat([alpha.flatten() for alpha in alphas.values()]).abs().mean()
        assert lines[-1]["alpha"] == pytest.approx(mean.item(), rel=1e-5)
    else:
        assert lines[-1]["alpha"] is None
        assert load_file("run/adapter/coeff.safetensors") == {}
    assert "instance_prompt" in Path("run/adapter/README.md").read_text()
    assert not list(Path("run").rglob(".*"))


def test_a_control_that_mixes_values_is_trained_and_says_so(micro_folder, capsys):
    """In bf16; it learns other alphas than maps do, goes on exactly, and cannot go on as Coeff-Tuning."""
    values = {"method.kind": "coeff", "training.precision": "bf16", "method.coeff.mixes": "values"}
    loop.train(settings_for(micro_folder, "whole", **values))
    assert "method   coeff, mixing values, 6 steps" in capsys.readouterr().err
    assert 0 < logged("whole")[0]["alpha"] < logged("whole")[-1]["alpha"]
    header = read_header(Path("whole/adapter"))
    assert (header.kind, header.mixes, header.format_version, len(header.heads)) == ("coeff", "values", 2, 8)

    loop.train(settings_for(micro_folder, "broken", **values, **{"training.steps": 3}))
    run = RunFolder(Path("broken"))
    with pytest.raises(ResumeError, match=r"method\.coeff\.mixes was 'values', now 'maps'"):
        settings_to_resume(run, None, {"method.coeff.mixes": "maps"}, [])
    loop.train(settings_to_resume(run, None, {"training.steps": 6}, []), resume=run)
    assert_same("whole", "broken")

    loop.train(settings_for(micro_folder, "maps", **values | {"method.coeff.mixes": "maps"}))
    header = read_header(Path("maps/adapter"))
    assert (header.mixes, header.format_version) == ("maps", 1)
    one, other = weights("whole"), weights("maps")
    assert max((one[key] - other[key]).abs().max() for key in one) > 1e-3


def mark(*photos: int) -> None:
    """Masks for these photos: their left half."""
    for i in photos:
        with Image.open(f"photos/{i}.png") as photo:
            mask = Image.new("L", photo.size)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save(f"photos/{i}.mask.png")


@pytest.mark.parametrize(
    ("method", "extras"),
    [
        *((method, {}) for method in METHODS),
        *((method, TAUGHT) for method in METHODS),
        ("coeff+lora", PICTURES),
    ],
    ids=[*METHODS, *(f"{method}-taught" for method in METHODS), "pictures"],
)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(micro_folder, method, extras):
    """3 steps, then 3 more after a resume: the adapter and every logged loss of 6 steps, dropout on alpha included."""
    values = {
        "method.kind": method,
        "method.coeff.dropout": 0.3,
        "training.lr_schedule": "constant_with_warmup",
    }
    values |= {"training.warmup_steps": 4} | extras
    if extras:
        mark(0, 1, 2)
    loop.train(settings_for(micro_folder, "whole", **values))
    loop.train(settings_for(micro_folder, "broken", **values, **{"training.steps": 3}))
    run = RunFolder(Path("broken"))
    loop.train(settings_to_resume(run, None, {"training.steps": 6}, []), resume=run)
    assert_same("whole", "broken")
    lines, resumed = logged("whole"), logged("broken")
    assert [line["loss"] for line in lines] == [line["loss"] for line in resumed]
    assert [line["lr"] for line in lines] == [line["lr"] for line in resumed]
    taught = [line["loss_prior"] for line in lines if "loss_prior" in line]
    assert taught == [line["loss_prior"] for line in resumed if "loss_prior" in line]
    assert len(taught) == (6 if extras else 0)
    assert all(line["loss"] > 0.7 * taught[i] >= 0 for i, line in enumerate(lines[: len(taught)]))
    if "prior.images" not in extras and extras:
        assert taught[0] < 1e-9 < taught[-1]  # at first the student is its own teacher


def wait_for_step(process: Fork, run: str, step: int) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        log = Path(run) / "log.jsonl"
        if log.is_file() and log.read_text().count("\n") >= step:
            return
        assert process.poll() is None, "ended before it was to be broken off"
        time.sleep(0.01)
    pytest.fail(f"step {step} did not come")


def test_kill_9_at_any_moment_leaves_a_run_that_continues_exactly(micro_folder):
    """Killed while it checkpoints at every step, twice over; the adapter is that of a run left alone."""
    loop.train(settings_for(micro_folder, "whole", **{"training.steps": 20}))
    more = ("--steps", "20", "--set", "training.checkpoint_every=1")
    for kill_at, again in ((3, ()), (7, ("--resume",))):
        process = Fork("-m", "coeffdiff", *command_line(micro_folder, "killed", *more), *again)
        wait_for_step(process, "killed", kill_at)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not Path("killed/adapter").exists()
    run = RunFolder(Path("killed"))
    loop.train(run.settings(), resume=run)
    assert_same("whole", "killed")
    assert [line["step"] for line in logged("killed")] == list(range(1, 21))


def test_ctrl_c_saves_says_where_and_exits_130(micro_folder):
    """SIGINT in the middle: a checkpoint of that step, one sentence with the command to go on, exit code 130."""
    process = Fork("-m", "coeffdiff", *command_line(micro_folder, "run", "--steps", "400"))
    wait_for_step(process, "run", 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in said
    step = logged("run")[-1]["step"]
    assert f"Stopped after step {step}, saved in run/checkpoints/step-{step:06d}" in said
    assert "coeffdiff train --resume --output run" in said
    run = RunFolder(Path("run"))
    result = loop.train(settings_to_resume(run, None, {"training.steps": step + 1}, []), resume=run)
    assert result.steps == step + 1


def test_several_processes_look_every_ten_seconds_at_least():
    """Every tenth step as asked at half a second each, every fifth at two; steps longer than that each have a look."""
    assert [metric_buffer.steps_until_flush(seconds, 10) for seconds in (0.0, 0.5, 2.0, 9.0, 60.0)] == [
        10,
        10,
        5,
        1,
        1,
    ]


def test_two_processes_that_were_to_look_seldom_stop_in_time(micro_folder):
    """After every millionth step, say the settings; SIGTERM to their launcher, which kills them 30 seconds later,
    leaves a checkpoint all the same."""
    seldom = ("--set", "training.log_every=1000000", "--set", "training.checkpoint_every=0")
    more = ("--steps", "1000000", *seldom)
    line = (*LAUNCH, "-m", "coeffdiff", *command_line(micro_folder, "run", *more))
    process = Fork(*line, env={"ACCELERATE_USE_CPU": "true"})
    try:
        wait_for_step(process, "run", 1)
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    (checkpoint,) = RunFolder(Path("run")).checkpoints()
    assert f"Stopped after step {logged('run')[-1]['step']}, saved in {checkpoint}" in said


@pytest.mark.parametrize("extras", [{}, TAUGHT, PICTURES], ids=["plain", "taught", "pictures"])
def test_batch_size_and_accumulation_only_partition_the_work(micro_folder, extras):
    """4 at once, 2 x 2 and 1 x 4 train the same adapter up to rounding."""
    if extras:
        mark(1, 2)
    values = extras | {"training.batch_size": 4}
    loop.train(settings_for(micro_folder, "four", **values))
    for batch_size, accumulate in ((2, 2), (1, 4)):
        values |= {"training.batch_size": batch_size, "training.accumulate": accumulate}
        loop.train(settings_for(micro_folder, f"split-{batch_size}", **values))
        assert_close("four", f"split-{batch_size}")


@pytest.mark.parametrize("extras", [{}, TAUGHT], ids=["plain", "taught"])
def test_two_processes_train_the_adapter_of_one(micro_folder, extras):
    """Two gloo ranks against one process, the same global batch of 4: gradients of step 1 within 1e-5, alpha after
    6 steps within 1e-3 of max |alpha|. Of what is taught, the ranks are started by accelerate launch."""
    if extras:
        mark(0, 1, 2)
    launched = bool(extras)
    extras = [part for name, value in extras.items() for part in ("--set", f"{name}={value}")]
    values = ("--method", "coeff+lora", "--steps", "6", *extras, "--set", "training.batch_size=")
    lonely = command_line(micro_folder, "one")
    lonely = [*lonely, *values[:-1], "training.batch_size=4"]
    fork_run(WORKER, "one.pt", *lonely).check_returncode()
    paired = [*command_line(micro_folder, "two"), *values[:-1], "training.batch_size=1"]
    line = (WORKER, "two.pt", *paired, "--set", "training.accumulate=2")
    if launched:
        done = fork_run(*LAUNCH, *line, env={"ACCELERATE_USE_CPU": "true"})
    else:
        done, _ = fork_ranks(*line)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    one, two = torch.load("one.pt"), torch.load("two.pt")
    assert one.keys() == two.keys()
    norm = torch.stack([g.norm() for g in one.values()]).norm()
    difference = torch.stack([(one[k] - two[k]).norm() for k in one]).norm()
    assert difference / norm < 1e-5
    assert_close("one", "two")
    assert [line["step"] for line in logged("two")] == [1, 2, 3, 4, 5, 6]


def test_what_is_in_force_is_said_in_a_line(micro_folder, capsys):
    """How many photos have masks, who teaches the class, and which of its pictures were left out."""
    mark(1)
    Path("class/notes.md").write_text("seen")
    loop.train(settings_for(micro_folder, "run", **PICTURES, **{"training.steps": 1}))
    said = capsys.readouterr().err
    assert "masks    for 1 of 3 photos; errors outside weigh 0.1\n" in said
    assert "prior    weight 0.7; 3 pictures of ball in class, 1 left out\n" in said
    assert "left out notes.md: .md is not among" in said
    loop.train(
        settings_for(micro_folder, "other", **TAUGHT, **{"training.steps": 1, "training.masked_loss": False})
    )
    said = capsys.readouterr().err
    assert "masks" not in said
    assert "prior    weight 0.7; the model without its adapters teaches what ball is\n" in said


def test_other_masks_or_pictures_of_the_class_are_another_run(micro_folder):
    """A mask that was added since, then a picture of the class that went."""
    loop.train(settings_for(micro_folder, "run", **PICTURES, **{"training.steps": 1}))
    run = RunFolder(Path("run"))
    mark(2)
    with pytest.raises(ResumeError, match="photos, masks or captions have changed"):
        loop.train(settings_to_resume(run, None, {"training.steps": 2}, []), resume=run)
    Path("photos/2.mask.png").unlink()
    Path("class/red.png").unlink()
    with pytest.raises(ResumeError, match="photos, masks or captions have changed"):
        loop.train(settings_to_resume(run, None, {"training.steps": 2}, []), resume=run)


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
def test_8_bit_moments_resume_exactly(micro_folder):
    """LoRA at rank 256, so that its moments are in 8 bits: 2 steps, then 2 more, are 4."""
    values = {"training.optimizer": "adamw8bit", "method.lora.rank": 256}
    loop.train(settings_for(micro_folder, "whole", **values, **{"training.steps": 4}))
    loop.train(settings_for(micro_folder, "broken", **values, **{"training.steps": 2}))
    run = RunFolder(Path("broken"))
    loop.train(settings_to_resume(run, None, {"training.steps": 4}, []), resume=run)
    assert_same("whole", "broken")
    states = torch.load(run.checkpoint(4) / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    assert any(t.dtype == torch.uint8 for t in _tensors(states))


def _tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for below in tree.values():
            yield from _tensors(below)


def test_a_loss_that_is_not_finite_stops_the_run(micro_folder, monkeypatch):
    """NaN at step 4: the sentence names step, likely cause and the last good checkpoint, which is whole."""
    real, calls = step_module.denoising_loss, []

    def poisoned(*args, **keywords):
        calls.append(1)
        return real(*args, **keywords) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr("coeffdiff.training.step.denoising_loss", poisoned)
    settings = settings_for(micro_folder, "run", **{"training.checkpoint_every": 1})
    with pytest.raises(
        NonFiniteLoss, match=r"not finite at step 4; the learning rate.*run/checkpoints/step-000003"
    ):
        loop.train(settings)
    assert not Path("run/adapter").exists()
    monkeypatch.setattr("coeffdiff.training.step.denoising_loss", real)
    run = RunFolder(Path("run"))
    loop.train(run.settings(), resume=run)
    loop.train(settings_for(micro_folder, "unpoisoned"))
    assert_same("run", "unpoisoned")


def test_more_steps_are_remembered(micro_folder):
    """A finished run that is continued to 6 and broken off at 5 is unfinished, goes on to 6, and its config says so."""
    loop.train(settings_for(micro_folder, "run", **{"training.steps": 4}))
    run = RunFolder(Path("run"))
    assert run.finished
    longer = settings_to_resume(run, None, {"training.steps": 6}, ["training.checkpoint_every=1"])
    real, calls = step_module.denoising_loss, []

    def breaks(*args, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("coeffdiff.training.step.denoising_loss", breaks)
        loop.train(longer, resume=run)
    assert not run.finished
    loop.train(run.settings(), resume=run)
    assert run.finished
    loop.train(settings_for(micro_folder, "whole"))
    assert_same("run", "whole")


def test_between_two_looks_nobody_waits_for_a_figure(micro_folder, monkeypatch):
    """With a look at every third step: the same adapter and the same lines, and only looks ask tensors for numbers."""
    values = TAUGHT | {"training.steps": 6, "training.accumulate": 2, "training.checkpoint_every": 0}
    loop.train(settings_for(micro_folder, "every", **values))
    askers = []

    def spied(real):
        def ask(*args, **keywords):
            frame = sys._getframe(1)
            askers.append((Path(frame.f_code.co_filename), frame.f_code.co_name))
            return real(*args, **keywords)

        return ask

    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "__index__", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, spied(getattr(torch.Tensor, name)))
    real_step, steps = step_module.draw_dropout, []

    def first_of_a_step(*args, **keywords):
        askers.clear() if not steps else None
        steps.append(keywords["step"])
        real_step(*args, **keywords)

    monkeypatch.setattr("coeffdiff.training.step.draw_dropout", first_of_a_step)
    real_save = run_outputs.save_checkpoint
    seen = []
    monkeypatch.setattr(
        "coeffdiff.training.run_outputs.save_checkpoint",
        lambda *args: (seen.extend(askers), real_save(*args)),
    )
    loop.train(settings_for(micro_folder, "third", **values, **{"training.log_every": 3}))
    package = Path(loop.__file__).parent.parent
    own = [
        (file.name, who)
        for file, who in seen
        if file.is_relative_to(package) or {"diffusers", "peft"} & set(file.parts)
    ]
    assert own[:2] == [("metric_buffer.py", "_lines_of")] * 2
    # What is checked and copied after the last step
    saving = {who for file, who in own[2:] if file != "trainables.py"}
    assert saving <= {"check_learned", "<genexpr>", "first_not_finite"}
    assert_same("every", "third")
    timed = ("seconds", "peak_gib")
    assert [{k: v for k, v in line.items() if k not in timed} for line in logged("every")] == [
        {k: v for k, v in line.items() if k not in timed} for line in logged("third")
    ]


def test_a_loss_that_is_not_finite_is_found_at_the_next_look(micro_folder, monkeypatch):
    """NaN at step 2, looked at with step 4: nothing of it is saved, and the log ends before it."""
    real, calls = step_module.denoising_loss, []

    def poisoned(*args, **keywords):
        calls.append(1)
        return real(*args, **keywords) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr("coeffdiff.training.step.denoising_loss", poisoned)
    values = {"training.log_every": 5, "training.checkpoint_every": 4}
    with pytest.raises(NonFiniteLoss, match=r"not finite at step 2.*No checkpoint"):
        loop.train(settings_for(micro_folder, "run", **values))
    assert [line["step"] for line in logged("run")] == [1]
    assert not RunFolder(Path("run")).checkpoints()


def test_pictures_that_fail_cost_nothing_but_themselves(micro_folder, monkeypatch, replace_everywhere):
    """Out of memory, or a picture that is not finite: said in a line, the adapter is there all the same."""

    def fails(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    replace_everywhere(write_pictures, fails)
    values = {"validation.prompts": ["<V>"], "validation.every": 2, "training.steps": 3}
    loop.train(settings_for(micro_folder, "run", **values))
    assert read_header(Path("run/adapter")).trained_steps == 3


@pytest.mark.parametrize(
    ("name", "value"), [("class_word", "stuffed\nanimal\n"), ("templates", ["a {token}\n"])]
)
def test_text_over_several_lines_is_folded(micro_folder, name, value):
    """A YAML block as class word or template is one line in captions and in the adapter."""
    loop.train(settings_for(micro_folder, "run", **{f"subject.{name}": value, "training.steps": 1}))
    header = read_header(Path("run/adapter"))
    assert header.class_word == ("stuffed animal" if name == "class_word" else "ball")


def test_another_global_batch_is_another_run(micro_folder):
    """A run of 2 samples a step is not continued with 4, as with twice the processes."""
    loop.train(settings_for(micro_folder, "run", **{"training.steps": 2}))
    run = RunFolder(Path("run"))
    settings = with_values(run.settings(), {"training.accumulate": 2, "training.steps": 4})
    with pytest.raises(
        ResumeError, match=r"took 2 samples a step over all processes, this launch would take 4"
    ):
        loop.train(settings, resume=run)


def test_a_changed_caption_is_noticed(micro_folder):
    """photo.txt written since the run began: other captions are another run."""
    loop.train(settings_for(micro_folder, "run", **{"training.steps": 2}))
    Path("photos/0.txt").write_text("a caption")
    run = RunFolder(Path("run"))
    with pytest.raises(ResumeError, match="photos, masks or captions have changed"):
        loop.train(settings_to_resume(run, None, {"training.steps": 4}, []), resume=run)


def test_other_photos_are_another_run(micro_folder):
    """A photo that was added since the run began is noticed at --resume."""
    loop.train(settings_for(micro_folder, "run", **{"training.steps": 2}))
    Image.new("RGB", (64, 64), "red").save("photos/new.png")
    run = RunFolder(Path("run"))
    with pytest.raises(ResumeError, match="The photos, masks or captions have changed since run began"):
        loop.train(settings_to_resume(run, None, {"training.steps": 4}, []), resume=run)


def test_a_finished_run_is_not_resumed_by_accident(micro_folder):
    """--resume of a run that has all its steps says so."""
    loop.train(settings_for(micro_folder, "run", **{"training.steps": 2}))
    run = RunFolder(Path("run"))
    with pytest.raises(ResumeError, match="run has finished its 2 steps; ask for more with --steps"):
        loop.train(run.settings(), resume=run)


def test_a_run_killed_before_its_adapter_was_written_gets_it_at_resume(micro_folder):
    """All steps done, no adapter: the resume trains nothing and writes the adapter."""
    loop.train(settings_for(micro_folder, "run"))
    before = weights("run")
    for file in Path("run/adapter").iterdir():
        file.unlink()
    Path("run/adapter").rmdir()
    run = RunFolder(Path("run"))
    loop.train(run.settings(), resume=run)
    after = weights("run")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_text_encoders_leave_memory_before_the_unet_comes(micro_folder):
    """When the UNet is loaded, no text encoder of this run is alive any more."""
    real, alive = load_pipeline, {}

    def spy(base, *, dtype, parts):
        if parts == {"unet"}:
            gc.collect()
            alive["before unet"] = sum(isinstance(o, CLIPTextModel) for o in gc.get_objects())
        else:
            alive["at start"] = sum(isinstance(o, CLIPTextModel) for o in gc.get_objects())
        return real(base, dtype=dtype, parts=parts)

    loop.train(settings_for(micro_folder, "run", **{"training.steps": 1}), load=spy)
    assert alive["before unet"] == alive["at start"]


@pytest.mark.parametrize(
    "values",
    [
        {"training.gradient_checkpointing": True},
        {"method.coeff.backend": "reference"},
    ],
    ids=["gradient checkpointing", "the definition"],
)
def test_what_only_saves_memory_changes_no_result(micro_folder, values):
    """Recomputed activations and stored maps train the same adapter up to rounding."""
    loop.train(settings_for(micro_folder, "plain", **{"method.coeff.dropout": 0.2}))
    loop.train(settings_for(micro_folder, "other", **{"method.coeff.dropout": 0.2}, **values))
    assert_close("plain", "other")


def test_bf16_trains_float32_alphas(micro_folder):
    """With the network in bfloat16 what learns stays float32, moves, and can be sampled from in between."""
    values = {"training.precision": "bf16", "validation.prompts": ["<V>"], "validation.every": 3}
    values |= {"validation.steps": 2, "validation.seeds": [0]}
    result = loop.train(settings_for(micro_folder, "run", **values))
    assert Path("run/samples/step-000003/grid.png").is_file()
    assert all(tensor.dtype == torch.float32 for tensor in weights("run").values())
    assert logged("run")[-1]["alpha"] > 0.003
    assert result.loss > 0


def test_fp16_without_a_gpu_is_refused(micro_folder):
    with pytest.raises(ConfigError, match="fp16 needs a CUDA GPU"):
        loop.train(settings_for(micro_folder, "run", **{"training.precision": "fp16"}))
    assert not Path("run").exists()


@pytest.mark.parametrize("missing", ["subject.images", "subject.token"])
def test_training_needs_photos_and_a_token(micro_folder, missing):
    with pytest.raises(ConfigError, match="The subject has no "):
        loop.train(settings_for(micro_folder, "run", **{missing: None}).model_copy(deep=True))
    assert not Path("run").exists()


def test_v_prediction_models_train(tmp_path):
    """A base whose scheduler says v_prediction is trained on the velocity: its losses differ from epsilon's."""
    for prediction in ("epsilon", "v_prediction"):
        model = save_random("micro", tmp_path / prediction, prediction_type=prediction)
        loop.train(settings_for(model, f"run-{prediction}", **{"training.steps": 2}))
    first, second = logged("run-epsilon"), logged("run-v_prediction")
    assert first[0]["loss"] != second[0]["loss"]


def test_the_learning_rate_moves_once_per_optimizer_step(micro_folder):
    """Cosine over 6 steps with 3 micro-batches each: the rate of step n is that of n - 1 completed steps."""
    values = {"training.lr_schedule": "cosine", "training.accumulate": 3, "method.kind": "coeff"}
    values |= {"method.coeff.learning_rate": 1e-2}
    loop.train(settings_for(micro_folder, "run", **values))
    rates = [line["lr"][0] for line in logged("run")]
    expected = [0.5e-2 * (1 + torch.cos(torch.tensor(torch.pi * n / 6)).item()) for n in range(6)]
    assert rates == pytest.approx(expected, rel=1e-5)


def test_alpha_and_lora_are_clipped_apart():
    """A huge LoRA gradient leaves alpha's as it is; each is brought down to its own limit."""
    training = TrainingSettings(clip_coeff=1.0, clip_lora=2.0)
    coefficients = {"layer": Coefficients(2)}
    coefficients["layer"].alpha.grad = torch.full((2, 2), 0.25)  # norm 0.5: below its limit
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 50.0)  # norm 100
    norms = network.clip_gradients(Accelerator(), Trainables(coefficients, {"lora": parameter}), training)
    assert norms == pytest.approx({"coeff": 0.5, "lora": 100.0})
    torch.testing.assert_close(coefficients["layer"].alpha.grad, torch.full((2, 2), 0.25))
    torch.testing.assert_close(parameter.grad.norm(), torch.tensor(2.0), rtol=1e-4, atol=0)


def test_validation_pictures_come_on_time_and_disturb_nothing(micro_folder):
    """Pictures at steps 2, 4 and 6; the adapter is bit for bit that of a run without any."""
    loop.train(settings_for(micro_folder, "without"))
    values = {
        "validation.prompts": ["a photo of {token} {class_word}", "<V> at night"],
        "validation.every": 2,
    }
    values |= {"validation.steps": 2, "validation.seeds": [7]}
    loop.train(settings_for(micro_folder, "with", **values))
    assert_same("without", "with")
    for step in (2, 4, 6):
        pictures = sorted(Path(f"with/samples/step-{step:06d}").glob("*.png"))
        assert {picture.name for picture in pictures} >= {"grid.png"}
        assert len(pictures) == 3  # two prompts and their grid
    card = Path("with/adapter/README.md").read_text()
    for picture in Path("with/adapter").glob("*.png"):
        assert f"({picture.name})" in card
        Image.open(picture).load()
    assert len(list(Path("with/adapter").glob("*.png"))) == 3
