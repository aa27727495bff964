"""The command line as a person meets it: answers, one-sentence mistakes, nothing half-written."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from PIL import Image
from rich.text import Text
from safetensors import safe_open
from typer.main import get_command
from typer.testing import CliRunner

from coeffdiff import __version__
from coeffdiff.cli.adapters import folder_and_scale
from coeffdiff.cli.options import expanded_path, expanded_text
from coeffdiff.cli.root import app, main
from coeffdiff.config.documentation import documented_settings
from coeffdiff.errors import AdapterError, KernelsUnused
from coeffdiff.models.finding import find_backbone
from coeffdiff.pocket.model import save_random

QUICK = [
    "--method",
    "coeff+lora",
    "--steps",
    "2",
    "--set",
    "training.batch_size=1",
    "--set",
    "validation.prompts=[]",
    "--set",
    "method.lora.rank=2",
]


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with a tiny model, photos, and one finished run of token sks."""
    folder = tmp_path_factory.mktemp("trained")
    save_random("micro", folder / "model")
    (folder / "photos").mkdir()
    for i in range(2):
        Image.radial_gradient("L").resize((70, 64)).convert("RGB").rotate(45 * i).save(
            folder / f"photos/{i}.jpg"
        )
    arguments = [
        "train",
        "--model",
        str(folder / "model"),
        "--images",
        str(folder / "photos"),
        "--token",
        "sks",
    ]
    every = ["--set", "training.checkpoint_every=1"]
    result = call(*arguments, "--class-word", "ball", "--output", str(folder / "runs/sks"), *QUICK, *every)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def call(*arguments: str):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def train(folder: Path, *more: str):
    subject = ["--images", str(folder / "photos"), "--token", "sks"]
    return call("train", "--model", str(folder / "model"), *subject, *QUICK, *more)


@pytest.mark.parametrize(
    ("command", "text"), [("batch", "coeffdiff[ray]"), ("sample", "user/repo[@revision]")]
)
def test_help_keeps_square_brackets(command, text):
    """Rich takes them for markup."""
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    assert text in shown


def test_no_help_has_brackets_that_rich_would_take():
    for name, command in get_command(app).commands.items():
        for parameter in command.params:
            told = getattr(parameter, "help", None) or ""
            assert Text.from_markup(told).plain == told.replace("\\[", "["), f"{name} {parameter.name}"


def test_help_answers_without_loading_what_is_slow():
    """`coeffdiff --help` imports neither torch nor diffusers."""
    slow = "{'torch', 'diffusers', 'transformers', 'PIL'}"
    code = (
        "import sys; from coeffdiff.cli import app; from typer.testing import CliRunner; "
        f"r = CliRunner().invoke(app, ['train', '--help']); assert r.exit_code == 0; assert not {slow} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_how_threads_wait_is_chosen_before_torch_is_loaded():
    """Afterwards libgomp would no longer hear it; what the user chose stays."""
    code = (
        "import os, sys; from coeffdiff import cli; sys.argv = ['coeffdiff', 'train']\n"
        "app = sys.modules['coeffdiff.cli.root']\n"
        "app.choose_waiting = lambda choose=app.choose_waiting: (print('torch' in sys.modules), choose(), sys.exit())\n"
        "try: cli.main()\n"
        "except SystemExit: print(os.environ['OMP_WAIT_POLICY'])"
    )
    for given, heard in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        }
        environment |= {"OMP_WAIT_POLICY": given} if given else {}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.split() == ["False", heard], done.stderr


def test_warnings_of_ours_are_said_and_those_of_libraries_are_not(monkeypatch, capsys):
    """Whatever module they are laid to; as a line of the tool's own."""

    def warn_twice():
        for category in (KernelsUnused, UserWarning, RuntimeWarning, DeprecationWarning):
            for module in ("coeffdiff.method.verified", "transformers.models"):
                warnings.warn_explicit(f"{category.__name__} in {module}", category, "x.py", 1, module=module)

    monkeypatch.setattr(sys.modules["coeffdiff.cli.root"], "app", warn_twice)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        monkeypatch.setattr(sys, "warnoptions", [])
        main()
    assert capsys.readouterr().err.splitlines() == [
        "warning  KernelsUnused in coeffdiff.method.verified", "warning  KernelsUnused in transformers.models",
    ]  # fmt: skip


