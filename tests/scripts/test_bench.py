"""The benchmarks, as the user runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forking import fork_run

from coeffdiff.pocket.model import save_random

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_the_benchmark_of_steps_measures_every_arm_in_a_process_of_its_own(tmp_path, forked):
    """One round of one step: the numbers each arm trains, two batch sizes, a table of each kind."""
    arguments = ("--size", "tiny", "--precision", "no", "--steps", "1", "--rounds", "1", "--rank", "4")
    done = forked("bench/steps.py", *arguments, "--batch", "1", "2", "--json", "figures.json", cwd=tmp_path)
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


def test_the_benchmark_of_attention_measures_every_backend_that_runs_here(tmp_path, forked, monkeypatch):
    """SDXL's four layers at 128 pixels: ratios to SDPA of every backend, a reason for the one that cannot run."""
    if importlib.util.find_spec("triton"):  # users have its interpreter switched off
        monkeypatch.setattr("coeffdiff.method.triton_kernels.INTERPRETED.value", False)
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
    done = forked("bench/attention.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [(row["shape"], row["arm"]) for row in rows] == [
        (f"128 px {shape}", arm)
        for shape in ("self, 10 x 64 x 64", "self, 20 x 16 x 16", "cross, 10 x 64 x 77", "cross, 20 x 16 x 77")
        for arm in ("sdpa", "reference", "eager", "chunked", "fused")
    ]  # fmt: skip
    for row in rows:
        if row["arm"] == "fused":
            assert row["refused"]
        else:
            assert row["forward"][0] > 0 and row["both"][0] > 0 and row["both_mib"] >= 0


def test_the_benchmark_of_the_check_sets_predictions_beside_runs(tmp_path, run):
    """One run of the micro model: predicted and measured memory of training and of all phases, and seconds a step."""
    model, place = save_random("micro", tmp_path / "model"), tmp_path / "place"
    place.mkdir()
    arguments = ("--methods", "coeff", "--batch", "1", "--checkpointing", "off", "--steps", "3")
    arguments += ("--model", str(model), "--resolution", "64")
    done = run("bench/check.py", *arguments, cwd=place)
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1]
    assert row.startswith("| coeff | 1 | off | 64 |")
    pairs = [cell.split(" (")[0].split(" / ") for cell in row.split(" | ")[4:]]
    assert len(pairs) == 3
    for predicted, measured in pairs[:2]:
        assert float(predicted) == pytest.approx(float(measured), rel=0.3)
    assert float(pairs[2][0]) > 0 and float(pairs[2][1]) > 0
    assert not list(place.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures for minutes where there is a GPU")
def test_without_a_gpu_its_figures_are_not_begun(tmp_path, run):
    command = ["bash", str(SCRIPTS / "bench" / "gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "There is no CUDA GPU here.\n")
    done = subprocess.run([*command, "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "There is no part called nonsense." in done.stderr


def test_tiles_are_timed_one_by_one(tmp_path):
    """In Triton's interpreter, for two heads: the row in use and a candidate, of each of two kernels; others pass by."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("forks cannot use the GPU")
    script = "import sys, tune_tiles as t; t.SHAPES['small'] = (2, 8, 8); sys.exit(t.main())"
    arguments = ("--most", "1", "--rounds", "1", "--shapes", "small", "--kernels", "one tile", "dk")
    done = fork_run("-c", script, *arguments, "--json", "tiles.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "tiles.json").read_text())
    assert [row["kernel"] for row in rows] == ["one tile", "one tile", "dk", "dk"]
    assert all(row["ms"] > 0 and not row["why"] for row in rows)
    assert done.stdout.count(" * ") == 2
