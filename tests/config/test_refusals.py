"""What is said of a wrong setting: found, wanted, an example; never in pydantic's words."""

from __future__ import annotations

import datetime
import math

import pytest
from pydantic import ValidationError

from coeffdiff.config.annotations import fields_of
from coeffdiff.config.loading import load_section
from coeffdiff.config.refusals import _example, refusal_sentence
from coeffdiff.config.schema import Settings
from coeffdiff.config.synonyms import _SETTINGS_BY_WORD, nearest
from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.comparison_plan import Comparison

WRONG = [
    None, True, False, -1, 0, 1.5, 2**80, math.inf, math.nan, -0.0, "", "text", "1e3", "a\0b", "\ud800", "x" * 2000, "~nobody/x",
    b"bytes", datetime.date(2026, 1, 1), [], [None], [True], [[]], ["a", 1], [-1], [1.5], ["x" * 2000], [{}], {}, {"a": 1},
    {"a": {"b": []}}, {1: 2}, (), object(),
]  # fmt: skip
NAMES = [(kind, name) for kind in (Settings, Comparison) for name, _ in fields_of(kind)]


def nested(name, value):
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def test_nothing_falls_through_to_pydantics_own_words():
    """Every setting and section x everything that can be wrong with it, down to each member of a union."""
    types = set()
    places = [*NAMES, *((kind, section) for kind in (Settings, Comparison) for section in kind.model_fields)]
    for kind, name in places:
        for value in WRONG:
            try:
                kind.model_validate(nested(name, value))
                continue
            except ValidationError as error:
                problems = error.errors()
            for problem in problems:
                said = refusal_sentence(kind, problem, "the settings", [])
                types.add(problem["type"])
                own = problem["type"] == "value_error"
                assert own or problem["msg"].rstrip(".").lower() not in said.lower(), said
                assert (
                    not any(
                        word in said.lower() for word in ("input should", "valid ", "value error", "pydantic")
                    )
                    or own
                )
                assert "\n" not in said and said.endswith((".", "?")), said
                assert name in said or "warmup_steps needs" in said or "images have no effect" in said, said
                if not own and problem["type"] != "extra_forbidden":
                    assert ("(given: " in said and ": it must be " in said) or ": it is a section" in said, (
                        said
                    )
                    assert f"such as {name}" in said or ".".join(map(str, problem["loc"])) in said, said
    assert types == {
        "bool_parsing", "bool_type", "boolean", "dict_type", "extra_forbidden", "finite_number", "float_parsing",
        "float_type", "greater_than", "greater_than_equal", "int_from_float", "int_parsing", "int_type", "invalid_key",
        "less_than", "less_than_equal", "list_type", "literal_error", "model_type", "path_type", "string_too_long",
        "string_too_short", "string_type", "string_unicode", "too_short", "value_error",
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), NAMES, ids=lambda value: getattr(value, "__name__", value))
def test_the_example_of_a_sentence_is_taken(kind, name, tmp_path):
    """As a line of YAML, and after --set."""
    shown = _example(dict(fields_of(kind))[name])
    extra = {
        "prior.images": ["prior.weight=1"], "method.coeff.backend": [], "training.warmup_steps": ["training.lr_schedule=cosine"],
        "arms": ["reference=lora"],
    }.get(name, [])  # fmt: skip
    file = tmp_path / "my.yaml"
    file.write_text(f"{name}: {shown}\n")
    assert load_section(kind, file, None, extra) == load_section(
        kind, None, None, [*extra, f"{name}={shown}"]
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("trainig.steps", "training.steps"), ("trianing.sed", "training.seed"), ("training.stepz", "training.steps"),
        ("lr", "method.lora.learning_rate, method.coeff.learning_rate, method.token.learning_rate"),
        ("learning_rate", "method.lora.learning_rate, method.coeff.learning_rate, method.token.learning_rate"),
        ("method.coeff.lr", "method.coeff.learning_rate"), ("batch", "training.batch_size"),
        ("train_batch_size", "training.batch_size"), ("train-batch-size", "training.batch_size"),
        ("training.bs", "training.batch_size"), ("epochs", "training.steps"), ("max_train_steps", "training.steps"),
        ("rank", "method.lora.rank"), ("lora.rank", "method.lora.rank"), ("network_dim", "method.lora.rank"),
        ("dim", "method.lora.rank"), ("network_alpha", "method.lora.alpha"), ("res", "training.resolution"),
        ("gradient_accumulation_steps", "training.accumulate"), ("mixed_precision", "training.precision"),
        ("seed", "training.seed"), ("Seed", "training.seed"), ("steps", "training.steps, validation.steps"),
        ("instance_data_dir", "subject.images"), ("class_data_dir", "prior.images"), ("output_dir", "output"),
        ("pretrained_model_name_or_path", "model.name"), ("nonsense", ""), ("training.nonsense", ""),
    ],
)  # fmt: skip
def test_the_right_setting_is_suggested(name, meant):
    """By the whole path, by its last word, by other trainers' words; nothing where nothing is like it."""
    assert ", ".join(nearest(name, [known for known, _ in fields_of(Settings)])) == meant


def test_every_synonym_means_a_setting_and_hides_none():
    names = [name for name, _ in fields_of(Settings)]
    assert {wanted for meant in _SETTINGS_BY_WORD.values() for wanted in meant} <= set(names)
    for word, meant in _SETTINGS_BY_WORD.items():  # another word than the setting's own
        assert all(name.rpartition(".")[2] != word for name in meant) or len(meant) > 1, word


def test_a_plan_suggests_the_settings_of_its_arms():
    with pytest.raises(ConfigError, match=r"Did you mean settings\.method\.lora\.rank\?"):
        load_section(Comparison, None, None, ["rank=8"])
