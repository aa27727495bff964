"""A classifier that is saved and loaded answers as it did; another model's is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors import SafetensorError

from coeffdiff.errors import AdapterError, AdapterMismatch, TrainingError
from coeffdiff.tasks.classify import classify
from coeffdiff.tasks.classify_plan import Plan
from coeffdiff.tasks.encoder import load_encoder
from coeffdiff.tasks.examples import read_examples
from coeffdiff.tasks.few_shot import Recipe, score, train_few_shot
from coeffdiff.tasks.saving import load_classifier, save_classifier

RATES = {"head": 1e-2, "lora": 1e-2, "coeff": 1e-1}
CPU = torch.device("cpu")


@pytest.mark.parametrize("arm", ["linear", "lora", "coeff+lora"])
def test_a_saved_classifier_scores_as_it_did(arm, models, weather, tmp_path):
    """Bit for bit, and its network differs from the encoder where the arm has an adapter."""
    examples = read_examples(weather)
    encoder = load_encoder(str(models / "bert"), examples.items[0], CPU)
    judged = examples.items[1::2]
    trained = train_few_shot(
        encoder, arm, RATES, Recipe(steps=6, batch_size=6, rank=2), 0, examples.items[::2], judged
    )
    save_classifier(trained, examples.classes, encoder, tmp_path / "kept")
    network, head, classes = load_classifier(tmp_path / "kept", encoder)
    labels = torch.tensor([example.label for example in judged])
    assert classes == ["rain", "snow", "sun"]
    assert score(network, head, encoder.inputs(judged), labels, encoder.pooling) == trained.scores
    own = score(encoder.network, head, encoder.inputs(judged), labels, encoder.pooling)
    assert (own == trained.scores) == (arm == "linear")


def test_what_is_tested_is_kept_when_asked_for(models, weather, tmp_path):
    """Also of cells that were there before; nothing of tuning."""
    plan = Plan(weather, str(models / "bert"), ("linear", "coeff"), (1,), 1, 2, recipe=Recipe(steps=2))
    first = classify(plan, tmp_path)
    assert not (tmp_path / "trained").exists()
    assert classify(plan, tmp_path, keep=True)["shots"].keys() == first["shots"].keys()
    kept = {folder.name.rpartition("-")[0]: {file.name for file in folder.iterdir()}
            for folder in (tmp_path / "trained").iterdir()}  # fmt: skip
    assert kept == {
        "linear-1-0": {"head.safetensors", "classifier.json"},
        "coeff-1-0": {"head.safetensors", "classifier.json", "coeff.safetensors"},
    }


@pytest.mark.parametrize("arm", ["linear", "lora", "coeff"])
def test_a_full_disk_is_one_sentence_and_the_scores_are_kept(arm, models, weather, tmp_path, monkeypatch):
    """The same command then trains for the classifier alone, and its scores are the same."""
    plan = Plan(weather, str(models / "bert"), (arm,), (1,), 1, 1, recipe=Recipe(steps=2))

    def full(*_, **__):
        if arm == "lora":
            raise SafetensorError("Error while serializing: I/O error: No space left on device")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        target = (Path, "write_bytes") if arm != "lora" else (PeftModel, "save_pretrained")
        patch.setattr(*target, full)
        with pytest.raises(TrainingError, match=r"The classifier .*No space left.* Its scores are kept"):
            classify(plan, tmp_path, keep=True)
    [cell] = (tmp_path / "cells").iterdir()
    before = json.loads(cell.read_text())["scores"]
    classify(plan, tmp_path, keep=True)
    assert json.loads(cell.read_text())["scores"] == before
    assert [(folder / "head.safetensors").is_file() for folder in (tmp_path / "trained").iterdir()] == [True]


def test_another_models_classifier_is_refused(models, weather, tmp_path):
    """Alphas by layers, heads and type, a head by its width, and a folder that is none."""
    examples = read_examples(weather)
    bert = load_encoder(str(models / "bert"), examples.items[0], CPU)
    bart = load_encoder(str(models / "bart"), examples.items[0], CPU)
    trained = train_few_shot(
        bert, "coeff", RATES, Recipe(steps=1), 0, examples.items[::2], examples.items[::9]
    )
    save_classifier(trained, examples.classes, bert, tmp_path / "kept")
    with pytest.raises(AdapterMismatch, match="this BartEncoder has no such layer"):
        load_classifier(tmp_path / "kept", bart)
    narrow = tf.BertConfig(
        vocab_size=25, hidden_size=8, num_hidden_layers=2, num_attention_heads=4, intermediate_size=8
    )
    tf.BertModel(narrow).save_pretrained(tmp_path / "narrow")
    for file in (models / "bert").glob("token*"):
        (tmp_path / "narrow" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(AdapterError, match=r"features 16 wide, and those of .*narrow are 8"):
        load_classifier(tmp_path / "kept", load_encoder(str(tmp_path / "narrow"), examples.items[0], CPU))
    with pytest.raises(AdapterError, match="holds no classifier of coeffdiff"):
        load_classifier(tmp_path, bert)
