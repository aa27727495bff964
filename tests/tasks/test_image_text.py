"""Several image-text tasks at once, on a tiny random BART and a tiny random CLIP in the hub's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    ViTConfig,
    ViTModel,
)
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.errors import CoeffDiffError, ModelError
from coeffdiff.evaluation.cells import CellFolder
from coeffdiff.tasks.arms import put_arm
from coeffdiff.tasks.image_text_data import Question, read_questions
from coeffdiff.tasks.image_text_model import ImageText, load_image_text, read_notes
from coeffdiff.tasks.image_text_pictures import load_tower, picture_features
from coeffdiff.tasks.image_text_results import as_markdown, gathered
from coeffdiff.tasks.image_text_training import Turns, few, score, tune
from pretrain_image_text import small_bart

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
LAYERS, HEADS = 3, 8  # attention layers of one encoder and one decoder layer


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders bart and clip; no projection beside the BART, as on the hub."""
    folder = tmp_path_factory.mktemp("models")
    bart, tokenizer = small_bart(0, layers=1, width=32)
    bart.save_pretrained(folder / "bart")
    tokenizer.save_pretrained(folder / "bart")
    torch.manual_seed(1)
    sizes = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "clip"
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures of one colour: which it is, and whether two have the same."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for i in range(18):
        split = ("train", "validation", "test")[i // 6]
        names = [f"{i}-{colour}.png" for colour in COLOURS]
        for name, colour in zip(names, COLOURS.values(), strict=True):
            Image.new("RGB", (40, 32), tuple(c + i for c in colour)).save(folder / name)
        for place, colour in enumerate(COLOURS):
            asked = {"image": names[place], "question": "what colour is it", "answer": colour, "task": "vqa"}
            other = (place + i) % 3
            same = {
                "images": [names[place], names[other]],
                "question": "do both pictures show the same colour",
                "answer": "yes" if other == place else "no",
                "task": "nlvr",
            }
            lines += [asked | {"split": split}, same | {"split": split}]
    write(folder, *lines)
    return folder


def write(folder: Path, *lines) -> Path:
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def model(models) -> ImageText:
    return load_image_text(str(models / "bart"), 12)


def features_of(count: int) -> torch.Tensor:
    return torch.randn(count, 5, 12, generator=torch.Generator().manual_seed(0))


def call(*arguments):
    return CliRunner().invoke(app, ["image-text", *map(str, arguments)])


def test_the_command_compares_arms_and_computes_nothing_twice(models, data, tmp_path):
    """Hub-like folders in, a table and cells out; again, and with one arm more, the cells are those there."""
    arguments = [data, "--model", models / "bart", "--tower", models / "clip", "--output", tmp_path / "out"]
    arguments += ["--steps", "2", "--batch-size", "4", "--tries", "2", "--seeds", "0,1", "--json"]
    first = call(*arguments, "--arm", "frozen", "--arm", "coeff", "--arm", "lora")
    assert first.exit_code == 0, first.output
    results = json.loads(first.stdout)
    assert results["arms"]["coeff"]["numbers"]["coeff"] == LAYERS * HEADS**2
    assert results["arms"]["coeff"]["mean_abs_alpha"] > 0 == results["arms"]["frozen"]["mean_accuracy"]
    assert list(results["paired"]) == ["coeff"] and list(results["paired"]["coeff"]) == ["lora"]
    assert set(results["paired"]["coeff"]["lora"]) == {"mean", "nlvr", "vqa"}
    assert len(results["arms"]["lora"]["tries"]) == 2
    cells = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells").iterdir()}
    assert len(cells) == 1 + 2 * (2 + 2)
    again = call(*arguments, "--arm", "coeff", "--arm", "lora", "--arm", "coeff+lora")
    assert again.exit_code == 0, again.output
    both = json.loads(again.stdout)["arms"]
    assert all(both[arm] == results["arms"][arm] for arm in ("coeff", "lora"))
    assert sum(both["coeff+lora"]["numbers"].values()) > sum(both["lora"]["numbers"].values())
    now = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells").iterdir()}
    assert cells.items() <= now.items() and len(now) == len(cells) + 2 + 2
    packed = call(*arguments[:-1], "--pack", "--arm", "coeff", "--arm", "lora", "--arm", "coeff+lora")
    (file,) = (tmp_path / "out" / "cells").iterdir()
    assert file.name == "image-text.jsonl" and file.read_text().count("\n") == len(now)
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert kept["arms"] == both and as_markdown(kept) in packed.stdout
    table = [
        line.split(" | ")
        for line in as_markdown(gathered(CellFolder(file.parent).all().values())).split("\n")
    ]
    assert [row[0].strip("| ") for row in table[2:]] == ["frozen", "lora", "coeff", "coeff+lora"]
    assert {len(row) for row in table} == {4 + 2 + 4 - 1}


def test_colours_are_learned_from_pictures(models, data):
    """Held-out pictures of one colour are named rightly after a short training of everything; before, none is."""
    known, tower = read_questions(data), load_tower(str(models / "clip"), grid=2)
    features = picture_features(tower, known.pictures)
    model = load_image_text(str(models / "bart"), tower.width)
    test = [question for question in known.splits["test"] if question.task == "vqa"]
    assert score(model, features, test).mean == 0.0
    _, groups = put_arm(model.language, "full", rates={"head": 1e-2, "full": 1e-2}, heads=[model.projection])
    train = [question for question in known.splits["train"] if question.task == "vqa"]
    tune(model, groups, features, train, steps=80, batch_size=8, seed=0)
    assert score(model, features, test).mean == 1.0


def test_tuning_is_repeatable_and_leaves_the_frozen_weights(models):
    """Same seed, same alpha, bit for bit; all but projection and alpha stay as they were."""
    questions = [Question((i % 3,), "what colour is it", "red", "vqa") for i in range(5)]
    alphas = []
    for _ in range(2):
        model = load_image_text(str(models / "bart"), 12)
        before = {name: value.clone() for name, value in model.language.state_dict().items()}
        _, groups = put_arm(
            model.language, "coeff", rates={"head": 1e-2, "coeff": 1e-1}, heads=[model.projection]
        )
        tune(model, groups, features_of(3), questions, steps=3, batch_size=4, seed=7)
        after = model.language.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        alphas.append(torch.cat([value.flatten() for name, value in after.items() if "alpha" in name]))
    assert torch.equal(*alphas) and alphas[0].count_nonzero() > 0.9 * len(alphas[0])


def test_a_missing_second_picture_is_not_seen(model):
    """In a batch with questions of two pictures, a question of one has the loss and answer that it has alone."""
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # large, or places and pictures would hardly change anything
        parameter.data = torch.randn(parameter.shape, generator=draw)
    features = features_of(3)
    rows, words = features[torch.tensor([[0, 1], [2, 0]])], ["what is it", "is it a red mug"]
    shown = torch.tensor([[True, True], [True, False]])
    alone = features[2:][:, None], torch.ones(1, 1, dtype=torch.bool), words[1:]
    assert model.answer(rows, shown, words, longest=6)[1] == model.answer(*alone, longest=6)[0]
    one, other = model(rows[1:], shown[1:], words[1:], ["red"]), model(*alone, ["red"])
    torch.testing.assert_close(one, other)
    for changed in (torch.ones(1, 2, dtype=torch.bool), shown[1:].flip(1)):
        assert abs(model(rows[1:], changed, words[1:], ["red"]) - other) > 0.001


def test_a_saved_model_comes_back(model, models, tmp_path):
    """Weights, projection, tokenizer, and the tower that it was made with."""
    model.save(tmp_path / "saved", "pocket-clip", 4)
    again = load_image_text(str(tmp_path / "saved"), 12)
    assert {n: v.tolist() for n, v in model.state_dict().items()} == {
        n: v.tolist() for n, v in again.state_dict().items()
    }
    assert vars(read_notes(str(tmp_path / "saved"))) == {"tower": "pocket-clip", "grid": 4}
    assert read_notes(str(models / "bart")).grid == 6
    with pytest.raises(ModelError, match="maps 12 numbers to 32, and here 99 become 32"):
        load_image_text(str(tmp_path / "saved"), 99)
    for damaged in ('{"tower": "pocket-clip"}', "[" * 100_000):
        (tmp_path / "saved" / "image_text.json").write_text(damaged)
        with pytest.raises(ModelError, match=r"image_text.json is damaged"):
            read_notes(str(tmp_path / "saved"))


def test_features_are_the_class_token_and_averaged_patches(models):
    """A grid of one: the mean of all 16 patches before the last layer; a grid larger than the patches: as they are."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    one, all_, more = (load_tower(str(models / "clip"), grid=grid).features(pixels) for grid in (1, 4, 9))
    assert one.shape == (2, 2, 12) and all_.shape == (2, 17, 12) and torch.equal(all_, more)
    assert [load_tower(str(models / "clip"), grid=grid).count for grid in (1, 4, 9)] == [2, 17, 17]
    assert torch.equal(one[:, 0], all_[:, 0])
    torch.testing.assert_close(one[:, 1], all_[:, 1:].mean(dim=1))
    before_last = load_tower(str(models / "clip")).network(pixels, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(all_, before_last)


def test_every_task_has_an_equal_share_and_every_question_its_turn():
    """Five questions of one task, two of another: by turns; five in a row of a task are five different ones."""
    questions = [Question((0,), str(i), "yes", "ab"[i >= 5]) for i in range(7)]
    turns = Turns(questions, seed=0)
    drawn = [turns(number) for number in range(20)]
    assert [question.task for question in drawn] == ["a", "b"] * 10
    assert {question.text for question in drawn[0:10:2]} == set("01234")
    assert [question.text for question in drawn[0:10:2]] != [question.text for question in drawn[10::2]]
    assert [Turns(questions, seed=0)(number) for number in (17, 3)] == [drawn[17], drawn[3]]
    assert [len([q for q in few(questions, 3, 0) if q.task == task]) for task in "ab"] == [3, 2]
    assert few(questions, 3, 0) != few(questions, 3, 1) and few(questions, 0, 0) == questions


def test_answers_are_scored_by_hand(model, monkeypatch):
    """Right word for word but for case and stops; two of three words shared with two of two: F1 = 4/5."""
    answers = {"q1": " A red  Mug.", "q2": "a mug", "q3": "no"}
    monkeypatch.setattr(model, "answer", lambda features, shown, texts, longest: [answers[t] for t in texts])
    wanted = [("q1", "a red mug", "x"), ("q2", "a red mug", "x"), ("q3", "yes", "y")]
    found = score(
        model, features_of(1), [Question((0,), text, answer, task) for text, answer, task in wanted]
    )
    assert found.accuracy == {"x": 0.5, "y": 0.0} and found.counts == {"x": 2, "y": 1}
    assert found.f1 == {"x": pytest.approx((1 + 4 / 5) / 2), "y": 0.0} and found.mean == 0.25


def test_no_picture_is_in_two_splits(tmp_path):
    """Without splits of the user's: pictures that a question shows together go together, about 70 : 15 : 15."""
    for i in range(80):
        (tmp_path / f"{i}.png").touch()
    pairs = [
        {"images": [f"{i}.png", f"{i + 1}.png"], "question": "q", "answer": "a"} for i in range(0, 80, 2)
    ]
    singles = [{"image": f"{i}.png", "question": "q", "answer": "a"} for i in range(80)]
    known = read_questions(write(tmp_path, *pairs, *singles))
    seen = {name: {p for q in part for p in q.pictures} for name, part in known.splits.items()}
    assert sum(map(len, seen.values())) == len(set.union(*seen.values())) == 80
    assert {name: len(pictures) for name, pictures in seen.items()} == {
        "train": 56,
        "validation": 12,
        "test": 12,
    }
    assert known.tasks == ("questions",) and read_questions(tmp_path) == known


LINE = {"image": "1.png", "question": "what is it", "answer": "mug"}


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "questions.jsonl is empty"),
        ([LINE, '{"image": '], "line 2 is not JSON"),
        (["[]"], "line 1 is no JSON object"),
        ([{"image": "1.png", "question": "what is it"}], "line 1 has no answer"),
        ([LINE | {"answer": "  "}], 'line 1 has answer: "  "'),
        ([LINE | {"question": 3}], "line 1 has question: 3"),
        ([{"question": "a", "answer": "b"}], "line 1 needs an image"),
        ([LINE | {"images": ["1.png"]}], "line 1 needs an image"),
        ([LINE | {"image": "absent.png"}], "line 1: there is no picture .*absent.png"),
        ([LINE | {"image": 7}], "names pictures by something else"),
        ([{"images": [], "question": "a", "answer": "b"}], "0 pictures"),
        ([{"images": ["1.png"] * 9, "question": "a", "answer": "b"}], "9 pictures"),
        ([LINE | {"answers": ["mug"]}], "unknown key 'answers'"),
        ([LINE | {"split": "dev"}], "a split 'dev'"),
        ([LINE | {"split": ["test"]}], r"a split \['test'\]"),
        (["[" * 100_000], "line 1 is no question: nested too deeply"),
        ([LINE, LINE | {"split": "test"}], "1 lines with a split and 1 without"),
        (
            [LINE | {"split": "train"}, LINE | {"split": "test"}],
            r"choose learning rates on \(split validation\)",
        ),
        ([LINE], "too few pictures"),
        (
            [LINE | {"split": s, "task": t} for s, t in (("train", "a"), ("validation", "a"), ("test", "b"))],
            "the task b in the split test, but none to train on",
        ),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, lines, sentence):
    """One sentence, with the number of the line."""
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    with pytest.raises(CoeffDiffError, match=sentence):
        read_questions(write(tmp_path, *lines))


