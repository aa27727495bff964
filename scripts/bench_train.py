"""Seconds a training step and peak memory of coeff, lora, coeff+lora and the frozen network alone, side by side.

    python scripts/bench_train.py                                        # the tiny random model
    python scripts/bench_train.py --model sdxl-random/ --resolution 256 --precision bf16

Every arm runs in a process of its own, so that its peak memory is its own; the arms take turns, round by round,
so that a machine whose speed drifts slows all of them alike. Ratios are to lora, paired within a round; the
median of the rounds is shown. A step is what train() does: dropout mask, forward, min-SNR loss, backward,
clipping, AdamW. "frozen" is one forward and backward to the input, without anything that learns.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ARMS = ("frozen", "coeff", "lora", "coeff+lora")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help='diffusers folder, hub id, or "tiny" (built here)')
    parser.add_argument("--resolution", type=int, help="pixels (default: the model's own)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument(
        "--steps", type=int, default=5, help="timed steps of an arm in a round, after one to warm up"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument(
        "--arm", choices=ARMS, help=argparse.SUPPRESS
    )  # one measurement, in a process of its own
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.model == "tiny":
            from coeffdiff.pocket.model import save_random

            args.model = str(save_random("tiny", Path(folder) / "tiny"))
            name = "tiny random model"
        else:
            name = args.model
        rounds = [{arm: run_apart(args, arm) for arm in ARMS} for _ in range(args.rounds)]
    report(args, name, rounds)


def run_apart(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """One arm in a fresh process. Returns what measure() returned there."""
    command = [sys.executable, __file__, "--arm", arm]
    for key in ("model", "resolution", "batch_size", "rank", "precision", "steps", "threads"):
        if getattr(args, key) is not None:
            command += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    if args.gradient_checkpointing:
        command.append("--gradient-checkpointing")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"The arm {arm} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"  {arm:11s} {result['seconds']:8.3f} s/step  {result['peak_gib']:6.2f} GiB",
        file=sys.stderr,
        flush=True,
    )
    return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step, peak GiB of this process and the number of trained numbers, for one arm."""
    import torch
    from accelerate import Accelerator
    from diffusers import DDPMScheduler

    from coeffdiff import backbone
    from coeffdiff.config import ModelSettings, load_settings
    from coeffdiff.method.coefficients import draw_dropout
    from coeffdiff.training.loop import clip_gradients
    from coeffdiff.training.memory import peak_gib, reset_peak
    from coeffdiff.training.objective import denoising_loss
    from coeffdiff.training.prepare import DTYPES, Trainables, make_trainable

    if args.threads:
        torch.set_num_threads(args.threads)
    base = backbone.find_backbone(ModelSettings(name=args.model))
    pipe = backbone.load_pipeline(base, dtype=DTYPES[args.precision], parts={"unet"})
    accelerator = Accelerator(mixed_precision=args.precision)
    device = accelerator.device
    unet = pipe.unet.to(device)
    kind = "coeff" if args.arm == "frozen" else args.arm
    settings = load_settings(
        None, {"method.kind": kind, "method.lora.rank": args.rank, "method.lora.alpha": args.rank}
    )
    trainables = Trainables({}, {}) if args.arm == "frozen" else make_trainable(unet, settings)
    parameters = [*trainables.alphas, *trainables.lora.values()]
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    optimizer = torch.optim.AdamW(parameters or [torch.zeros(1, requires_grad=True)], lr=1e-4)
    model, optimizer = accelerator.prepare(unet, optimizer)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    side = (args.resolution or backbone.native_resolution(base)) // backbone.vae_factor(base)
    config, batch = unet.config, args.batch_size
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    torch.manual_seed(0)
    latents, noise = (torch.randn(batch, 4, side, side, device=device) for _ in range(2))
    text = torch.randn(batch, 77, config.cross_attention_dim, device=device)
    pixels = side * backbone.vae_factor(base)
    conditions = {
        "text_embeds": torch.randn(batch, pooled, device=device),
        "time_ids": torch.tensor(
            [[pixels, pixels, 0, 0, pixels, pixels]] * batch, device=device, dtype=torch.float32
        ),
    }

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        noisy.requires_grad_(args.arm == "frozen")
        return model(noisy, timesteps, text, added_cond_kwargs=conditions).sample

    seconds = []
    reset_peak(device)
    for step in range(args.steps + 1):
        timesteps = torch.full((batch,), 100 + step, device=device)
        synchronize(device)
        began = time.perf_counter()
        draw_dropout(trainables.coefficients, 0.1, seed=0, step=step)
        accelerator.backward(denoising_loss(predict, latents, noise, timesteps, scheduler))
        if parameters:
            clip_gradients(accelerator, trainables, settings)
            optimizer.step()
            optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": statistics.median(seconds[1:]),
        "peak_gib": peak_gib(device),
        "trained": sum(p.numel() for p in parameters),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
    }


def synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(args: argparse.Namespace, name: str, rounds: list[dict[str, dict[str, Any]]]) -> None:
    """The table, with what a reader needs to repeat it."""
    import diffusers

    first = rounds[0]["lora"]
    print(
        f"{name}, {args.resolution or 'native'} px, batch {args.batch_size}, {args.precision} precision, LoRA rank "
        f"{args.rank}, gradient checkpointing {'on' if args.gradient_checkpointing else 'off'}\n"
        f"{first['device']}, {platform.machine()}, torch {first['torch']}, diffusers {diffusers.__version__}, "
        f"{date.today()}, {args.rounds} rounds of {args.steps} steps\n"
    )
    print(
        "| arm | trained numbers | s/step | time / lora | peak GiB | memory / lora |\n|---|---|---|---|---|---|"
    )
    rows = []
    for arm in ARMS:
        row = {
            "arm": arm,
            "trained": rounds[0][arm]["trained"],
            "seconds": statistics.median(r[arm]["seconds"] for r in rounds),
            "time_ratio": statistics.median(r[arm]["seconds"] / r["lora"]["seconds"] for r in rounds),
            "peak_gib": statistics.median(r[arm]["peak_gib"] for r in rounds),
            "memory_ratio": statistics.median(r[arm]["peak_gib"] / r["lora"]["peak_gib"] for r in rounds),
        }
        rows.append(row)
        print(
            f"| {arm} | {row['trained']:,} | {row['seconds']:.3f} | {row['time_ratio']:.2f} "
            f"| {row['peak_gib']:.2f} | {row['memory_ratio']:.2f} |"
        )
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "rows": rows, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
