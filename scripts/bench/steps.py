"""Seconds and memory of training and sampling with coeff, lora and coeff+lora, beside the frozen network alone.

python scripts/bench/steps.py                                        # full size, random weights, 1024 px: a GPU
python scripts/bench/steps.py --resolution 256 --batch 1 --steps 2   # the same on a CPU
python scripts/bench/steps.py --size tiny --precision no             # seconds, to try it out

Needs torch, diffusers, transformers, peft, accelerate and safetensors; nothing is downloaded. Every arm runs in a
process of its own, so that its peak memory is its own; the arms take turns, round by round, so that a machine whose
speed drifts slows all of them alike. Ratios are to lora (in sampling: to the bare network) in the same round, and the
median of the rounds is shown. A training step is what train() does: dropout mask, forward, min-SNR loss, backward,
clipping, AdamW. "frozen" is a forward and backward to the input, without anything that learns. A sampling step is one
forward of the UNet for a picture with guidance, which is two.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that it runs where the package is not installed

ARMS = ("frozen", "coeff", "lora", "coeff+lora")
CONTROLS = ("values", "values+lora")  # values mixed in place of maps
Figures = dict[str, Any]


def main() -> None:
    from coeffdiff.utils.paths import path_argument

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("tiny", "pocket", "sdxl"), default="sdxl")
    parser.add_argument("--resolution", type=int, default=0, help="pixels (default: the model's own)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off"])
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="bf16")
    parser.add_argument("--arms", nargs="+", choices=(*ARMS, *CONTROLS), default=list(ARMS))
    parser.add_argument("--steps", type=int, default=5, help="timed, after two to warm up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", default="auto", help="how mixed attention is computed")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet's blocks")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=path_argument, help="also write the figures here")
    parser.add_argument("--arm", choices=(*ARMS, *CONTROLS), help=argparse.SUPPRESS)  # one process's share
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options)))
        return
    rounds = [{arm: run_apart(arm) for arm in options.arms} for _ in range(options.rounds)]
    about = rounds[0][options.arms[0]]["about"]
    print(f"{about}, {options.rounds} rounds, {date.today()}\n{' '.join(sys.argv)}\n")
    print(training_table(options, rounds))
    print(f"\n{sampling_table(options, rounds)}")
    if options.json:
        options.json.write_text(json.dumps({"command": sys.argv, "rounds": rounds}, indent=1) + "\n")


def run_apart(arm: str) -> Figures:
    """One arm in a fresh process: what measure() returned there."""
    done = subprocess.run([sys.executable, *sys.argv, "--arm", arm], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"The arm {arm} failed:\n{done.stderr}")
    result: Figures = json.loads(done.stdout.splitlines()[-1])
    for row in result["training"]:
        print(f"  {arm:11s} {row}", file=sys.stderr, flush=True)
    return result


def measure(options: Any) -> Figures:
    """Every batch size with and without checkpointing for one arm, then sampling."""
    from coeffdiff.utils.threads import choose_waiting

    choose_waiting()
    import torch
    from accelerate import Accelerator

    from coeffdiff.utils.torch_setup import compile_blocks, prepare_kernels

    if options.threads:
        torch.set_num_threads(options.threads)
    accelerator = Accelerator(mixed_precision=options.precision)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    unet = random_unet(options.size, accelerator.device, dtype)
    prepare_kernels(accelerator.device, dtype, unet)
    coefficients, lora = trainables(unet, options)
    if options.compile:
        compile_blocks(unet, accelerator.device)
    training = []
    for batch, checkpointing in itertools.product(options.batch, options.checkpointing):
        (
            unet.enable_gradient_checkpointing
            if checkpointing == "on"
            else unet.disable_gradient_checkpointing
        )()
        facts = {"batch": batch, "checkpointing": checkpointing}
        training.append(facts | train_steps(options, accelerator, unet, coefficients, lora, batch))
    cuda = accelerator.device.type == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    return {
        "training": training,
        "trained": sum(p.numel() for p in [*(c.alpha for c in coefficients.values()), *lora]),
        "sampling": sample_steps(options, accelerator, unet, dtype),
        "about": f"{where}, {platform.machine()}, torch {torch.__version__}",
    }


def random_unet(size: str, device: Any, dtype: Any) -> Any:
    """The architecture with weights that keep numbers finite; values do not matter to time and memory."""
    import torch
    from diffusers import UNet2DConditionModel

    from coeffdiff.pocket.sizes import unet_config

    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config(size))
    unet = unet.to(dtype).to_empty(device=device).requires_grad_(False)
    torch.manual_seed(0)
    for name, weight in unet.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0.0, 0.7 / weight[0].numel() ** 0.5)
        else:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
    return unet


def trainables(unet: Any, options: Any) -> tuple[dict[str, Any], list[Any]]:
    """What the arm trains, in float32: alphas by layer, and LoRA's parameters."""
    from coeffdiff.hosts.lora.layers import add_lora
    from coeffdiff.hosts.unet import inject

    lora, coefficients = [], {}
    if "lora" in options.arm:
        lora = list(add_lora(unet, rank=options.rank, alpha=options.rank).values())
    if "coeff" in options.arm or options.arm in CONTROLS:
        mixes = "values" if options.arm in CONTROLS else "maps"
        coefficients = inject(unet, mixes=mixes, backend=options.backend)
    for parameter in [*lora, *(c.alpha for c in coefficients.values())]:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    return coefficients, lora