def test_mistakes_of_the_command_are_one_sentence(models, data, tmp_path):
    """Exit code 2, no traceback, nothing computed."""
    for name, network in (
        ("bert", BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))),
        ("vit", ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8))),
    ):  # fmt: skip
        network.save_pretrained(tmp_path / name)
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    (spoiled / "questions.jsonl").write_bytes(b'{"image": "1.png"}\n{"question": "\xff"}\n')
    unreadable = write(
        tmp_path,
        *[
            {"image": "no.png", "question": "q", "answer": "a", "split": s}
            for s in ("train", "validation", "test")
        ],
    )
    (tmp_path / "no.png").write_bytes(b"\x89PNG, but cut")
    bart, clip = models / "bart", models / "clip"
    for arguments, sentence in (
        ((tmp_path / "absent", "--model", bart, "--tower", clip), "There is no folder"),
        ((models, "--model", bart, "--tower", clip), "has no questions.jsonl; write a line such as"),
        ((spoiled, "--model", bart, "--tower", clip), "line 2 is not UTF-8"),
        ((unreadable, "--model", bart, "--tower", clip), "no.png cannot be used: damaged or cut off"),
        ((data, "--model", tmp_path / "bert", "--tower", clip), "is a bert, not an encoder-decoder of texts"),
        ((data, "--model", bart, "--tower", tmp_path / "vit"), "is a vit, not a CLIP"),
        ((data, "--model", "no such name", "--tower", clip), "neither a folder here nor a hub id"),
        ((data, "--model", bart, "--tower", clip, "--arm", "dora"), "There is no arm 'dora'"),
        ((data, "--model", bart, "--tower", clip, "--seeds", "10000"), "Seeds are wanted, and not 10000"),
        ((data, "--model", bart, "--tower", clip, "--seeds", "one"), "--seeds takes whole numbers"),
    ):
        result = call(*arguments, "--output", tmp_path / "out")
        assert result.exit_code == 2 and sentence in result.stderr.replace("\n", " "), result.output
        assert not (tmp_path / "out").exists()
    result = call(data, "--model", bart, "--tower", clip, "--output", tmp_path / "no.png")
    assert result.exit_code == 2 and "is a file" in result.stderr


