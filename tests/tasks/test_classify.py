"""`classify` from its command line to its table: all arms learn, nothing is trained twice, mistakes meet a sentence."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.errors import ConfigError, ModelError, TrainingError
from coeffdiff.tasks import classify_work, encoder
from coeffdiff.tasks.arms import ARMS
from coeffdiff.tasks.classify import classify
from coeffdiff.tasks.classify_plan import Plan
from coeffdiff.tasks.classify_report import as_text
from coeffdiff.tasks.classify_work import best_rates
from coeffdiff.tasks.encoder import load_encoder
from coeffdiff.tasks.examples import Example, read_examples
from coeffdiff.tasks.few_shot import Recipe, train_few_shot

QUICK = Recipe(steps=20, batch_size=6, rank=2)


def run(*arguments):
    return CliRunner().invoke(app, ["classify", *map(str, arguments)])


@pytest.fixture(scope="module")
def compared(models, weather, tmp_path_factory):
    """The command's JSON and its folder: 4 shots, 2 seeds, 2 tries."""
    output = tmp_path_factory.mktemp("compared")
    done = run(
        weather, "--model", models / "bert", "--shots", "4", "--seeds", 2, "--tries", 2, "--steps", 20, "--batch-size",
        6, "--rank", 2, "--test", 5, "--validation", 3, "--output", output, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), output


def test_all_arms_learn_and_are_compared(compared):
    """Far above the 1/3 of chance; numbers by hand; each arm against those before it."""
    found, output = compared
    four = found["shots"]["4"]
    assert list(four["arms"]) == list(ARMS)
    assert all(arm["accuracy"]["mean"] > 0.6 and arm["seeds"] == 2 for arm in four["arms"].values())
    head = 16 * 3 + 3
    assert four["arms"]["coeff+lora"]["numbers"] == {"head": head, "lora": 2 * 2 * 2 * 32, "coeff": 2 * 16}
    assert four["arms"]["coeff"]["mean_abs_alpha"] > 0 and four["arms"]["lora"]["mean_abs_alpha"] is None
    assert list(four["paired"]["coeff+lora"]) == ["linear", "lora", "coeff"]
    assert four["paired"]["lora"]["linear"]["says"] == "too few seeds"
    assert json.loads((output / "classification.json").read_text()) == found
    assert len(list((output / "cells").iterdir())) == 4 * (2 * 2 + 2)


def test_the_rates_with_the_best_validation_are_trained(compared):
    """By hand from the cells of tuning, of which none was scored on the test split."""
    found, output = compared
    cells = [json.loads(file.read_text()) for file in (output / "cells").iterdir()]
    for arm in ARMS:
        tries = {}
        for cell in cells:
            if cell["arm"] == arm and str(cell["seed"]).startswith("tune"):
                scores = tries.setdefault(json.dumps(cell["rates"]), [])
                scores.append((cell["scores"]["accuracy"], -cell["scores"]["loss"]))
        assert [len(scores) for scores in tries.values()] == [2, 2]
        means = {
            rates: tuple(sum(part) for part in zip(*scores, strict=True)) for rates, scores in tries.items()
        }
        assert found["shots"]["4"]["arms"][arm]["rates"] == json.loads(max(means, key=means.__getitem__))


def test_what_is_finished_is_not_trained_again(compared, models, weather, monkeypatch):
    """The same command trains nothing; one more seed trains four; packed cells are found too."""
    found, output = compared
    plan = Plan(
        weather, str(models / "bert"), shots=(4,), seeds=2, tries=2, test=5, validation=3, recipe=QUICK
    )
    trained = []

    def counted(*arguments):
        trained.append(arguments[1])
        return train_few_shot(*arguments)

    monkeypatch.setattr(classify_work, "train_few_shot", counted)
    assert classify(plan, output, pack_as="weather")["shots"] == found["shots"]
    assert trained == []
    assert [file.name for file in (output / "cells").iterdir()] == ["weather.jsonl"]
    again = classify(Plan(**{**vars(plan), "seeds": 3}), output)
    assert trained == list(ARMS)
    assert again["shots"]["4"]["arms"]["lora"]["seeds"] == 3


