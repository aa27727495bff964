"""The scripts that a person runs, as a person runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import evidence_tables
import pytest
import torch

from coeffdiff.config import load_section
from coeffdiff.evaluation.compare import Comparison

SCRIPTS = Path(__file__).parent.parent / "scripts"


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    # The interpreter is for the kernels' own tests; a person does not have it switched on.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def test_photos_are_made_as_an_ordinary_folder(tmp_path):
    """Three JPEGs of the plushie sloth, which the photo reader takes without a complaint."""
    from coeffdiff.data.photos import read_photos

    done = run("make_photos.py", "--output", "photos", "--count", "3", "--resolution", "64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = read_photos(tmp_path / "photos")
    assert [photo.path.name for photo in found.photos] == ["00.jpg", "01.jpg", "02.jpg"]
    assert not found.skipped
    assert {(photo.width, photo.height) for photo in found.photos} == {(64, 64)}


def test_the_benchmark_of_steps_measures_every_arm_in_a_process_of_its_own(tmp_path):
    """One round of one step: the numbers each arm trains, two batch sizes, a table of each kind."""
    arguments = ("--size", "tiny", "--precision", "no", "--steps", "1", "--rounds", "1", "--rank", "4")
    done = run("bench_sdxl.py", *arguments, "--batch", "1", "2", "--json", "figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    arms = json.loads((tmp_path / "figures.json").read_text())["rounds"][0]
    assert list(arms) == ["frozen", "coeff", "lora", "coeff+lora"]
    assert arms["frozen"]["trained"] == 0
    assert arms["coeff+lora"]["trained"] == arms["coeff"]["trained"] + arms["lora"]["trained"]
    for arm in arms.values():
        assert [row["batch"] for row in arm["training"]] == [1, 2]
        for row in (*arm["training"], arm["sampling"]):
            assert row["seconds"] > 0 and row["peak_gib"] > 0.1
    assert done.stdout.count("| coeff+lora |") == 3
    lora = [line for line in done.stdout.splitlines() if "| lora |" in line][:2]
    assert all(line.count("| 1.00 |") == 2 for line in lora)


def test_the_benchmark_of_attention_measures_every_backend_that_runs_here(tmp_path):
    """SDXL's four layers at 128 pixels: ratios to SDPA of every backend, a reason for the one that cannot run."""
    arguments = (
        "--device",
        "cpu",
        "--pixels",
        "128",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--json",
        "figures.json",
    )
    done = run("bench_attention.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [(row["shape"], row["arm"]) for row in rows] == [
        (f"128 px {shape}", arm)
        for shape in ("self, 10 x 64 x 64", "self, 20 x 16 x 16", "cross, 10 x 64 x 77", "cross, 20 x 16 x 77")
        for arm in ("sdpa", "reference", "chunked", "fused")
    ]  # fmt: skip
    for row in rows:
        if row["arm"] == "fused":
            assert row["refused"]
        else:
            assert row["forward"][0] > 0 and row["both"][0] > 0 and row["both_mib"] >= 0


def test_customization_is_measured_once_for_every_cell(tmp_path):
    """Base, a trained arm in two variants and both ends: five rows; asked again, nothing is made anew, packed or not."""
    arguments = ("--folder", "out", "--subjects", "robot_mug", "--arms", "base", "coeff", "ceiling", "floor")
    arguments += ("--steps", "2", "--denoising-steps", "2")
    arguments += ("--set", "method.coeff.dropout=0", "method.coeff.learning_rate=0.05")
    first = run("measure_customization.py", *arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert sum(line.startswith("robot_mug ") for line in first.stderr.splitlines()) == 5
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in first.stdout.splitlines()[2:7]}
    assert list(rows) == [
        "base",
        "coeff method.coeff.dropout=0",
        "coeff method.coeff.learning_rate=0.05",
        "ceiling",
        "floor",
    ]
    likeness = {name: float(row[2]) for name, row in rows.items()}
    assert likeness["ceiling"] > likeness["floor"]
    assert float(rows["coeff method.coeff.learning_rate=0.05"][5]) > float(
        rows["coeff method.coeff.dropout=0"][5]
    )  # mean |alpha|
    cells = [json.loads(file.read_text()) for file in (tmp_path / "out" / "cells").iterdir()]
    assert {(cell["arm"], cell.get("steps")) for cell in cells} == {
        ("base", None), ("coeff", 2), ("ceiling", None), ("floor", None)
    }  # fmt: skip
    for more in ((), ("--pack",), ()):
        again = run("measure_customization.py", *arguments, *more, cwd=tmp_path)
        assert again.stdout.replace(" --pack", "") == first.stdout and "robot_mug" not in again.stderr
    (packed,) = (tmp_path / "out" / "cells").iterdir()
    assert packed.name == "dev.jsonl" and packed.read_text().count("\n") == 5