def test_texts_that_are_too_long(models, tmp_path):
    """More than 128 tokens: cut, and said so. More tokens and features than the model has places for: refused."""
    for i in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    parts = [{"split": split} for split in ("train", "validation", "test")]
    options = ["--model", models / "bart", "--tower", models / "clip", "--arm", "frozen"]
    (tmp_path / "cut").mkdir()
    lines = [{"image": f"../{i}.png", "question": "red " * 90, "answer": "red " * 150} for i in range(3)]
    write(tmp_path / "cut", *[line | part for line, part in zip(lines, parts, strict=True)])
    result = call(tmp_path / "cut", *options, "--output", tmp_path / "out")
    assert result.exit_code == 0 and "3 questions or answers are cut after 128 tokens" in result.stderr
    lines = [line | {"question": "red " * 120} for line in lines]
    write(tmp_path / "cut", *[line | part for line, part in zip(lines, parts, strict=True)])
    result = call(tmp_path / "cut", *options, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "has 139 features and tokens, and the model reads 128" in result.stderr


def test_rates_that_are_too_large_are_not_chosen(models, data, tmp_path, monkeypatch):
    """A try whose loss becomes infinite is recorded as such; where all are, the command says so in a sentence."""
    monkeypatch.setattr(
        "coeffdiff.tasks.image_text.rates_to_try",
        lambda arm, tries, ranges: [{"head": 1e30, "full": 1e30}, {"head": 1e-3, "full": 1e-3}][:tries],
    )
    arguments = [data, "--model", models / "bart", "--tower", models / "clip", "--output", tmp_path / "out"]
    arguments += ["--steps", "4", "--batch-size", "2", "--arm", "full", "--seeds", "0", "--json"]
    chosen = json.loads(call(*arguments, "--tries", "2").stdout)["arms"]["full"]
    assert chosen["rates"]["full"] == 1e-3 and chosen["tries"][0]["accuracy"] is None
    # The first step has no rate yet, so that the loss in both steps is finite, and what they leave is not
    last = json.loads(call(*arguments, "--tries", "2", "--steps", "2").stdout)["arms"]["full"]
    assert last["rates"]["full"] == 1e-3 and last["tries"][0]["accuracy"] is None
    result = call(*arguments, "--tries", "1")
    assert (
        result.exit_code == 2 and "lower the learning rates. So it was at all 1 rates tried" in result.stderr
    )