def test_a_training_depends_on_its_seed_alone(models, weather):
    """Whatever torch's generator was at: the same numbers, bit for bit; another seed gives others."""
    examples = read_examples(weather)
    loaded = load_encoder(str(models / "bert"), examples.items[0], torch.device("cpu"))
    before = {name: value.clone() for name, value in loaded.network.state_dict().items()}
    rates = {"head": 1e-2, "lora": 1e-2, "coeff": 1e-1}
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(heads))
        done = train_few_shot(
            loaded, "coeff+lora", rates, QUICK, seed, examples.items[::3], examples.items[1::3]
        )
        heads.append((done.head.weight, done.scores))
    assert torch.equal(heads[0][0], heads[1][0]) and heads[0][1] == heads[1][1]
    assert not torch.equal(heads[0][0], heads[2][0])
    assert all(torch.equal(value, before[name]) for name, value in loaded.network.state_dict().items())


@pytest.mark.parametrize("steps", [2, 4])
def test_a_training_that_diverges_is_named_and_left_out(steps, models, weather, tmp_path, monkeypatch):
    """In its steps, or at the last one; NaN would be an answer, that of the first class. Done once alone."""
    plan = Plan(weather, str(models / "bert"), ("linear", "lora"), (1,), 2, 1, 5, recipe=Recipe(steps=steps))
    high = {"head": 1e30, "lora": 1e30}
    monkeypatch.setattr(
        classify_work, "rates_to_try", lambda arm, _: [high if arm == "lora" else {"head": 1e-2}]
    )
    for _ in range(2):
        found = classify(plan, tmp_path, keep=True)
        assert list(found["shots"]["1"]["arms"]) == ["linear"] and found["shots"]["1"]["paired"] == {}
        assert [line.partition(":")[0] for line in found["failed"]] == [
            "lora, 1 shots, seed 0",
            "lora, 1 shots, seed 1",
        ]
        assert "the learning rates are too high" in found["failed"][0]
        assert f"failed: {found['failed'][0]}" in as_text(found)
        monkeypatch.setattr(classify_work, "train_few_shot", lambda *_: pytest.fail("nothing is left"))


def test_where_all_diverge_there_is_still_a_table(models, weather, tmp_path, monkeypatch):
    plan = Plan(weather, str(models / "bert"), ("lora",), (1,), 1, 1, 5, recipe=Recipe(steps=4))
    monkeypatch.setattr(classify_work, "rates_to_try", lambda *_: [{"head": 1e30, "lora": 1e30}])
    found = classify(plan, tmp_path)
    assert found["shots"]["1"]["arms"] == {} and "failed: lora" in as_text(found)


def test_rates_at_which_a_training_diverges_are_not_chosen():
    """However accurate; a cell of an older version says it by a loss of None."""
    sound, failed = (
        {"scores": {"accuracy": 0.4, "loss": 1.0}},
        {"scores": {}, "failed": "The loss became inf."},
    )
    older = {"scores": {"accuracy": 0.9, "loss": None}}
    named = {"arm": "lora", "shots": 4}
    tries = [{"head": 1.0}, {"head": 2.0}, {"head": 3.0}]
    assert best_rates(tries, [[older, sound], [sound, failed], [sound, sound]]) == {"head": 3.0}
    with pytest.raises(
        TrainingError, match=r"lora, 4 shots: The loss became inf. So it was at all 1 rates tried"
    ):
        best_rates(tries[:1], [[sound, failed | named]])


def test_an_encoder_without_its_pooler_is_known_again(shades):
    """What its files lack is drawn anew in each process, and takes no part; else finished cells would not be found."""
    picture = read_examples(shades).items[0]
    one, other = (load_encoder("pocket-dino", picture, torch.device("cpu")) for _ in range(2))
    assert one.digest == other.digest
    weights = [loaded.network.state_dict()["pooler.dense.weight"] for loaded in (one, other)]
    assert not torch.equal(*weights)


