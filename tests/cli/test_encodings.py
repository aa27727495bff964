"""What is printed reaches any terminal and pipe: no letter that it lacks ends a command."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forking import Fork
from PIL import Image

import coeffdiff
from coeffdiff.hosts.diffusers import save_adapter
from coeffdiff.hosts.unet import inject
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.pocket.model import save_random

TOKEN, WORD = "чайник", "猫"
WORKER = """
import sys, json, traceback
from coeffdiff import cli
from coeffdiff.training import run_summary
from coeffdiff.utils import console
sys.modules["coeffdiff.cli.root"].be_lenient = lambda: None  # every way of printing is to hold by itself
run_summary.TIMING_SECONDS = 0.0
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        code = traceback.format_exc()
    sys.stdout.flush()
    print("END " + json.dumps([arguments[0], code]), file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def shop(built_micro, tmp_path_factory) -> Path:
    """A folder in which everything has a name in other letters: model, photos, adapter."""
    folder = tmp_path_factory.mktemp("лавка")
    model = save_random("micro", folder / "модель")
    (folder / "写真").mkdir()
    for number in range(2):
        picture = Image.radial_gradient("L").resize((64, 64)).rotate(90 * number).convert("RGB")
        picture.putpixel((0, 0), (number, 9, 9))
        picture.save(folder / f"写真/фото{number}.png")
    (folder / "写真/фото0.txt").write_text(f"a {TOKEN} {WORD} 🦥", encoding="utf-8")
    (folder / "写真/пусто.png").write_bytes(b"")
    unet = built_micro.unet.__class__.from_pretrained(model / "unet")
    layers = inject(unet)
    with torch.no_grad():
        for coefficients in layers.values():
            coefficients.alpha.fill_(0.01)
    header = AdapterHeader(
        format_version=1, kind="coeff", base_model=str(model), token=TOKEN, class_word=WORD,
        heads={name: c.heads for name, c in layers.items()}, trained_steps=7, resolution=64,
    )  # fmt: skip
    save_adapter(folder / "адаптер", unet, header)
    with torch.no_grad():
        for coefficients in layers.values():
            coefficients.alpha.fill_(0.02)
    save_adapter(folder / "второй", unet, header.model_copy(update={"token": f"{TOKEN}2"}))
    return folder


def commands(shop: Path, vit: str, clip: str) -> list[list[str]]:
    subject = ["--images", "写真", "--token", TOKEN, "--class-word", WORD, "--model", "модель"]
    drawing = ["--prompt", f"a photo of <V> {WORD}", "--adapter", "адаптер", "--steps", "1"]
    scoring = [
        "--dino",
        vit,
        "--clip",
        clip,
        "-n",
        "1",
        "--drift-pictures",
        "0",
        "--limit",
        "1",
        "--steps",
        "1",
    ]
    quick = ["--method", "coeff+lora", "--steps", "1", "--set", "validation.prompts=[]"]
    return [
        ["check", *subject],
        ["check", *subject, "--json"],
        ["inspect", "адаптер"],
        ["inspect", "адаптер", "--json"],
        ["merge", "адаптер", "второй:0.5", "--model", "модель", "--output", "итог"],
        ["sample", *drawing, "--output", "картины"],
        ["train", *subject, *quick, "--output", "ход"],
        ["evaluate", "адаптер", "--images", "写真", *scoring, "--output", "оценка"],
        ["toy", "--output", "игра", "--seeds", "1", "--steps", "1", "--restarts", "1"],
        ["train", "--list-settings"],
        ["compare", "--list-settings"],
        ["--version"],
        ["check", "--help"],
        ["sample", f"--{WORD}"],
        ["inspect", "нет"],
        ["train", *subject, "--output", "写真"],
    ]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "C"])
def test_every_command_ends_well_whatever_letters_the_output_has(encoding, shop, vit, clip, tmp_path):
    """Streams in ASCII, in Windows' encoding, and in the C locale without Python's own way around it.

    The locale is a matter of a process's first moment, and the others' streams are all that they differ in: these fork.
    """
    for name in ("модель", "写真", "адаптер", "второй"):
        (tmp_path / name).symlink_to(shop / name)
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    if encoding == "C":
        env |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:surrogateescape"}
    else:
        env |= {"PYTHONIOENCODING": encoding}
    asked = commands(shop, vit, clip)
    if encoding != "ascii":  # without what computes long and prints as the others do
        long = ("train", "evaluate", "toy", "merge")
        asked = [one for one in asked if one[0] not in long and "--json" not in one]
    if encoding == "C":
        command = [sys.executable, "-c", WORKER, json.dumps(asked)]
        ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=600)
        answered, complained = ended.stdout, ended.stderr
    else:
        process = Fork("-c", WORKER, json.dumps(asked), cwd=tmp_path, env=env)
        process.wait(600)
        answered, complained = process.printed()
    said = complained.decode("ascii" if encoding != "cp1252" else "cp1252")
    codes = [json.loads(line[4:]) for line in said.splitlines() if line.startswith("END ")]
    assert [name for name, _ in codes] == [arguments[0] for arguments in asked], said[-3000:]
    for arguments, (_, code) in zip(asked, codes, strict=True):
        mistakes = (f"--{WORD}", "нет") if arguments[0] in ("sample", "inspect") else ()
        wrong = any(m in arguments for m in mistakes) or arguments[-1] == "写真"
        assert code == (2 if wrong else 0), f"{arguments} ended with {code}:\n{said}"
    assert "картины".encode() in answered  # a path stays exact, for the program behind the pipe
    assert b"\\u0447\\u0430\\u0439" in answered  # and a text is written out
    for line in answered.splitlines():
        if line.startswith(b"{"):
            json.loads(line.decode("ascii"))


# Everything that writes to a terminal past console.py
_PRINTING = {"print", "pprint", "Console"}
_STREAMS = {("sys", "stdout"), ("sys", "stderr"), ("typer", "echo"), ("typer", "secho"), ("click", "echo")}


def bare_prints(source: str) -> list[int]:
    """Lines that print by themselves."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in _PRINTING:
            found.append(node.lineno)
        if isinstance(node, ast.Attribute) and (getattr(node.value, "id", ""), node.attr) in _STREAMS:
            found.append(node.lineno)
    return found


def test_nothing_prints_but_the_console():
    folder = Path(coeffdiff.__file__).parent
    found = {
        file.relative_to(folder).as_posix(): lines
        for file in sorted(folder.rglob("*.py"))
        if (lines := bare_prints(file.read_text(encoding="utf-8"))) and file.name != "console.py"
    }
    assert found == {}


@pytest.mark.parametrize(
    "source", ["print(1)", "import sys; sys.stdout.write('a')", "Console().print(1)", "typer.echo('a')"]
)
def test_the_search_finds_every_way(source):
    assert bare_prints(source) == [1]
