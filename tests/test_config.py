"""Settings: one tree, refused with the nearest valid name, resolved by model and device."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from coeffdiff.config import (
    ModelFacts,
    Settings,
    differences,
    documented_settings,
    load_section,
    load_settings,
    resolve_auto,
    save_settings,
)
from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.compare import Comparison

SDXL_ON_A_GPU = ModelFacts(2_567_463_684, 1024, "cuda", bf16=True)
SMALL_ON_A_CPU = ModelFacts(600_000, 64, "cpu", bf16=False)
FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
PLANS = sorted(FOLDER.glob("compare/*.yaml"))


def test_later_sources_win(tmp_path):
    """YAML over defaults, flags over YAML, --set over flags; a flag of None says nothing."""
    file = tmp_path / "my.yaml"
    file.write_text("training: {steps: 10, seed: 1, resolution: 512}\n")
    flags = {"training.steps": 20, "training.seed": None, "training.resolution": 256}
    settings = load_settings(file, flags, ["training.steps=30"])
    assert (settings.training.steps, settings.training.seed, settings.training.resolution) == (30, 1, 256)


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("training.stesp=3", "Unknown setting training.stesp in the settings. Did you mean training.steps?"),
        ("lora.rank=8", "Unknown setting lora.rank in the settings. Did you mean method.lora.rank?"),
        ("method.lora.rnk=8", "Did you mean method.lora.rank?"),
        ("method.kind=colora", "method.kind (given: 'colora'): it must be coeff, lora, coeff+lora"),
        ("training.steps=-1", "training.steps (given: -1): must be at least 1"),
        ("training.steps=many", "training.steps (given: 'many')"),
        ("training.resolution=100", "must be a multiple of 8"),
        ("method.coeff.mixes=keys", "method.coeff.mixes (given: 'keys'): it must be maps or values, such as"),
        ("method.coeff={mixes: values, backend: fused}", "backend has no effect where values are mixed"),
        (
            "method.coeff.dropout=1.5",
            "method.coeff.dropout (given: 1.5): it must be a number (at least 0, below 1), such as",
        ),
        ("method.coeff.learning_rate=fast", "method.coeff.learning_rate (given: 'fast')"),
        ("training.warmup_steps=5", "warmup_steps needs lr_schedule"),
        ("training=3", "training (given: 3)"),
        ("training.steps.more=3", "training.steps"),
        ("training.steps", "is not of the form name=value"),
        ("subject.token= sks", "ok"),
        ("method.coeff.learning_rate=-1", "must be above zero"),
        ("validation.seeds=[-1]", "validation.seeds"),
        ("method.lora.learning_rate=.nan", "finite"),
        ("method.coeff.learning_rate=1e39", "must be at most 1e30, since what learns is float32"),
        ("subject.images=2001-99-99", "ok"),  # no date that there is: text
        ('subject.images="a\\0b"', "subject.images (given: 'a\\x00b'): it has a zero byte"),
        ('output="a\\0b"', "it has a zero byte"),
        ('model.name="a\\0b"', "it has a zero byte"),
        ('validation.prompts=["\\ud800"]', "it is not valid text"),
        ("subject.token=" + "[" * 5000, "it must be 1 to 100 visible characters"),
        ("training.steps=" + "1" * 5000, "training.steps"),
    ],
)
def test_a_wrong_setting_is_one_sentence(assignment, sentence):
    """What was found, what was expected, and for an unknown name the nearest that exists."""
    if sentence == "ok":
        subject = load_settings(assignments=[assignment]).subject
        assert subject.token == "sks" or str(subject.images) == "2001-99-99"
        return
    with pytest.raises(ConfigError) as caught:
        load_settings(assignments=[assignment])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.text(max_size=60), st.sampled_from([s.name for s in documented_settings()]))
def test_no_text_after_the_equals_sign_escapes(text, name):
    """Whatever is assigned is taken, or refused in one sentence."""
    try:
        load_settings(assignments=[f"{name}={text}"])
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("training: [steps", "line 1 is not valid YAML"),
        ("- a\n- b\n", "should hold settings"),
        ("training:\n  steeps: 3\n", "Did you mean training.steps?"),
        ("training: 2001-99-99", "line 1: training (given: '2001-99-99'): it is a section"),
        ("[" * 5000, "is not valid YAML: nested too deeply"),
    ],
)
def test_a_typo_in_yaml_names_the_file(tmp_path, text, sentence):
    """Broken YAML, a list in place of settings, an unknown key: file and place are named."""
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(file)
    assert "mine.yaml" in str(caught.value)
    assert sentence in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="There is no settings file"):
        load_settings(tmp_path / "absent.yaml")


def test_yamls_traps_are_known():
    """`no` is a precision and not false; 1e-3 without a dot is a number and not text."""
    settings = load_settings(assignments=["training.precision=no", "method.coeff.learning_rate=1e-3"])
    assert settings.training.precision == "no"
    assert settings.method.coeff.learning_rate == 0.001


def test_auto_follows_model_and_device():
    """SDXL on a GPU and a small model on a CPU resolve to the documented values, and alpha's rate is three times LoRA's."""
    large, chosen = resolve_auto(Settings(), SDXL_ON_A_GPU)
    assert (large.training.steps, large.training.batch_size, large.training.accumulate) == (500, 1, 4)
    assert (large.training.resolution, large.training.precision) == (1024, "bf16")
    assert large.training.gradient_checkpointing is True
    assert (large.method.lora.learning_rate, large.method.coeff.learning_rate) == (1e-4, 3e-4)
    assert chosen["training.steps"] == 500
    small, _ = resolve_auto(Settings(), SMALL_ON_A_CPU)
    assert (small.training.steps, small.training.batch_size, small.training.accumulate) == (300, 4, 1)
    assert (small.training.resolution, small.training.precision) == (64, "no")
    assert (small.method.lora.learning_rate, small.method.coeff.learning_rate) == (1e-3, 3e-3)


def test_alphas_rate_and_loras_scaling_follow_what_was_said():
    """auto: three times LoRA's rate, and a scaling of one whatever the rank."""
    given = load_settings(assignments=["method.lora.learning_rate=5e-4", "method.lora.rank=4"])
    resolved, _ = resolve_auto(given, SDXL_ON_A_GPU)
    assert resolved.method.coeff.learning_rate == 1.5e-3
    assert resolved.method.lora.alpha == 4


