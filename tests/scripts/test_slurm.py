"""The recipes for SLURM: shell that parses, and the command that a job of the array runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "configs" / "slurm"


def started(recipe: str, *arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A recipe as a job runs it, with a `python` that is this one."""
    (folder / "bin").mkdir(exist_ok=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    given = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    given |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **variables}
    command = ["bash", str(SLURM / recipe), *arguments]
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("recipe", sorted(file.name for file in SLURM.glob("*.sbatch")))
def test_a_recipe_is_shell_and_says_what_it_wants(recipe, tmp_path):
    parsed = subprocess.run(["bash", "-n", str(SLURM / recipe)], capture_output=True, text=True, check=False)
    assert parsed.returncode == 0, parsed.stderr
    variables = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "8"}
    refused = started(recipe, folder=tmp_path, **variables)
    assert refused.returncode == 2 and "SUBJECTS.yaml [options of coeffdiff batch]" in refused.stderr


def test_a_job_of_the_array_does_its_part_and_the_last_one_the_table(tmp_path):
    """Two subjects whose folders are missing: job 2 of 2 tries the second, the table knows both, each ends with 1."""
    (tmp_path / "subjects.yaml").write_text("- {images: first}\n- {images: second}\n")
    asked = ("subjects.yaml", "--model", "pocket", "--token", "ohwx", "--output", "out")
    variables = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "1"}
    job = started("batch.sbatch", *asked, folder=tmp_path, **variables)
    assert job.returncode == 1 and "1 subject: 1 failed" in job.stdout, job.stderr
    assert "There is no folder" in job.stdout and "first" not in job.stdout
    table = started("batch_table.sbatch", *asked, folder=tmp_path)
    assert table.returncode == 1 and "2 subjects: 1 missing, 1 failed" in table.stdout, table.stderr
