"""Training with a learned token: exact to resume, equal however the work is divided, and seen in pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_loop
import torch
from forking import fork_ranks
from PIL import Image
from safetensors.torch import load_file
from test_loop import WORKER, assert_same, command_line, logged, settings_for, weights
from torch.optim.optimizer import register_optimizer_step_pre_hook

from coeffdiff import load_adapter
from coeffdiff.config.loading import load_settings
from coeffdiff.config.schema import ModelSettings, Settings
from coeffdiff.data.batches import Batch
from coeffdiff.errors import ConfigError
from coeffdiff.hosts.token.learned_token import add_token, remove_token
from coeffdiff.hosts.token.rows import initial_rows
from coeffdiff.method.adapter_file import read_header
from coeffdiff.method.adapter_paths import EMBEDS_FILE
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.loading import load_pipeline
from coeffdiff.sampling.generation import generate
from coeffdiff.sampling.options import Options, Request
from coeffdiff.sampling.prompts import encode_prompts, length_warnings
from coeffdiff.training import loop
from coeffdiff.training.resuming import settings_to_resume
from coeffdiff.training.run_folder import RunFolder
from coeffdiff.training.text import LearnedToken

micro_folder, here = test_loop.micro_folder, test_loop.here
KINDS = {
    "token": {"method.kind": "token", "method.token.vectors": 2},
    "coeff+lora+token": {"method.kind": "coeff+lora", "subject.learn_token": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def rows(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(f"{run}/adapter/{EMBEDS_FILE}")


def assert_rows_close(one: str, other: str) -> None:
    """Within 1e-3 of how far they moved, which is far; losses within 1e-4."""
    steps, rate = len(logged(one)), logged(one)[0]["lr"][-1]
    first, second = rows(one), rows(other)
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, second[key], rtol=0, atol=1e-3 * steps * rate)
    losses = [[line["loss"] for line in logged(run)] for run in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@every_kind
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(micro_folder, kind):
    """4 steps against 2 + 2, the optimizer's memory of the rows included; and the run says what it learned."""
    loop.train(settings_for(micro_folder, "whole", **KINDS[kind], **{"training.steps": 4}))
    loop.train(settings_for(micro_folder, "broken", **KINDS[kind], **{"training.steps": 2}))
    run = RunFolder(Path("broken"))
    loop.train(settings_to_resume(run, None, {"training.steps": 4}, []), resume=run)
    assert_same("whole", "broken")
    lines = logged("whole")
    assert [line["loss"] for line in lines] == [line["loss"] for line in logged("broken")]
    header = read_header(Path("whole/adapter"))
    vectors = KINDS[kind].get("method.token.vectors", 1)
    assert (header.kind, header.vectors) == (kind, vectors)
    assert {key: tuple(tensor.shape) for key, tensor in rows("whole").items()} == {
        "clip_l": (vectors, 20),
        "clip_g": (vectors, 28),
    }
    assert 0 < lines[0]["token"] < lines[-1]["token"] and lines[0]["grad_norm"]["token"] > 0
    assert EMBEDS_FILE in Path("whole/adapter/README.md").read_text()


@every_kind
def test_the_work_may_be_divided(micro_folder, kind):
    """4 at once, 1 x 4, and two gloo ranks x 2 x 1: gradients of step 1 within 1e-5, then the rows.

    One photo's caption lacks the token, so that some micro-batches know nothing of it. The UNet of a token alone has
    nothing to learn, and so no DDP around it.
    """
    Path("photos/1.txt").write_text("a ball")
    found: list[list[torch.Tensor]] = []

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        found.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    steps = {"training.steps": 2}
    handle = register_optimizer_step_pre_hook(keep)
    loop.train(settings_for(micro_folder, "one", **KINDS[kind], **steps, **{"training.batch_size": 4}))
    handle.remove()
    split = {"training.batch_size": 1, "training.accumulate": 4}
    loop.train(settings_for(micro_folder, "split", **KINDS[kind], **steps, **split))
    assert_rows_close("one", "split")

    extra = [part for name, value in KINDS[kind].items() for part in ("--set", f"{name}={value}")]
    extra += ["--steps", "2", "--set", "training.batch_size=1", "--set", "training.accumulate=2"]
    done, _ = fork_ranks(WORKER, "two.pt", *command_line(micro_folder, "two", *extra))
    assert done.returncode == 0, done.stderr
    two = torch.load("two.pt")
    assert len(found[0]) == len(two)
    for number in (-2, -1):  # the rows are the last group
        one = found[0][number]
        assert one.norm() > 0 and (one - two[len(two) + number]).norm() / one.norm() < 1e-5
    assert_rows_close("one", "two")