def test_the_command_and_the_module_are_one():
    """`python -m coeffdiff --version`, as accelerate launch -m starts it."""
    done = subprocess.run([sys.executable, "-m", "coeffdiff", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"coeffdiff {__version__}"


def test_every_setting_can_be_looked_up():
    """--list-settings names each setting there is."""
    listed = call("train", "--list-settings").stdout
    assert all(f"\n{setting.name}  [" in f"\n{listed}" for setting in documented_settings())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--images", "nowhere"], "PhotoError: There is no"),
        (["--images", "empty"], "PhotoError"),
        (["--images", "note.txt"], "PhotoError"),
        (["--images", "photos", "--model", "nowhere/at/all"], "ModelError"),
        (["--images", "photos", "--model", "photos"], "ModelError"),
        (["--images", "photos", "--set", "training.stesp=3"], "Did you mean training.steps?"),
        (["--images", "photos", "--config", "typo.yaml"], "Did you mean training.steps?"),
        (["--images", "photos", "--config", "absent.yaml"], "ConfigError: There is no settings file"),
        (["--images", "photos", "--resolution", "100"], "multiple of 8"),
        (
            ["--images", "photos", "--output", "note.txt"],
            "--output note.txt is a file, and a folder is wanted",
        ),
        (["--images", "photos", "--resume"], "ResumeError: There is no run to resume"),
        (
            ["--images", "photos", "--set", "method.coeff.blocks=[up_blocks.7]"],
            "No attention layer lies in block",
        ),
        (
            ["--images", "photos", "--set", "method.lora.targets=[to_x]"],
            "no attention layer has a linear 'to_x'",
        ),
        (
            ["--images", "photos", "--set", "method.coeff.backend=fast"],
            "There is no attention backend 'fast'",
        ),
        (["--images", "photos", "--set", "subject.templates=['a {thing}']"], "ConfigError"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(trained, arguments, sentence):
    """Exit code 2, one line that says what is wrong, no run folder."""
    Path("empty").mkdir()
    Path("note.txt").write_text("a note")
    Path("typo.yaml").write_text("training: {stepz: 3}\n")
    Path("photos").symlink_to(trained / "photos")
    model = [] if "--model" in arguments else ["--model", str(trained / "model")]
    result = call("train", "--token", "sks", *model, *QUICK, *arguments)
    assert result.exit_code == 2, result.output
    mistake = [line for line in result.stderr.splitlines() if "Error: " in line]
    assert len(mistake) == 1, result.stderr
    assert sentence in mistake[0]
    assert not Path("runs").exists()
    assert Path("note.txt").read_text() == "a note"


@pytest.mark.parametrize(
    "arguments",
    [["trian"], ["train", "photos"], ["train", "--method", "magic"], ["train", "--steps", "many"]],
)
def test_a_slip_of_the_fingers_is_exit_code_2(arguments):
    """Unknown commands, stray arguments and wrong option values: usage and exit code 2."""
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.fixture
def home(tmp_path, monkeypatch, trained) -> Path:
    """A home folder beside the current one, with all that a command may be pointed to."""
    monkeypatch.setenv("HOME", str(home := tmp_path / "home"))
    (home / "runs").mkdir(parents=True)
    for name in ("model", "photos", "runs/sks"):
        (home / name).symlink_to(trained / name)
    (home / "prompts.txt").write_text("a <V> ball\n")
    (home / "my.yaml").write_text("photos.cache: ~/cached\n")
    (home / "plan.yaml").write_text("subjects: ~/absent/photos\n")
    monkeypatch.chdir(tmp_path)
    return home


@pytest.mark.parametrize(
    ("command", "made"),
    [
        ("train --model ~/model --images ~/photos --token sks --config=~/my.yaml --output=~/runs/new", "runs/new/adapter"),
        ("train --set model.name=~/model --set subject.images=~/photos --token sks --set output=~/new", "new/adapter"),
        ("sample --adapter ~/runs/sks:0.5 --model ~/model --prompts-file=~/prompts.txt --steps 1 --output=~/drawn",
         "drawn/001-a-sks-ball-seed0.png"),
        ("inspect ~/runs/sks --output=~/seen", "seen/alpha.png"),
        ("merge ~/runs/sks:0.5 ~/runs/sks@1:0.5 --model ~/model --output=~/both", "both/coeff.safetensors"),
        ("export ~/runs/sks --output=~/lora.safetensors", "lora.safetensors"),
        ("export ~/absent --output=~/lora.safetensors", "There is no adapter HOME/absent"),
        ("check --images ~/absent --token sks", "There is no folder HOME/absent"),
        ("check --images ~/photos --token sks --model ~/absent", "There is no model folder or file HOME/absent"),
        ("check --images ~/photos --token sks --model ~/model --set model.vae=~/absent", "HOME/absent"),
        ("sample --prompt a --adapter none --model ~/absent", "There is no model folder or file HOME/absent"),
        ("sample --prompt a --adapter ~/absent:2", "There is no adapter HOME/absent"),
        ("sample --prompts-file ~/absent", "The prompts file HOME/absent cannot be read"),
        ("train --config ~/absent", "There is no settings file HOME/absent"),
        ("evaluate ~/absent", "HOME/absent"),
        ("evaluate ~/runs/sks --model ~/model --images ~/absent", "There is no folder HOME/absent"),
        ("evaluate ~/runs/sks --model ~/absent", "There is no model folder or file HOME/absent"),
        ("evaluate ~/runs/sks --model ~/model --dino ~/absent --clip ~/absent", "HOME/absent is neither a folder"),
        ("compare ~/absent", "There is no settings file HOME/absent"),
        ("compare ~/plan.yaml", "There are no subjects 'HOME/absent/photos'"),
        ("compare --subjects ~/absent", "There are no subjects 'HOME/absent'"),
        ("compare --output=~/prompts.txt", "HOME/prompts.txt is a file"),
        ("train --resume --output ~/absent", "HOME/absent holds no run to resume"),
    ],
    ids=lambda value: value[:60],
)  # fmt: skip
def test_home_is_expanded_in_every_option(home, command, made):
    """What is made lies in the home folder, what is missing is looked for there; no folder is ever called ~."""
    words = command.split()
    result = call(*words, *(QUICK if words[0] == "train" else []))
    if result.exit_code:
        assert made.replace("HOME", str(home)) in result.stderr, result.output
    else:
        assert (home / made).exists(), result.output
    assert ("HOME" in made or "home" in made) == bool(result.exit_code)
    assert not [path for path in home.parent.iterdir() if path.name.startswith("~")]


@pytest.mark.parametrize(
    "command",
    [
        "train --images $HOME/photos --token sks", "train --images photos --token sks --output %USERPROFILE%/a",
        "sample --adapter $HOME/runs/sks --prompt a", "inspect ${HOME}/runs/sks", "toy --output $HOME/toy",
        "merge a b --output $HOME/both", "compare --set subjects=$HOME/photos", "evaluate a --output $HOME/e",
        "train --set output=$HOME/a --images photos --token sks", "demo --output $HOME/demo",
    ],
)  # fmt: skip
def test_variables_are_not_expanded_and_that_is_said(command):
    result = call(*command.split())
    assert result.exit_code == 2 and "ConfigError: " in result.stderr
    assert "it does not exist, and variables of the environment such as" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and list(Path().iterdir()) == []


def test_no_option_forgets_its_home():
    """Every option that is a path, or text that may be one, goes through the same parser; the rest is listed here."""
    words = {
        "token",
        "class_word",
        "prompt",
        "scales",
        "negative_prompt",
        "scheduler",
        "set_",
        "subject",
        "arm",
        "seeds",
        "part",
        "repo",
        "licence",
        "message",
        "device",
        "lora_target",
        "text_column",
        "label_column",
        "score",  # settings, as set_
        "ray_address",
        "host",
    }
    forgotten = []
    for command in app.registered_commands:
        for name, hint in get_type_hints(inspect.unwrap(command.callback), include_extras=True).items():
            if name == "return" or name in words:
                continue
            kind, info = get_args(hint)
            texts = {str, Path}.intersection(
                [kind, *get_args(kind), *(i for k in get_args(kind) for i in get_args(k))]
            )
            if texts and info.parser not in (expanded_path, expanded_text):
                forgotten.append((command.callback.__name__, name))
    assert forgotten == []


def test_a_mistake_on_another_machine_is_said_there(trained, monkeypatch):
    """Photos that only rank 1 lacks: that rank names itself and the mistake."""

    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("coeffdiff.training.plan.start_processes", lambda: None)  # as if rank 0 had come
    result = call("train", "--model", str(trained / "model"), "--images", "nowhere", "--token", "sks")
    assert result.exit_code == 2
    assert result.stderr.startswith("[rank 1] PhotoError: There is no")


def test_a_wrong_option_is_found_before_the_weights_are_read(trained, monkeypatch):
    """A scheduler that does not exist, steps beyond the model's: load_pipeline is never asked for the networks."""
    from coeffdiff.models.loading import load_pipeline

    real, asked = load_pipeline, []

    def spy(base, *, dtype, parts=None):
        asked.append(parts)
        return real(base, dtype=dtype, parts=parts)

    monkeypatch.setattr("coeffdiff.sampling.session.load_pipeline", spy)
    for wrong in (["--scheduler", "eulr"], ["--steps", "1001"], ["--width", "60"]):
        assert (
            call("sample", "--prompt", "sks", "--adapter", str(trained / "runs/sks"), *wrong).exit_code == 2
        )
    assert set(asked) <= {()}


def test_runs_are_counted_up_and_said(trained):
    """Two runs of one token: runs/sks and runs/sks-2, both announced, none overwritten."""
    first, second = train(trained), train(trained)
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert first.stdout.strip() == "runs/sks/adapter"
    assert second.stdout.strip() == "runs/sks-2/adapter"
    assert "run      runs/sks-2" in second.stderr
    refused = train(trained, "--output", "runs/sks")
    assert refused.exit_code == 2
    assert "runs/sks holds a run; continue it with --resume" in refused.stderr


def test_json_is_all_there_is_on_stdout(trained):
    """A program reads stdout; everything for people goes to stderr."""
    answer = json.loads(train(trained, "--json").stdout)
    assert answer["adapter"] == "runs/sks/adapter"
    assert answer["steps"] == 2
    assert answer["loss"] > 0


def test_what_was_found_and_chosen_is_said_first(trained, whole_runs):
    """Photos left out by name and reason, the missing class word's cost, every auto value, the run folder."""
    (photos := Path("photos")).mkdir()
    for file in (trained / "photos").iterdir():
        (photos / file.name).write_bytes(file.read_bytes())
    (photos / "torn.jpg").write_bytes((photos / "0.jpg").read_bytes()[:300])
    (photos / ".DS_Store").write_bytes(b"\0")
    result = call("train", "--model", str(trained / "model"), "--images", "photos", "--token", "sks", *QUICK)
    assert result.exit_code == 0
    assert "photos   2 in photos" in result.stderr
    assert "torn.jpg" in result.stderr
    assert "0.303 without" in result.stderr
    assert "training.resolution 64" in result.stderr
    assert (photos / "torn.jpg").exists()


def test_sample_takes_the_newest_finished_run_and_names_it(trained, monkeypatch):
    """Only a prompt: the adapter, its base model and its token come from the run."""
    monkeypatch.chdir(trained)
    result = call(
        "sample",
        "--prompt",
        "a photo of <V> ball",
        "--steps",
        "2",
        "-n",
        "2",
        "--output",
        "pictures",
        "--json",
    )
    assert result.exit_code == 0, result.output
    assert "runs/sks (the newest finished one)" in result.stderr
    answer = json.loads(result.stdout)
    assert all(Path(file).is_file() for file in answer["files"])
    assert len(answer["files"]) == 3  # two pictures and their grid
    picture = Image.open(answer["files"][0])
    recipe = json.loads(picture.info["coeffdiff"])
    assert recipe["prompt"] == "a photo of sks ball"
    assert recipe["seed"] == 0
    assert picture.size == (64, 64)


def test_scale_0_and_no_adapter_give_the_same_picture(trained):
    """`DIR:0` is the base model bit for bit; scale 1 is not."""
    pixels = {}
    for name in (f"{trained / 'runs/sks'}:0", "none", f"{trained / 'runs/sks'}:1"):
        folder = f"out-{len(pixels)}"
        common = [
            "--prompt",
            "sks ball",
            "--steps",
            "2",
            "--output",
            folder,
            "--model",
            str(trained / "model"),
        ]
        result = call("sample", "--adapter", name, *common, "--json")
        assert result.exit_code == 0, result.output
        pixels[name] = Image.open(json.loads(result.stdout)["files"][0]).tobytes()
    zero, none, one = pixels.values()
    assert zero == none
    assert one != none


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "There is nothing to draw"),
        (["--prompt", "a"], "AdapterError"),
        (["--prompt", "a", "--adapter", "nowhere"], "AdapterError: There is no adapter nowhere"),
        (["--prompts-file", "nowhere.txt"], "ConfigError: The prompts file nowhere.txt cannot be read"),
        (["--prompt", "a", "--adapter", "RUN:strong"], "the scale 'strong' is not a number"),
        (["--prompt", "a", "--adapter", "RUN", "--scheduler", "eulr"], "ConfigError"),
        (["--prompt", "a", "--adapter", "RUN", "--width", "65"], "ConfigError"),
        (["--prompt", "a", "--adapter", "RUN", "--offload", "model"], "ConfigError"),
        (["--prompt", "a", "--adapter", "none", "--model", "nowhere"], "ModelError"),
        (["--prompt", "<V>", "--adapter", "none", "--model", "MODEL"], "ConfigError"),
        (["--prompt", "a", "--adapter", "RUN", "--scales", "0;1"], "--scales takes numbers with commas"),
        (["--prompt", "a", "--adapter", "RUN", "--scales", "0,inf"], "such as 0,0.5,1; not '0,inf'"),
        (["--prompt", "a", "--adapter", "RUN", "--scales", ""], "--scales takes numbers with commas"),
        (["--prompt", "a", "--adapter", "none", "--scales", "0,1"], "--scales needs an adapter"),
        (["--prompt", "a", "--adapter", "RUN:0.5", "--scales", "0,1"], "leave one of them out"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_a_mistake_in_sampling_is_one_sentence_and_leaves_nothing(trained, arguments, sentence):
    """Exit code 2, one line, no folder of pictures."""
    known = {"RUN": str(trained / "runs/sks"), "MODEL": str(trained / "model")}
    arguments = [known.get(a, a.replace("RUN:", known["RUN"] + ":")) for a in arguments]
    result = call("sample", *arguments)
    assert result.exit_code == 2, result.output
    mistake = [line for line in result.stderr.splitlines() if "Error: " in line]
    assert len(mistake) == 1, result.stderr
    assert sentence in mistake[0]
    assert not Path("samples").exists()


def test_scales_make_one_labelled_grid(trained, monkeypatch):
    """--scales 0,1 of the newest run: two pictures of one seed, unlike each other, and said so."""
    monkeypatch.chdir(trained)
    result = call(
        "sample", "--prompt", "<V> ball", "--scales", "0,1,0", "--steps", "2", "--output", "swept", "--json"
    )
    assert result.exit_code == 0, result.output
    assert "adapter  runs/sks/adapter at scales 0,1 (coeff+lora" in result.stderr
    *files, grid = json.loads(result.stdout)["files"]
    assert [Path(file).name for file in files] == [
        "001-sks-ball-seed0-scale0.png",
        "002-sks-ball-seed0-scale1.png",
    ]
    pictures = [Image.open(file) for file in files]
    assert [json.loads(p.info["coeffdiff"])["adapters"][0]["scale"] for p in pictures] == [0.0, 1.0]
    assert pictures[0].tobytes() != pictures[1].tobytes()
    assert Path(grid).name == "grid.png"


def test_a_control_that_mixes_values_goes_all_the_way(trained):
    """Trained by a setting, sampled and looked at by commands that know nothing of it; scale 0 is the base model."""
    settings = ["--set", "method.coeff.mixes=values", "--set", "method.coeff.learning_rate=0.3"]
    result = train(trained, "--method", "coeff", *settings, "--output", "control")
    assert result.exit_code == 0, result.output
    found = {}
    for adapter in ("control:0", "none", "control"):
        drawn = call("sample", "--adapter", adapter, "--prompt", "sks", "--model", str(trained / "model"),
                     "--steps", "2", "--json")  # fmt: skip
        assert drawn.exit_code == 0, drawn.output
        found[adapter] = Image.open(json.loads(drawn.stdout)["files"][0]).tobytes()
    assert found["control:0"] == found["none"] != found["control"]
    assert "(coeff, mixing values, 2 steps, token sks)" in drawn.stderr
    seen = call("inspect", "control", "--output", "seen")
    assert seen.exit_code == 0 and "coeff, mixing values" in seen.stdout
    assert Path("seen/alpha.png").exists()


def test_inspect_reads_the_newest_run_and_loads_no_model(trained, monkeypatch, replace_everywhere):
    """Tables for people, JSON for programs, a picture on demand; the base model is not even looked for."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("inspect asked for a model")

    replace_everywhere(find_backbone, refuse)
    monkeypatch.chdir(trained)
    result = call("inspect")
    assert result.exit_code == 0, result.output
    assert "runs/sks (the newest finished one)" in result.stderr
    assert "How far alpha moved" in result.stdout and "LoRA: norm of the weight change" in result.stdout
    answer = json.loads(call("inspect", "runs/sks", "--json", "--output", "seen").stdout)
    assert answer["header"]["token"] == "sks" and answer["alpha_parameters"] > 0 < answer["lora_parameters"]
    assert Image.open(answer["heat_maps"]).width > 300
    assert call("inspect", "runs/sks", "--output", "seen").stdout.splitlines()[-1] == "seen/alpha-2.png"


def test_merge_writes_an_adapter_that_samples(trained):
    """An adapter and a millionth of its earlier step are that adapter: the same picture within 2/255."""
    run = str(trained / "runs/sks")
    result = call("merge", f"{run}:1", f"{run}@1:1e-6", "--output", "whole")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == "whole"
    assert "part     sks x 1 (coeff+lora, 2 steps)" in result.stderr
    pixels = []
    for adapter in (run, "whole"):
        drawn = call("sample", "--adapter", adapter, "--prompt", "<V>", "--steps", "2", "--json")
        assert drawn.exit_code == 0, drawn.output
        pixels.append(Image.open(json.loads(drawn.stdout)["files"][0]))
    assert max(abs(a - b) for a, b in zip(*(p.tobytes() for p in pixels), strict=True)) <= 2


def test_export_names_its_files_and_what_it_leaves_out(trained):
    """One file on stdout, alpha named on stderr, and the run's own seed and steps in the metadata."""
    run = str(trained / "runs/sks")
    result = call("export", run, "--output", "mine.safetensors")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == "mine.safetensors" and "layers is left out" in result.stderr
    with safe_open("mine.safetensors", "pt") as opened:
        facts = opened.metadata()
    assert (facts["ss_seed"], facts["ss_max_train_steps"], facts["ss_network_dim"]) == ("0", "2", "2")
    assert facts["ss_sd_model_name"] == "model"
    answer = json.loads(call("export", run, "--output", "b.safetensors", "--json").stdout)
    assert answer["lora"] == "b.safetensors" and answer["embedding"] is None and len(answer["left_out"]) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect"], "AdapterError: There is no finished run under runs"),
        (["inspect", "nowhere"], "AdapterError: There is no adapter nowhere"),
        (["inspect", "none"], "AdapterError: There is no adapter none"),
        (
            ["inspect", "RUN", "--output", "note.txt"],
            "ConfigError: --output note.txt is a file",
        ),
        (["export", "nowhere", "--output", "a.safetensors"], "AdapterError: There is no adapter nowhere"),
        (["export", "RUN", "--output", "a.pt"], "ConfigError: --output a.pt must end in .safetensors"),
        (["export", "RUN", "--output", "."], "ConfigError: --output . is a folder"),
        (["merge", "RUN", "--output", "m"], "AdapterError: Merging takes at least two adapters"),
        (["merge", "RUN:much", "RUN", "--output", "m"], "the scale 'much' is not a number"),
        (["merge", "RUN", "nowhere:2", "--output", "m"], "AdapterError: There is no adapter nowhere"),
        (["merge", "RUN", "RUN", "--output", "note.txt"], "ConfigError: --output note.txt is a file"),
        (
            ["merge", "RUN", "RUN", "--output", "note.txt/m"],
            "ConfigError: --output note.txt/m cannot be a folder, since note.txt is a file",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_about_adapters_is_one_sentence_and_leaves_nothing(trained, arguments, sentence):
    """Exit code 2, one line, nothing written."""
    Path("note.txt").write_text("a note")
    result = call(*(a.replace("RUN", str(trained / "runs/sks")) for a in arguments))
    assert result.exit_code == 2, result.output
    mistake = [line for line in result.stderr.splitlines() if "Error: " in line]
    assert len(mistake) == 1, result.stderr
    assert sentence in mistake[0]
    assert [path.name for path in Path().iterdir()] == ["note.txt"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 20971520 bytes."),
    ],
    ids=["GPU", "CPU"],
)
def test_sampling_without_memory_names_what_is_left_to_turn(trained, error, monkeypatch):
    """At batch 2 in fp32 and 64 x 64: a smaller batch, half precision and 8 bits; offloading needs a GPU, and none is here."""

    def fails(*_args, **_options):
        raise error

    monkeypatch.setattr("coeffdiff.sampling.drawing.write_pictures", fails)
    options = ["--prompt", "a", "--adapter", str(trained / "runs/sks"), "--batch-size", "2", "--steps", "1"]
    result = call("sample", *options, "--precision", "fp32")
    assert result.exit_code == 2
    where = "The GPU" if "CUDA" in str(error) else "This machine"
    switches = [
        "--batch-size 1",
        "--precision bf16",
        *(["--offload model"] if torch.cuda.is_available() else []),
        "--quantize int8",
    ]
    assert result.stderr.splitlines()[-1] == (
        f"OutOfMemory: {where} has too little memory for this (20.{'00' if 'CUDA' in str(error) else '0'} MiB more were "
        f"asked for). In this order: {'; '.join(switches)}."
    )


@pytest.mark.parametrize(
    ("command", "where"), [("classify", "classify.classify"), ("image-text", "image_text.open_bench")]
)
@pytest.mark.parametrize(
    ("batch", "said"), [(32, "In this order: --batch-size 16."), (1, "End other programs")]
)
def test_the_other_tasks_without_memory_name_what_is_left(command, where, batch, said, tmp_path, monkeypatch):
    def fails(*_args, **_options):
        raise MemoryError

    monkeypatch.setattr(f"coeffdiff.tasks.{where}", fails)
    result = call(
        command, str(tmp_path), "--model", "some/model", "--batch-size", str(batch), "--output", "out"
    )
    assert result.exit_code == 2
    assert "OutOfMemory: This machine has too little memory for this. " + said in result.stderr


def test_a_name_that_is_too_long_for_the_system_is_one_sentence():
    """Wherever it is met first: what a system refuses is no defect of a program's."""
    for arguments in (
        ["sample", "--prompt", "a", "--adapter", "x" * 5000],
        ["train", "--token", "a", "--images", "x" * 5000],
    ):
        result = call(*arguments)
        assert result.exit_code == 2
        assert "File name too long" in result.stderr


def test_a_scale_is_what_follows_the_last_colon(tmp_path):
    """runs/sks:0.6 and C:\\runs\\sks:0.6 have one; a folder whose own name ends so does not."""
    (tmp_path / "a:1").mkdir()
    assert folder_and_scale("runs/sks:0.6") == ("runs/sks", 0.6)
    assert folder_and_scale("C:\\runs\\sks:0.6") == ("C:\\runs\\sks", 0.6)
    assert folder_and_scale("runs/sks") == ("runs/sks", None)
    assert folder_and_scale(str(tmp_path / "a:1")) == (str(tmp_path / "a:1"), None)
    with pytest.raises(AdapterError, match="'much' is not a number"):
        folder_and_scale(f"{tmp_path}:much")
