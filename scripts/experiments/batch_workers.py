"""A batch of twelve made-up subjects on pocket, and one whose folder is broken: with one worker, with two, and with two
of which one is killed in the middle. Prints a row for each, and whether all adapters are the same bit for bit.

python scripts/experiments/batch_workers.py WORK_FOLDER --steps 40

Each worker has one thread. CPU seconds are those of the tasks alone, without what starting costs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

SUBJECTS = 12


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="a folder; what it holds is not trained again")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4)
    chosen = parser.parse_args()
    work = chosen.work.absolute()
    write_subjects(work)
    asked = ["--steps", str(chosen.steps), "--set", f"training.batch_size={chosen.batch_size}"]
    rows = {
        "one worker": measured(work, "one", asked, workers=1),
        "two workers": measured(work, "two", asked, workers=2),
        "two, one killed": measured(work, "killed", asked, workers=2, kill_at=chosen.steps // 2),
    }
    print(
        "| batch | wall seconds | CPU seconds of the tasks | subjects done, failed | begun again | steps logged |"
    )
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(row)} |")
    same = adapters(work / "one") == adapters(work / "two") == adapters(work / "killed")
    print(f"adapters of all three bit for bit the same: {'yes' if same else 'NO'}")
    return 0 if same else 1


def write_subjects(work: Path) -> None:
    """Photos of twelve subjects that differ from pocket's own, a folder with a broken photo, and the list of all."""
    from coeffdiff.pocket.world.subjects import fresh_subject, write_photos

    lines = []
    for seed in range(SUBJECTS):
        subject = fresh_subject(seed)
        folder = work / "photos" / f"{seed:02d}-{subject.name}"
        if not folder.is_dir():
            write_photos(subject, folder)
        lines.append(f"- {{images: photos/{folder.name}, class_word: {subject.class_word}}}")
    broken = work / "photos" / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "1.jpg").write_bytes(b"no picture")
    lines.insert(SUBJECTS // 2, "- {images: photos/broken, class_word: mug}")
    (work / "subjects.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def measured(work: Path, name: str, asked: list[str], workers: int, kill_at: int | None = None) -> list[str]:
    """Run a batch; the row of the table. kill_at: the step at which the worker of the first such subject is killed."""
    output = work / name
    command = [
        sys.executable,
        "-m",
        "coeffdiff",
        "batch",
        str(work / "subjects.yaml"),
        "--output",
        str(output),
    ]
    command += ["--model", "pocket", "--token", "ohwx", "--set", "validation.prompts=[]", *asked]
    command += ["--executor", "ray", "--workers", str(workers)] if workers > 1 else []
    if kill_at:
        threading.Thread(target=kill_one, args=(output, kill_at), daemon=True).start()
    begun = time.monotonic()
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    wall = time.monotonic() - begun
    results = json.loads((output / "batch.json").read_text(encoding="utf-8"))
    entries, counts = results["subjects"], results["counts"]
    logged = sum(
        len((output / e["name"] / "log.jsonl").read_text().splitlines()) for e in entries if "how" in e
    )
    return [
        f"{wall:.0f}",
        f"{sum(entry['cpu_seconds'] for entry in entries):.0f}",
        f"{counts.get('done', 0)}, {counts.get('failed', 0)}",
        str(sum(entry["starts"] - 1 for entry in entries)),
        str(logged),
    ]


def kill_one(output: Path, step: int) -> None:
    while True:
        time.sleep(0.2)
        for log in output.glob("*/log.jsonl"):
            if len(log.read_text().splitlines()) >= step:
                said = (output / "tasks" / f"{log.parent.name}.log").read_text().split("\n")[0]
                os.kill(int(said.split("process ")[1].split()[0]), signal.SIGKILL)
                return


def adapters(output: Path) -> dict[str, bytes]:
    """The bytes of every tensor; the order of a file's metadata is chance."""
    from safetensors.torch import load_file

    return {
        f"{file.parts[-3]} {file.name} {name}": tensor.numpy().tobytes()
        for file in output.glob("*/adapter/*.safetensors")
        for name, tensor in load_file(file).items()
    }


if __name__ == "__main__":
    sys.exit(main())
