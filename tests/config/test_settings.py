"""Settings: one tree, refused with the nearest valid name, resolved by model and device."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from coeffdiff.config.auto import ModelFacts, resolve_auto
from coeffdiff.config.documentation import documented_settings
from coeffdiff.config.loading import load_section, load_settings
from coeffdiff.config.nested import as_tree, flattened
from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import differences, save_settings, with_values
from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.comparison_plan import Comparison

SDXL_ON_A_GPU = ModelFacts(2_567_463_684, 1024, "cuda", bf16=True)
SMALL_ON_A_CPU = ModelFacts(600_000, 64, "cpu", bf16=False)
FOLDER = Path(__file__).parents[2] / "configs"
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
        ("method.kind=colora", "method.kind (given: 'colora'): it must be auto, coeff, lora, coeff+lora"),
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


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("training: {steps: 5}\nsubject: {}\ntraining: {seed: 1}\n", "says training twice, in line 1 and in line 3; keep one"),
        ("training:\n  steps: 5\n  steps: 6\n", "says training.steps twice, in line 2 and in line 3"),
        ("training:\n  steps: 5\ntraining.steps: 6\n", "says training.steps twice, in line 2 and in line 3"),
        ("training: 3\ntraining.steps: 6\n", "mine.yaml: training.steps cannot be set: training is not a section"),
        ("training.steps: 6\ntraining: 3\n", "mine.yaml: training.steps cannot be set: training is not a section"),
        ("training:\n  seed: 1\n  steps: True\n", "line 3: training.steps (given: true): it must be a whole number or auto, such as"),
        ("training:\n  batch_size: yes\n", "line 2: training.batch_size (given: 'yes'): it must be a whole number or auto"),
        ("training: {steps: 1:30}", "training.steps (given: '1:30')"),
        ("training: {steps: 1.5}", "training.steps (given: 1.5): it must be a whole number"),
        ("training: {steps: 1.5e0}", "training.steps (given: 1.5): it must be a whole number"),
        ("training:\n  steps:\n", "training.steps (given: nothing): it must be a whole number"),
        ("method: {coeff: {dropout: true}}", "method.coeff.dropout (given: true): it must be a number (at least 0, below 1)"),
        ("method: {lora: {learning_rate: on}}", "method.lora.learning_rate (given: 'on'): it must be a number or auto"),
        ("validation: {seeds: [1, true]}", "validation.seeds (given: [1, true]): it must be a list of whole numbers"),
        ("subject:\n  token: 7\n", "line 2: subject.token (given: 7): it must be text or null; quotes make it text, such as "
         'subject.token: "ohwx".'),
        ("subject: {token: true}", "subject.token (given: true): it must be text or null; quotes make it text"),
        ("subject: {class_word: 1e3}", "quotes make it text, such as subject.class_word: \"stuffed animal\"."),
        ("subject: {templates: [7]}", 'quotes make it text, such as subject.templates: ["a photo of {token} {class_word}"].'),
        ("method: {lora: {targets: {a: 1}}}", "line 1: method.lora.targets (given: a section): it must be a list of texts"),
        ("subject: {images: 2024}", 'it must be a path (text) or null; quotes make it text, such as subject.images: "photos/".'),
        ("training:\n  warmup_steps: 3\n", "line 2: training: warmup_steps needs lr_schedule"),
        ("trainig:\n  seed: 1\n", "Unknown setting trainig.seed in"),
        ("a: &a {b: *a}", "line 1 is not valid YAML: it refers to itself"),
    ],
)  # fmt: skip
def test_what_would_silently_be_something_else_is_refused(tmp_path, text, sentence):
    """YAML 1.1's traps, keys that stand twice, numbers and booleans where text is wanted: with file and line."""
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(file)
    assert sentence in str(caught.value) and "mine.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("training: {steps: 1e3}", "training.steps", 1000), ("training: {steps: '1e3'}", "training.steps", 1000),
        ("training: {steps: 0100}", "training.steps", 100), ("training: {seed: 010}", "training.seed", 10),
        ("training: {seed: 0o10}", "training.seed", 8), ("method: {lora: {rank: 8.0}}", "method.lora.rank", 8),
        ("method: {lora: {weight_decay: 007}}", "method.lora.weight_decay", 7.0),
        ("subject: {token: 007}", "subject.token", "007"), ("subject: {token: no}", "subject.token", "no"),
        ("subject: {token: 'no'}", "subject.token", "no"), ("subject: {token: 12:30}", "subject.token", "12:30"),
        ("training: {precision: no}", "training.precision", "no"), ("photos: {flip: yes}", "photos.flip", True),
        ("training.steps: 2", "training.steps", 2), ("training: {seed: 1}\ntraining.steps: 2", "training.steps", 2),
        ("method:\n  lora.rank: 2\n  lora: {alpha: 3}", "method.lora.rank", 2), ("method.lora: {rank: 2}", "method.lora.rank", 2),
        ("training:\n#  steps: 3\n", "training.steps", "auto"), ("method:\n  lora:\n  kind: lora\n", "method.kind", "lora"),
        ("subject: {templates: 'a {token}'}", "subject.templates", ["a {token}"]),
        ("subject:\n  templates: a photo of {token}\n", "subject.templates", ["a photo of {token}"]),
        ("validation: {prompts: x, seeds: 3}", "validation.prompts", ["x"]), ("validation: {seeds: 3}", "validation.seeds", [3]),
        ("validation: {seeds: 1e1}", "validation.seeds", [10]), ("method: {lora: {targets: to_q}}", "method.lora.targets", ["to_q"]),
        ("method: {coeff: {blocks: up_blocks.0}}", "method.coeff.blocks", ["up_blocks.0"]),
        ("method: {coeff: {blocks: null}}", "method.coeff.blocks", None),
    ],
)  # fmt: skip
def test_what_is_meant_is_taken(tmp_path, text, name, value):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    found = flattened(as_tree(load_settings(file)))[name]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("subject.token=#sks", "#sks"), ("subject.class_word=dog #2", "dog #2"), ("subject.class_word=a: b", "a: b"),
        ("subject.token=[V]", "[V]"), ("subject.token=007", "007"), ("subject.token=1e3", "1e3"), ("subject.token=true", "true"),
        ("subject.token='no'", "no"), ("subject.class_word=null", None), ("subject.class_word=", None),
        ("subject.images=2024", "2024"), ("model.variant=null", None), ("training.snr_gamma=null", None),
        ("subject.templates={token}", ["{token}"]), ("validation.prompts=sks: #2", ["sks: #2"]),
        ("validation.prompts=[]", []), ('validation.prompts=["dog #2", cat]', ["dog #2", "cat"]),
        ("validation.prompts=[a, b]", ["a", "b"]), ("validation.seeds=[1, 2]", [1, 2]), ("validation.seeds=7", [7]),
        ("photos.flip=true", True), ("training.masked_loss=false", False), ("training.steps=3", 3), ("training.steps=1e2", 100),
        ("method.lora.alpha=0.5", 0.5), ("training.masked_loss=no", False),
    ],
)  # fmt: skip
def test_what_stands_after_the_equals_sign_is_the_value(assignment, value):
    """No comments, no quotes needed for text; lists, numbers, null and booleans as in YAML."""
    found = flattened(as_tree(load_settings(assignments=[assignment])))[assignment.partition("=")[0]]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("validation.prompts=[dog #2, cat]", "is no list that can be read: put quotes around each text that has one of"),
        ("subject.templates=[V] dog", "is no list that can be read"),
        ("training={steps: 4, steps: 5}", "--set training: steps is there twice; keep one of them."),
        ("training=", "training (given: nothing): it is a section, with settings in it, such as training.steps"),
        ("training.steps=3 # three", "training.steps (given: '3 # three'): it must be a whole number"),
        ("training.nonsense=1", "Unknown setting training.nonsense in the settings. training has steps, batch_size,"),
        ("training.epochs=1", "Did you mean training.steps? Steps are counted, a batch each; there are no epochs."),
        ("trainig.steps=2", "Did you mean training.steps?"),
    ],
)  # fmt: skip
def test_an_assignment_that_would_lose_something_is_refused(assignment, sentence):
    with pytest.raises(ConfigError) as caught:
        load_settings(assignments=[assignment])
    assert sentence in str(caught.value)