def test_auto_leaves_what_was_said():
    """Only "auto" is replaced, and only that is reported."""
    given = load_settings(assignments=["training.steps=7", "training.precision=no", "photos.flip=true"])
    resolved, chosen = resolve_auto(given, SDXL_ON_A_GPU)
    assert (resolved.training.steps, resolved.training.precision) == (7, "no")
    assert "training.steps" not in chosen
    assert resolved.photos.augmentations == 2


def test_what_is_stored_reads_back_the_same(tmp_path):
    """config.yaml of a run is enough to repeat it: resolved settings survive the file."""
    resolved, _ = resolve_auto(
        load_settings(None, {"subject.token": "žs*", "subject.images": "a b/"}), SMALL_ON_A_CPU
    )
    save_settings(resolved, tmp_path / "config.yaml")
    assert load_settings(tmp_path / "config.yaml") == resolved
    assert differences(resolved, load_settings(tmp_path / "config.yaml")) == {}


def test_differences_name_both_values():
    """By dotted name, leaving out what is to be ignored."""
    one, other = (
        load_settings(assignments=["training.seed=1"]),
        load_settings(assignments=["training.steps=9"]),
    )
    assert differences(one, other, ignore=["training.seed"]) == {"training.steps": ("auto", 9)}
    assert differences(one, other)["training.seed"] == (1, 0)


def test_every_setting_is_documented():
    """No field without a description: it is the only place where it is explained."""
    every = [*documented_settings(), *documented_settings(Comparison)]
    undocumented = [setting.name for setting in every if len(setting.description) < 8]
    assert undocumented == []


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_recipe_is_valid_and_opens_with_its_command(file):
    """A shipped YAML loads, begins with the command that runs it, and leaves no key unknown."""
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# coeffdiff train --config configs/{file.name} --images")
    settings = load_settings(file)
    if file.stem.startswith(("sdxl-coeff", "sdxl-lora")):  # the others are named after what they fit
        assert settings.method.kind.replace("+", "-") in file.name


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.name)
def test_every_plan_is_valid_down_to_the_settings_of_its_arms(file):
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# coeffdiff compare configs/compare/{file.name} --output comparison"
    plan = load_section(Comparison, file)
    assert plan.settings["training.masked_loss"] is False
    for own in filter(None, plan.arms.values()):
        settings = load_settings(None, {**plan.settings, **own})
        # A plan stays the same when a default moves
        assert "auto" not in (settings.training.steps, settings.subject.caption_dropout)
        method = settings.method
        for part in ("coeff", "lora"):
            assert part not in method.kind or getattr(method, part).learning_rate != "auto", own
        assert not settings.learns_token or method.token.learning_rate != "auto", own


def test_the_three_recipes_are_there():
    assert {"sdxl-coeff.yaml", "sdxl-lora.yaml", "sdxl-coeff-lora.yaml"} <= {file.name for file in CONFIGS}


def test_accelerate_recipes_are_yaml_that_accelerate_knows():
    """Each accelerate config parses and holds only keys of Accelerate's own config class."""
    from accelerate.commands.config.config_args import ClusterConfig

    files = sorted(CONFIGS[0].parent.glob("accelerate/*.yaml"))
    assert files
    for file in files:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert set(tree) <= set(ClusterConfig.__dataclass_fields__), file