def test_pictures_and_an_encoder_decoder(models, weather, shades, tmp_path):
    """A ViT, whose first token is taken, on class folders; SigLIP's tower of pictures and BART's encoder, whose mean is.

    As a table.
    """
    both = (
        "--shots",
        "1",
        "--seeds",
        1,
        "--tries",
        1,
        "--steps",
        4,
        "--rank",
        2,
        "--output",
        tmp_path / "out",
    )
    done = run(shades, "--model", models / "vit", *both)
    assert done.exit_code == 0, done.output
    assert "ViTModel" in done.stderr and "the first token" in done.stderr
    assert "1 shots of each of 2 classes, 1 seeds, 6 images tested" in done.stdout
    assert "coeff+lora - lora" in done.stdout
    done = run(shades, "--model", models / "siglip", "--arm", "coeff", *both)
    assert done.exit_code == 0, done.output
    assert "SiglipVisionModel" in done.stderr and "the mean over tokens" in done.stderr
    done = run(weather, "--model", models / "bart", "--arm", "linear", "--arm", "coeff", *both)
    assert done.exit_code == 0, done.output
    assert "BartEncoder" in done.stderr and "the mean over tokens" in done.stderr
    assert "lora" not in done.stdout


@pytest.mark.parametrize(
    ("data", "model", "options", "says"),
    [
        ("shades", "resnet", [], "InjectionError: .*it has no attention layer"),
        ("shades", "bert", [], "ModelError: .*takes texts, and the examples are pictures"),
        ("weather", "vit", [], "ModelError: .*takes pictures, and the examples are texts"),
        ("weather", "nowhere", [], "ModelError: .*nowhere is neither a folder here nor a hub id"),
        ("shades", "vit", ["--shots", "3"], "ConfigError: The class 'dark' has 4 pictures, and 3 shots .* takes 5"),
        ("shades", "vit", ["--shots", "0"], "ConfigError: --shots are at least 1"),
        ("shades", "vit", ["--shots", "1,x"], "ConfigError: --shots takes whole numbers"),
        ("shades", "vit", ["--arm", "dora"], "ConfigError: There is no arm 'dora'"),
        ("shades", "vit", ["--lora-target", "to_q"], "ConfigError: .*has no linear layer 'to_q'"),
        ("weather", "bert", ["--text-column", "body"], "ConfigError: .*has no column 'body'"),
    ],
)  # fmt: skip
def test_a_mistake_meets_one_sentence(data, model, options, says, models, weather, shades, tmp_path, request):
    """Exit code 2, on stderr, and nothing written."""
    place = {"shades": shades, "weather": weather}[data]
    shots = [] if "--shots" in options else ["--shots", "1"]
    done = run(place, "--model", models / model, *shots, *options, "--output", tmp_path / "out", "--steps", 1)
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if "Error: " in line]
    assert len(lines) == 1 and "Traceback" not in done.output
    assert re.match(says, lines[0]), lines[0]
    assert not (tmp_path / "out").exists()


TEXT = Example(0, "", text="sun")


def test_weights_that_are_not_there_are_refused(models, tmp_path):
    """transformers would fill them with noise: nothing pre-trained would be adapted."""
    shutil.copytree(models / "bert", tmp_path / "bert")
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "layer.1" not in name},
        tmp_path / "bert" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ModelError, match=r"lack encoder.layer.1.* so it is not pre-trained"):
        load_encoder(str(tmp_path / "bert"), TEXT, torch.device("cpu"))


def test_a_model_that_makes_no_features_is_refused(models, monkeypatch):
    """Whatever a model of transformers raises when it is tried, or NaN, which would train to nothing."""
    nan = tf.BertModel.from_pretrained(models / "bert")
    torch.nn.init.constant_(nan.encoder.layer[0].output.dense.bias, float("nan"))
    monkeypatch.setattr(encoder, "_tower", lambda *_: nan)
    with pytest.raises(ModelError, match=r"makes no finite features .1, D. of one example"):
        load_encoder(str(models / "bert"), TEXT, torch.device("cpu"))
    nan.encoder.layer[0] = torch.nn.Linear(3, 3)
    with pytest.raises(ModelError, match="makes no hidden states of one example: "):
        load_encoder(str(models / "bert"), TEXT, torch.device("cpu"))


def test_a_text_without_a_token_is_refused(models):
    """Its features would be the mean of nothing."""
    loaded = load_encoder(str(models / "bert"), TEXT, torch.device("cpu"))
    with pytest.raises(ConfigError, match="makes no token of the text ' '"):
        loaded.inputs([TEXT, Example(0, "", text=" ")])


def test_arms_must_differ(weather, models, tmp_path):
    with pytest.raises(ConfigError, match="--arm needs at least one value, and each once"):
        classify(Plan(weather, str(models / "bert"), arms=("lora", "lora")), tmp_path)
