"""What `coeffdiff check` predicts for runs of a model, beside what those runs then take.

python scripts/bench/check.py                                         # pocket, twelve ways
python scripts/bench/check.py --model models/random-sdxl --resolution 256 --batch 1 --precision bf16 --steps 3

Every run is a process of its own on the same five made-up photos. Memory is the peak of the process (of its tensors
on a GPU) over training and over all phases; seconds are of a training step, the median after the first. On a CPU with
one thread they are seconds of work, so that other programs' share of the processor is not measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that it runs where the package is not installed

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--methods", nargs="+", default=["coeff", "lora", "coeff+lora"])
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--resolution", type=int, nargs="+", default=[128])
    parser.add_argument("--precision", choices=("auto", "no", "bf16", "fp16"), default="auto")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one process's share
    options = parser.parse_args()
    if options.steps < 3:
        parser.error("--steps must be 3 or more: the first step is not counted, and a time lies between two")
    if options.run:
        print(json.dumps(predict_and_run(json.loads(options.run), options.threads)))
        return
    print("| method | batch | checkpointing | px | GiB training | GiB all phases | s/step |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for method, batch, checkpointing, resolution in itertools.product(
            options.methods, options.batch, options.checkpointing, options.resolution
        ):
            values = {
                "model.name": options.model,
                "subject.token": "sks",
                "subject.class_word": "mug",
                "method.kind": method,
                "training.batch_size": batch,
                "training.gradient_checkpointing": checkpointing == "on",
                "training.resolution": resolution,
                "training.precision": options.precision,
                "training.steps": options.steps,
                "validation.seeds": [1000],
            }
            figures = run_apart(values, Path(folder), options.threads)
            cells = " | ".join(beside(*pair) for pair in figures)
            print(f"| {method} | {batch} | {checkpointing} | {resolution} | {cells} |", flush=True)


def beside(predicted: float, measured: float) -> str:
    return f"{predicted:.3g} / {measured:.3g} ({predicted / measured - 1:+.0%})"


def run_apart(values: dict[str, Any], folder: Path, threads: int) -> list[list[float]]:
    """Pairs of predicted and measured figures, from a fresh process."""
    from coeffdiff.pocket.world.subjects import SUBJECTS, write_photos

    photos = folder / "photos"
    if not photos.is_dir():
        write_photos(SUBJECTS["robot_mug"], photos, 5)
    number = len(list(folder.glob("run-*")))
    paths = {
        "subject.images": photos,
        "photos.cache": folder / f"cache-{number}",
        "output": folder / f"run-{number}",
    }
    given = json.dumps(values | {name: str(path) for name, path in paths.items()})
    command = [sys.executable, __file__, "--threads", str(threads), "--run", given]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"This run failed: {given}\n{done.stderr}")
    pairs: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return pairs


def predict_and_run(values: dict[str, Any], threads: int) -> list[tuple[float, float]]:
    from coeffdiff.utils.threads import choose_waiting

    choose_waiting()
    import torch

    torch.set_num_threads(threads)
    from coeffdiff.config.loading import load_settings
    from coeffdiff.training import loop, run_outputs, run_summary, step
    from coeffdiff.training.memory import peak_gib, reset_peak

    found: dict[str, Any] = {}
    peaks: list[float] = []
    starts: list[float] = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.process_time if threads == 1 and device.type == "cpu" else time.perf_counter

    def check(*arguments: Any, **named: Any) -> Any:
        found["report"] = preflight_check(*arguments, **named | {"budget_seconds": 4.0})
        return found["report"]

    def phase(run: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any, **named: Any) -> Any:
            reset_peak(device)
            result = run(*arguments, **named)
            peaks.append(peak_gib(device))
            return result

        return measured

    def started(*arguments: Any, **named: Any) -> Any:
        starts.append(clock())
        return draw(*arguments, **named)

    preflight_check, run_summary.check = run_summary.check, check
    loop.encode, run_outputs.write_previews = phase(loop.encode), phase(run_outputs.write_previews)
    draw, step.draw_dropout = step.draw_dropout, started
    result = loop.train(load_settings(None, values))
    log = [json.loads(line) for line in (result.run / "log.jsonl").read_text().splitlines()]
    training, prediction = log[-1]["peak_gib"], found["report"].prediction
    taken = statistics.median(end - begin for begin, end in itertools.pairwise(starts[1:]))
    return [
        (prediction.phases["training"] / GIB, training),
        (prediction.peak_bytes / GIB, max(training, *peaks)),
        (prediction.seconds_a_step, taken),
    ]


if __name__ == "__main__":
    main()