def inputs(options: Any, unet: Any, batch: int, device: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Latents, text and SDXL's conditions of `batch` pictures."""
    import torch

    config = unet.config
    side = options.resolution // 8 if options.resolution else config.sample_size
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator).to(device)

    pixels = float(side * 8)
    time_ids = torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]], device=device).expand(batch, -1)
    conditions = {"text_embeds": noise(pooled), "time_ids": time_ids}
    return noise(config.in_channels, side, side), noise(77, config.cross_attention_dim), conditions


def train_steps(
    options: Any, accelerator: Any, unet: Any, coefficients: dict[str, Any], lora: list[Any], batch: int
) -> Figures:
    """Median seconds of a step and peak GiB."""
    import torch
    from diffusers import DDPMScheduler

    from coeffdiff.method.coefficients import draw_dropout
    from coeffdiff.pocket.sizes import euler_scheduler
    from coeffdiff.training.memory import peak_gib, reset_peak
    from coeffdiff.training.objective import denoising_loss

    device = accelerator.device
    alphas = [c.alpha for c in coefficients.values()]
    latents, text, conditions = inputs(options, unet, batch, device)
    noise = torch.randn_like(latents)
    scheduler = DDPMScheduler.from_config(euler_scheduler().config)
    optimizer = torch.optim.AdamW([*alphas, *lora] or [torch.zeros(1, requires_grad=True)], lr=1e-4)
    model = accelerator.prepare_model(unet.train())

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        noisy.requires_grad_(options.arm == "frozen")
        return model(noisy, timesteps, text, added_cond_kwargs=conditions).sample

    def steps() -> Iterator[Callable[[], None]]:
        for step in range(options.steps + 2):
            timesteps = torch.full((batch,), 100 + step, device=device)

            def one(step: int = step, timesteps: torch.Tensor = timesteps) -> None:
                draw_dropout(coefficients, 0.1, seed=0, step=step)
                accelerator.backward(denoising_loss(predict, latents, noise, timesteps, scheduler))
                for group in filter(None, (alphas, lora)):
                    torch.nn.utils.clip_grad_norm_(group, 1.0)
                optimizer.step()
                optimizer.zero_grad()

            yield one

    try:
        gc.collect()
        reset_peak(device)
        took = [timed(step, device) for step in steps()]
    except torch.OutOfMemoryError:
        return {"seconds": None, "peak_gib": None}
    return {"seconds": statistics.median(took[2:]), "peak_gib": peak_gib(device)}


def sample_steps(options: Any, accelerator: Any, unet: Any, dtype: Any) -> Figures:
    """Median seconds of one guided denoising step, and peak GiB, with what the arm trained in place."""
    import torch

    from coeffdiff.hosts.unet import coefficients_of
    from coeffdiff.method.coefficients import clear_dropout
    from coeffdiff.training.memory import peak_gib, reset_peak

    device = accelerator.device
    clear_dropout(coefficients_of(unet))
    unet.eval().disable_gradient_checkpointing()
    latents, text, conditions = inputs(options, unet, 2, device)
    conditions = {name: value.to(dtype) for name, value in conditions.items()}
    gc.collect()
    reset_peak(device)

    @torch.no_grad()
    def step() -> None:
        unet(
            latents.to(dtype), torch.tensor(500, device=device), text.to(dtype), added_cond_kwargs=conditions
        )

    took = [timed(step, device) for _ in range(options.steps + 2)]
    return {"seconds": statistics.median(took[2:]), "peak_gib": peak_gib(device)}


def timed(step: Callable[[], None], device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def training_table(options: Any, rounds: list[dict[str, Figures]]) -> str:
    lines = [
        f"Training, {options.size}, {options.resolution or 'native'} px, {options.precision}, LoRA rank {options.rank}",
        "",
        "| batch | checkpointing | arm | trained numbers | s/step | / lora | peak GiB | / lora |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for place, (batch, checkpointing) in enumerate(itertools.product(options.batch, options.checkpointing)):
        for arm in options.arms:
            cells = [
                cell([r[arm]["training"][place][name] for r in rounds],
                     [r[against(options, "lora")]["training"][place][name] for r in rounds])
                for name in ("seconds", "peak_gib")
            ]  # fmt: skip
            trained = f"{rounds[0][arm]['trained']:,}"
            lines.append(f"| {batch} | {checkpointing} | {arm} | {trained} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sampling_table(options: Any, rounds: list[dict[str, Figures]]) -> str:
    lines = [
        "A sampling step with guidance, one picture",
        "",
        "| arm | s/step | / frozen | peak GiB | / frozen |",
        "|---|---|---|---|---|",
    ]
    for arm in options.arms:
        cells = [
            cell([r[arm]["sampling"][name] for r in rounds],
                 [r[against(options, "frozen")]["sampling"][name] for r in rounds])
            for name in ("seconds", "peak_gib")
        ]  # fmt: skip
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def against(options: Any, arm: str) -> str:
    """What ratios are to: the first arm where the usual one was not asked for."""
    return arm if arm in options.arms else str(options.arms[0])


def cell(own: list[float | None], base: list[float | None]) -> str:
    """A median, and the median of ratios within rounds."""
    if None in own:
        return "out of memory | "
    value = f"{statistics.median(own):.3g}"
    if None in base:
        return f"{value} | "
    return f"{value} | {statistics.median(a / b for a, b in zip(own, base, strict=True)):.2f}"


if __name__ == "__main__":
    main()