def test_pictures_are_made_with_the_embeddings_of_their_step(micro_folder):
    """The last validation picture is, pixel for pixel, what the saved adapter makes of its recipe in a fresh
    pipeline; the one before shows other embeddings; and pictures disturb nothing."""
    values = {"validation.prompts": ["a <V> in the snow"], "validation.seeds": [5], "validation.steps": 2}
    values |= {"method.kind": "token", "method.token.learning_rate": 0.3, "method.token.norm_pull": 0.0}
    values |= {"training.steps": 4}
    loop.train(settings_for(micro_folder, "run", **values, **{"validation.every": 2}))
    (early,), (late,) = (sorted(Path(f"run/samples/step-00000{n}").glob("0*.png")) for n in (2, 4))
    pipe = load_pipeline(find_backbone(ModelSettings(name=str(micro_folder))), dtype=torch.float32)
    load_adapter(pipe, "run")
    options = Options(steps=2, guidance=5.0, width=64, height=64)
    ((_, picture),) = generate(pipe, [Request("a sks in the snow", 5)], options)
    assert Image.open(late).tobytes() == picture.tobytes()
    assert Image.open(early).tobytes() != picture.tobytes()
    assert '"kind": "token"' in Image.open(late).text["coeffdiff"]
    loop.train(settings_for(micro_folder, "without", **values | {"validation.prompts": []}))
    assert_same("run", "without")


def test_the_negative_prompt_may_hold_the_token(micro_pipeline):
    """Its embeddings then are those of the learned rows, not of the letters; it goes as it came."""

    def read():
        return encode_prompts(micro_pipeline, ["a ball"], negative_prompt="sks")["a ball"]

    before = read()
    rows = {key: values + 1 for key, values in initial_rows(micro_pipeline, "b", 2).items()}
    add_token(micro_pipeline, "sks", rows)
    after = read()
    assert torch.equal(before.text, after.text)
    assert not torch.equal(before.negative_text, after.negative_text)
    assert not torch.equal(before.negative_pooled, after.negative_pooled)
    remove_token(micro_pipeline)
    assert torch.equal(before.negative_text, read().negative_text)


def learned(pipe, **values) -> LearnedToken:
    return LearnedToken(pipe, load_settings(None, {"subject.token": "sks", "method.kind": "token", **values}))


def test_captions_without_the_token_keep_their_embeddings(micro_pipeline):
    """Sentinels stay where a caption lacks the token, and only there; the graph reaches the rows all the same."""
    token = learned(micro_pipeline)
    sentinel = torch.full((3, 77, 48), 7.0), torch.full((3, 36), 7.0)
    empty = torch.zeros(3)
    captions = ("a sks", "", "a dog")
    embeds, pooled = token.conditions(Batch(empty, empty, empty, *sentinel, empty, captions))
    assert (embeds[1:] == 7).all() and (pooled[1:] == 7).all()
    assert (embeds[0] != 7).all() and embeds.dtype == torch.float32
    (embeds[1:].sum() + pooled[1:].sum()).backward()
    assert all((rows.grad == 0).all() for rows in token.rows.values())