def test_what_is_said_later_leaves_the_rest_of_a_section(tmp_path):
    """A section after --set is merged in; whoever is wrong is named, not the file beside it."""
    file = tmp_path / "mine.yaml"
    file.write_text("training.seed: 3\nmethod: {lora.rank: 4, lora: {alpha: 2}}\n")
    settings = load_settings(file, {"method.lora.rank": 8}, ["training={steps: 5}"])
    assert (settings.training.seed, settings.training.steps, settings.method.lora.rank) == (3, 5, 8)
    assert settings.method.lora.alpha == 2
    for name in ("training.sed", "training.seed"):
        with pytest.raises(ConfigError) as caught:
            load_settings(file, None, [f"{name}=x"])
        assert "the settings" in str(caught.value) and "mine.yaml" not in str(caught.value)


def test_a_plan_is_read_like_the_settings(tmp_path):
    """Lists of one, sections without lines, dotted and nested arms, arms that --set changes in either form."""
    file = tmp_path / "plan.yaml"
    file.write_text(
        "seeds: 3\nscales: 0.5\ncheckpoints: 1e1\nmodel:\nsettings:\narms:\n  lora: {method.kind: lora, training.steps: 010}\n"
        "  a.b: {method: {kind: coeff}, training: }\n  8: {method.kind: lora}\n"
    )
    plan = load_section(
        Comparison, file, None, ["arms.a.b.method.kind=token", "arms.lora.training={steps: 7}"]
    )
    assert (plan.seeds, plan.scales, plan.checkpoints, plan.settings) == ([3], [0.5], [10], {})
    trained = {arm: load_settings(None, given) for arm, given in plan.arms.items()}
    assert [settings.method.kind for settings in trained.values()] == ["lora", "token", "lora"]
    assert list(trained) == ["lora", "a.b", "8"] and trained["lora"].training.steps == 7
    file.write_text("arms:\n  lora:\n    training.steps: 5\n    training: {steps: 6}\n")
    with pytest.raises(ConfigError, match=r"arms\.lora\.training\.steps twice, in line 3 and in line 4"):
        load_section(Comparison, file)