def test_five_hundred_hostile_adapters_are_refused_or_load(tmp_path):
    """Each of 500 inputs loads and verifies or meets the one error, in bounded memory and time; all kinds occur."""
    done = run("fuzz_adapter.py", "--count", "500", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert (done.returncode, found["crashes"]) == (0, []), done.stderr
    assert found["inputs"] == sum(found["outcomes"].values()) == 500
    assert set(found["outcomes"]) == {"loads", "AdapterError", "AdapterMismatch"}
    assert found["outcomes"]["loads"] > 50
    assert len(found["changes"]) == 10


def test_the_fuzz_run_notices_what_it_looks_for(tmp_path):
    """A loader that raises, dies, hangs, hoards, lies or leaves something behind: each is a crash, and exit code 1."""
    wrong = """
import os, signal, sys, time
from coeffdiff.method import adapter, injection
from coeffdiff.errors import AdapterError
real, calls = adapter.load_adapter, []
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
        injection.inject(pipe.unet)
        raise AdapterError("no")
    if number == 5: signal.alarm(1); time.sleep(60)
    raise AdapterError("refused")
adapter.load_adapter = load
exec(compile(open(SCRIPT).read(), SCRIPT, "exec"), {"__name__": "__main__", "__file__": SCRIPT})
"""
    script = tmp_path / "wrong.py"
    script.write_text(wrong.replace("SCRIPT", repr(str(SCRIPTS / "fuzz_adapter.py"))))
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
    command = [sys.executable, str(script), "--count", "7", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
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


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sh")))
def test_shell_scripts_parse(script):
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)], capture_output=True).returncode == 0