def test_which_captions_hold_the_token_is_copied_without_waiting(micro_pipeline, monkeypatch):
    """Through speed.copied, as all that a micro-batch needs of ours on its device."""
    seen = []

    def spy(tensor, device):
        seen.append((tensor.tolist(), device))
        return tensor

    monkeypatch.setattr("coeffdiff.training.text.copied", spy)
    empty, device = torch.zeros(2), torch.device("cpu")
    batch = Batch(empty, empty, empty, torch.zeros(2, 77, 48), torch.zeros(2, 36), empty, ("a sks", "a dog"))
    learned(micro_pipeline).conditions(batch)
    assert seen == [([True, False], device)]


def test_a_token_begins_as_the_class_word_unless_told(micro_pipeline):
    """init, else the class word, else the token itself."""
    texts = (({"subject.class_word": "mug"}, "mug"), ({}, "sks"), ({"method.token.init": "a"}, "a"))
    for values, text in texts:
        token = learned(micro_pipeline, **values)
        expected = initial_rows(micro_pipeline, text, 1)
        assert all(torch.equal(rows, expected[key]) for key, rows in token.rows.items())
        assert token.moved() == 0


def test_a_step_draws_lengths_back(micro_pipeline):
    """With norm_pull 1 a row that grew threefold has its first length again."""
    token = learned(micro_pipeline, **{"method.token.norm_pull": 1.0})
    before = token.rows["clip_g"].norm()
    token.rows["clip_g"].data *= 3
    token.stepped()
    torch.testing.assert_close(token.rows["clip_g"].norm(), before)


def test_nothing_to_learn_from_is_refused(micro_folder, capsys, whole_runs):
    """All captions lack the token: one sentence, nothing written. One that lacks it: its photo is named."""
    values = {"subject.templates": ["a photo of a ball"], "training.steps": 1}
    with pytest.raises(
        ConfigError, match=r"No caption holds the token sks.*\{token\} into subject.templates"
    ):
        loop.train(settings_for(micro_folder, "run", **KINDS["token"], **values))
    assert not Path("run").exists()
    Path("photos/1.txt").write_text("a ball")
    loop.train(settings_for(micro_folder, "run", **KINDS["token"], **{"training.steps": 1}))
    said = capsys.readouterr().err
    assert "hint     captions: 1.png has a caption without sks" in said
    assert "token    sks is learned" in said


def test_a_long_prompt_is_measured_with_its_vectors(micro_pipeline):
    """40 letters and 40 vectors are more than 75; the same with one vector are not."""
    text = "sks " + "x" * 40
    learned(micro_pipeline)
    assert length_warnings(text, micro_pipeline) == []
    remove_token(micro_pipeline)
    learned(micro_pipeline, **{"method.token.vectors": 40})
    (line,) = length_warnings(text, micro_pipeline)
    assert "has 82 tokens, begin and end included, and the model reads 77" in line


def test_the_settings_name_what_is_trained():
    """--learn-token adds the token to every kind, and kind token implies it."""
    for kind, learn, expected in (
        ("coeff", False, "coeff"),
        ("coeff", True, "coeff+token"),
        ("coeff+lora", True, "coeff+lora+token"),
        ("token", False, "token"),
        ("token", True, "token"),
    ):
        settings = load_settings(None, {"method.kind": kind, "subject.learn_token": learn})
        assert settings.trained_kind == expected and settings.learns_token == ("token" in expected)
    assert not Settings().learns_token


def test_bf16_trains_float32_rows(micro_folder):
    """Beside text encoders in bfloat16 the rows stay float32 and move; norm_pull 1 keeps their length meanwhile."""
    values = {"training.precision": "bf16", "training.steps": 2}
    values |= {"method.token.learning_rate": 0.3, "method.token.norm_pull": 1.0, "method.token.init": "a"}
    loop.train(settings_for(micro_folder, "run", **KINDS["token"], **values))
    assert all(tensor.dtype == torch.float32 for tensor in weights("run").values())
    assert logged("run")[-1]["token"] > 0.1
    pipe = load_pipeline(
        find_backbone(ModelSettings(name=str(micro_folder))), dtype=torch.bfloat16, parts={"text"}
    )
    for key, first in initial_rows(pipe, "a", 2).items():
        torch.testing.assert_close(rows("run")[key].norm(dim=1), first.norm(dim=1))