def test_text_that_looks_like_something_else_survives_the_file(tmp_path):
    for token in ("no", "007", "1e3", "0o7", "~", "null", "#sks", "12:30", "=", "true"):
        save_settings(given := load_settings(None, {"subject.token": token}), tmp_path / "config.yaml")
        assert load_settings(tmp_path / "config.yaml") == given and given.subject.token == token


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="There is no settings file"):
        load_settings(tmp_path / "absent.yaml")


def test_yamls_traps_are_known():
    """`no` is a precision and not false; 1e-3 without a dot is a number and not text."""
    settings = load_settings(assignments=["training.precision=no", "method.coeff.learning_rate=1e-3"])
    assert settings.training.precision == "no"
    assert settings.method.coeff.learning_rate == 0.001


def test_auto_follows_model_and_device():
    """SDXL on a GPU and a small model on a CPU resolve to the documented values, alpha's rate beside LoRA to three
    times LoRA's, alone to its own."""
    large, chosen = resolve_auto(Settings(), SDXL_ON_A_GPU)
    assert (large.training.steps, large.training.batch_size, large.training.accumulate) == (500, 1, 4)
    assert (large.training.resolution, large.training.precision) == (1024, "bf16")
    assert large.training.gradient_checkpointing is True
    assert (large.method.lora.learning_rate, large.method.coeff.learning_rate) == (1e-4, 3e-4)
    assert (chosen["training.steps"], chosen["method.kind"]) == (500, "coeff+lora")
    small, chosen = resolve_auto(Settings(), SMALL_ON_A_CPU)
    assert (small.training.steps, small.training.batch_size, small.training.accumulate) == (200, 4, 1)
    assert (small.training.resolution, small.training.precision) == (64, "no")
    assert (small.method.lora.learning_rate, small.method.coeff.learning_rate) == (1e-3, 3e-3)
    assert (small.method.kind, chosen["method.kind"]) == ("lora", "lora")
    unused = [
        "method.kind=coeff",
        "method.lora.learning_rate=0.5",
    ]  # LoRA's rate decides nothing without LoRA
    for facts, steps in ((SDXL_ON_A_GPU, 500), (SMALL_ON_A_CPU, 400)):
        alone, chosen = resolve_auto(load_settings(assignments=unused), facts)
        assert (alone.method.coeff.learning_rate, "method.kind" in chosen) == (3e-3, False)
        assert alone.training.steps == steps
    token = load_settings(assignments=["method.kind=token"])
    assert resolve_auto(token, SMALL_ON_A_CPU)[0].training.steps == 200


