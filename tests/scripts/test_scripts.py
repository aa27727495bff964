"""The scripts that a person runs, as a person runs them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from forking import fork_run

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_photos_are_made_as_an_ordinary_folder(tmp_path, run):
    """Three JPEGs of the plushie sloth, which the photo reader takes without a complaint."""
    from coeffdiff.data.photos import read_photos

    done = run("make_photos.py", "--output", "photos", "--count", "3", "--resolution", "64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = read_photos(tmp_path / "photos")
    assert [photo.path.name for photo in found.photos] == ["00.jpg", "01.jpg", "02.jpg"]
    assert not found.skipped
    assert {(photo.width, photo.height) for photo in found.photos} == {(64, 64)}


def test_two_hundred_hostile_adapters_are_refused_or_load(tmp_path, forked):
    """Each of 200 inputs loads and verifies or meets the one error, in bounded memory and time; all kinds occur."""
    done = forked("fuzz_adapter.py", "--size", "micro", "--count", "200", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert (done.returncode, found["crashes"]) == (0, []), done.stderr
    assert found["inputs"] == sum(found["outcomes"].values()) == 200
    assert set(found["outcomes"]) == {"loads", "AdapterError", "AdapterMismatch"}
    assert found["outcomes"]["loads"] > 20
    assert len(found["changes"]) == 10


def test_the_fuzz_run_notices_what_it_looks_for(tmp_path, run):
    """A loader that raises, dies, hangs, hoards, lies or leaves something behind: each is a crash, and exit code 1."""
    wrong = """
import os, signal, sys, time
from coeffdiff.hosts import diffusers, unet
from coeffdiff.errors import AdapterError
real, calls = diffusers.load_adapter, []
def load(pipe, folder):
    calls.append(1)
    if "--worker" not in sys.argv or len(calls) <= 4:
        return real(pipe, folder)
    number = int(sys.argv[sys.argv.index("--range") + 1]) + len(calls) - 5
    if number == 0: raise KeyError("weight")
    if number == 1: os.kill(os.getpid(), signal.SIGSEGV)
    if number == 2: bytearray(2**31)
    if number == 3: raise AdapterError("\x1b[2J")
    if number == 4:
        unet.inject(pipe.unet)
        raise AdapterError("no")
    if number == 5: signal.alarm(1); time.sleep(60)
    raise AdapterError("refused")
diffusers.load_adapter = load
exec(compile(open(SCRIPT).read(), SCRIPT, "exec"), {"__name__": "__main__", "__file__": SCRIPT})
"""
    script = tmp_path / "wrong.py"
    script.write_text(wrong.replace("SCRIPT", repr(str(SCRIPTS / "fuzz_adapter.py"))))
    done = fork_run(str(script), "--size", "micro", "--count", "7", "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    crashes = {crash["number"]: crash["crash"] for crash in json.loads(done.stdout)["crashes"]}
    assert sorted(crashes) == [0, 1, 2, 3, 4, 5]
    parts = (
        "KeyError",
        "SIGSEGV",
        "MemoryError",
        "a sentence of 4 characters",
        "stayed on the UNet",
        "SIGALRM",
    )
    for number, part in enumerate(parts):
        assert part in crashes[number]


@pytest.mark.parametrize("script", sorted(str(path.relative_to(SCRIPTS)) for path in SCRIPTS.rglob("*.sh")))
def test_shell_scripts_parse(script, run):
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)], capture_output=True).returncode == 0