def test_the_benchmark_of_the_check_sets_predictions_beside_runs(tmp_path):
    """One run of pocket: predicted and measured memory of training and of all phases, and seconds a step."""
    arguments = ("--methods", "coeff", "--batch", "1", "--checkpointing", "off", "--steps", "3")
    done = run("bench_check.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1]
    assert row.startswith("| coeff | 1 | off | 128 |")
    pairs = [cell.split(" (")[0].split(" / ") for cell in row.split(" | ")[4:]]
    assert len(pairs) == 3
    for predicted, measured in pairs[:2]:
        assert float(predicted) == pytest.approx(float(measured), rel=0.3)
    assert float(pairs[2][0]) > 0 and float(pairs[2][1]) > 0
    assert not list(tmp_path.iterdir())


def test_a_comparisons_adapters_are_taken_apart(tmp_path):
    """As trained they have the cell's scores; without alpha and without LoRA others; the subject itself the best."""
    (tmp_path / "plan.yaml").write_text(
        "{model: {name: pocket}, subjects: wooden_pot, seeds: [0], limit: 2, denoising_steps: 2, reference: coeff+lora,"
        " settings: {training.steps: 2, training.masked_loss: false}, arms: {coeff+lora: {method.kind: coeff+lora}}}"
    )
    command = [sys.executable, "-m", "coeffdiff", "compare", "plan.yaml", "--output", "comparison"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arguments = ("plan.yaml", "--comparison", "comparison", "--output", "dissected.json")
    done = run("dissect_comparison.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "dissected.json").read_text())
    scores = {row["part"]: row["scores"] for row in rows}
    (cell,) = (json.loads(file.read_text()) for file in (tmp_path / "comparison" / "cells").glob("*.json"))
    assert scores["as trained"] == pytest.approx(
        {n: cell["scores"][n] for n in scores["as trained"]}, abs=1e-5
    )
    assert len({of["dino"] for of in scores.values()}) == len(scores) == 6
    assert max(scores, key=lambda part: scores[part]["dino"]) == "the subject itself"
    assert done.stdout.count("\n| ") == 6 + 1 + 5  # parts; then a head and pocket's blocks
    (moved,) = (row["moved"] for row in rows if "moved" in row)
    assert len(moved) == 2 * 5 and 0.0 < min(moved.values()) < max(moved.values()) < 0.02


def test_the_readmes_tables_are_what_the_cells_say(tmp_path):
    """All of them as they are; with one digit changed, the table is named."""
    root = SCRIPTS.parent
    (tmp_path / "scripts" / "evidence").mkdir(parents=True)
    copied = ("evidence_tables.py", "dissect_comparison.py", "measure_customization.py")
    for name in (*copied, "evidence/dissected.json", "evidence/README.md", "evidence/core.png"):
        shutil.copy(SCRIPTS / name, tmp_path / "scripts" / name)
    for name in ("cells", "customization"):
        (tmp_path / "scripts" / "evidence" / name).symlink_to(SCRIPTS / "evidence" / name)
    (tmp_path / "configs").symlink_to(root / "configs")
    readme = (root / "README.md").read_text(encoding="utf-8")
    begin = readme.index("<!-- table: core -->")
    spoiled = readme[:begin] + readme[begin:].replace("0.", "1.", 1)
    for text, code, said in ((readme, 0, ""), (spoiled, 1, "Not what the cells say: core.\n")):
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        command = [sys.executable, str(tmp_path / "scripts" / "evidence_tables.py"), "--check"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (code, said), done.stderr


def test_what_is_compared_stands_where_tuning_found_it_best(monkeypatch):
    """Each trained arm of the core comparison and of the controls has the settings and steps of its best try."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    plans = {name: load_section(Comparison, evidence_tables.plan_file(name)) for name in ("core", "controls")}
    tuned = evidence_tables.gathered(("tuning", "tuning_controls"))
    tries = {name: load_section(Comparison, evidence_tables.plan_file(name)) for name in tuned}
    called = {"lora, rank 17": "rank17"}
    for name, plan in plans.items():
        for arm, own in plan.arms.items():
            found = [
                tries[tuning].arms[best["arm"]] | {"training.steps": best["steps"]}
                for tuning, there in tuned.items()
                if (best := there.results["best"].get(called.get(arm, arm)))
            ]
            assert arm == "base" or found == [own], (name, arm)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures for minutes where there is a GPU")
def test_without_a_gpu_its_figures_are_not_begun(tmp_path):
    command = ["bash", str(SCRIPTS / "measure_gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "There is no CUDA GPU here.\n")
    done = subprocess.run([*command, "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "There is no part called nonsense." in done.stderr


def test_tiles_are_timed_one_by_one(tmp_path):
    """In Triton's interpreter: the row that is in use and a candidate, of each of two kernels; others pass by."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        str(SCRIPTS / "tune_tiles.py"),
        "--tokens",
        "8",
        "--most",
        "1",
        "--rounds",
        "1",
    ]
    command += ["--shapes", "cross, 10 x 4096", "--kernels", "one tile", "dk", "--json", "tiles.json"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "tiles.json").read_text())
    assert [row["kernel"] for row in rows] == ["one tile", "one tile", "dk", "dk"]
    assert all(row["ms"] > 0 and not row["why"] for row in rows)
    assert done.stdout.count(" * ") == 2