@pytest.mark.parametrize("setting", ["text_encoders=true", "learning_rate=1e-2", "backend=chunked"])
def test_who_sets_something_of_alpha_gets_alpha(setting):
    """On small models too, whose usual method has none; but not against a method that was asked for."""
    asked = load_settings(assignments=[f"method.coeff.{setting}"])
    assert [resolve_auto(asked, facts)[0].method.kind for facts in (SDXL_ON_A_GPU, SMALL_ON_A_CPU)] == [
        "coeff+lora",
        "coeff+lora",
    ]
    if setting != "text_encoders=true":  # which is refused with a method that has no alpha
        asked = load_settings(assignments=[f"method.coeff.{setting}", "method.kind=lora"])
        assert resolve_auto(asked, SMALL_ON_A_CPU)[0].method.kind == "lora"


def test_alphas_rate_and_loras_scaling_follow_what_was_said():
    """auto: three times LoRA's rate, and a scaling of one whatever the rank."""
    given = load_settings(assignments=["method.lora.learning_rate=5e-4", "method.lora.rank=4"])
    resolved, _ = resolve_auto(given, SDXL_ON_A_GPU)
    assert resolved.method.coeff.learning_rate == 1.5e-3
    assert resolved.method.lora.alpha == 4


def test_text_encoders_learn_at_half_the_rate():
    """Of what the UNet's rates are, given or not; Prodigy takes one factor for all, so that another one is refused."""
    both = {"method.coeff.text_encoders": True, "method.lora.text_encoders": True}

    def rates(**values):
        resolved, _ = resolve_auto(load_settings(None, both | values), SDXL_ON_A_GPU)
        return list(resolved.method.rates.values())[:4]

    assert rates() == [3e-4, 1.5e-4, 1e-4, 5e-5]
    assert rates(**{"method.coeff.learning_rate": 0.01}) == [0.01, 0.005, 1e-4, 5e-5]
    assert rates(**{"method.lora.text_learning_rate": 1e-6}) == [3e-4, 1.5e-4, 1e-4, 1e-6]
    prodigy = {"training.optimizer": "prodigy"}
    assert rates(**prodigy) == [1.0] * 4
    with pytest.raises(ConfigError, match=r"one factor for all .* method.lora.text_learning_rate is 0.5"):
        rates(**prodigy, **{"method.lora.text_learning_rate": 0.5})


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


def test_an_empty_mapping_takes_the_place_of_an_earlier_one():
    """As of an arm of a comparison that has none of the optimizer's arguments that all have."""
    every, own = {"training": {"optimizer_args": {"eps": 1e-6}}}, {"training.optimizer_args": {}}
    assert with_values(Settings(), flattened(every)).training.optimizer_args == {"eps": 1e-6}
    assert with_values(Settings(), flattened(every) | flattened(own)).training.optimizer_args == {}
    assert differences(Settings(), with_values(Settings(), flattened(every))) == {
        "training.optimizer_args": ({}, {"eps": 1e-6})
    }


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
