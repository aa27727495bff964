"""train(): photos in, adapter out. Reads top to bottom; Accelerate owns devices, precision and processes."""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from coeffdiff import backbone
from coeffdiff.config import Settings, with_values
from coeffdiff.console import Bar, progress, say
from coeffdiff.data.latents import share_of
from coeffdiff.data.photos import read_photos
from coeffdiff.errors import ConfigError, Interrupted, NonFiniteLoss, ResumeError
from coeffdiff.method.adapter import save_adapter
from coeffdiff.method.coefficients import clear_dropout, draw_dropout
from coeffdiff.method.injection import verify
from coeffdiff.training.card import model_card
from coeffdiff.training.launch import start_processes
from coeffdiff.training.memory import peak_gib, reset_peak
from coeffdiff.training.objective import denoising_loss
from coeffdiff.training.prepare import (
    DTYPES,
    Trainables,
    encode,
    header_for,
    introduce,
    make_trainable,
    resolve,
)
from coeffdiff.training.preview import write_previews
from coeffdiff.training.state import (
    Checkpoint,
    RunFolder,
    StepLog,
    claim,
    disk_errors,
    load_checkpoint,
    new_run,
    save_checkpoint,
    store,
)


@dataclass(frozen=True)
class Result:
    """What a finished run leaves. seconds is the wall time of this call, loading included."""

    run: Path
    adapter: Path
    steps: int
    loss: float
    seconds: float


def train(settings: Settings, *, resume: RunFolder | None = None) -> Result:
    """Teach the model of `settings` its subject.

    Args:
        settings: subject.images and subject.token must be set; "auto" values are resolved here.
        resume: a run to continue from its newest checkpoint; the settings are then its own.
    Returns: where the adapter is.
    Raises: CoeffDiffError with one sentence for a person; Interrupted after Ctrl-C, with a checkpoint saved.
    """
    begun = time.monotonic()
    # 1. What is asked for, checked before anything is slow or written
    if settings.subject.images is None or settings.subject.token is None:
        missing = "--images" if settings.subject.images is None else "--token"
        raise ConfigError(f"Training needs {missing}; for instance: train --images photos/ --token sks.")
    state = start_processes()
    photos = read_photos(settings.subject.images)
    base = backbone.find_backbone(settings.model)
    settings, chosen = resolve(settings, base, state)
    training, coeff, lora = settings.training, settings.method.coeff, settings.method.lora
    steps, accumulate, batch_size = int(training.steps), int(training.accumulate), int(training.batch_size)
    run = resume or _from_main(state, lambda: new_run(settings.output, str(settings.subject.token)))
    settings = with_values(settings, {"output": str(run.path)})
    introduce(settings, chosen, photos, base, run, state)

    # 2. Photos and captions become latents and embeddings; the text encoders leave memory before the UNet comes,
    # unless a token is learned in them
    dtype = DTYPES[training.precision]
    data, previews, vae, learned = encode(settings, photos, base, dtype, state)

    # 3. The UNet, frozen, and what learns on it
    pipe = backbone.load_pipeline(base, dtype=dtype, parts={"unet"})
    unet, noise_scheduler = pipe.unet.to(state.device), DDPMScheduler.from_config(pipe.scheduler.config)
    trainables = make_trainable(unet, settings, learned)
    if training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()

    # 4. Optimizer, schedule, Accelerate. The schedule is not prepared: it would step once per process
    groups: list[dict[str, Any]] = []
    if trainables.alphas:
        groups.append({"params": trainables.alphas, "lr": float(coeff.learning_rate), "weight_decay": 0.0})
    if trainables.lora:
        rate, decay = float(lora.learning_rate), lora.weight_decay
        groups.append({"params": list(trainables.lora.values()), "lr": rate, "weight_decay": decay})
    if trainables.token:
        rate = float(settings.method.token.learning_rate)
        groups.append({"params": list(trainables.token.values()), "lr": rate, "weight_decay": 0.0})
    adamw = torch.optim.AdamW(groups)
    schedule = get_scheduler(
        training.lr_schedule, adamw, num_warmup_steps=training.warmup_steps, num_training_steps=steps
    )
    AcceleratorState._reset_state()  # or a second train() in one process could not choose its own precision
    accelerator = Accelerator(
        mixed_precision=training.precision,
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    # DDP refuses a network without anything to learn; a token's rows are none of its parameters
    model = accelerator.prepare_model(unet, evaluation_mode=not (trainables.alphas or trainables.lora))
    optimizer = accelerator.prepare(adamw)
    # Made now, although it is written last: what it refuses must not cost a whole run
    header = header_for(settings, trainables, base.name, steps)

    # 5. From the beginning, or from where it stopped
    step, loss = 0, math.nan
    samples_a_step = batch_size * accumulate * state.num_processes
    identities = [photo.digest + (photo.caption or "") for photo in photos.photos]
    if resume:
        step, loss = _restore(
            run, trainables, optimizer, schedule, accelerator.scaler, identities, samples_a_step
        )
        _check_same_step(step, state)
        say(f"resume   {run.path} after step {step}" + ("" if step else ", as there is no checkpoint yet"))
        if step >= steps and run.finished:
            raise ResumeError(f"{run.path} has finished its {step} steps; ask for more with --steps.")
    if state.is_main_process:
        with disk_errors(f"The run folder {run.path}"):
            (store if resume else claim)(run, settings)
    state.wait_for_everyone()

    def save(step: int, loss: float) -> None:
        if state.is_main_process:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}
            states = (optimizer.state_dict(), schedule.state_dict(), scaler)
            checkpoint = Checkpoint(step, trainables.tensors(), *states, identities, samples_a_step, loss)
            save_checkpoint(run, checkpoint, training.keep_checkpoints)
        state.wait_for_everyone()

    def preview(step: int, on_progress: Callable[[float], None]) -> list[Path]:
        files: list[Path] = []
        if previews and state.is_main_process:
            clear_dropout(trainables.coefficients)
            parts = {"unet": unet, "vae": vae, "scheduler": pipe.scheduler}
            adapter = {"path": str(run.adapter), "scale": 1.0, "kind": header.kind, "token": header.token}
            details = {"model": base.name, "adapters": [adapter | {"trained_steps": step}]}
            encoded = learned.encoded(list(previews)) if learned else previews
            files = write_previews(run.samples(step), settings, encoded, parts, details, state, on_progress)
        state.wait_for_everyone()
        return files

    # 6. The loop: draw, predict, loss, backward, step; once in a while log, preview, save
    reset_peak(state.device)
    with (
        StepLog(run.log, step, state.is_main_process) as log,
        _interruptions() as interrupted,
        progress("training", steps) as bar,
    ):
        bar(step)
        while step < steps:
            step += 1
            began = time.perf_counter()
            verify(unet)
            draw_dropout(trainables.coefficients, coeff.dropout, seed=training.seed, step=step)
            losses: list[Tensor] = []
            for micro in range(accumulate):
                share = share_of(samples_a_step, batch_size, micro, state.process_index, state.num_processes)
                batch = data.batch(step, share, state.device)
                text = learned.conditions(batch) if learned else (batch.embeds, batch.pooled)

                def predict(noisy: Tensor, timesteps: Tensor, batch: Any = batch, text: Any = text) -> Tensor:
                    embeds, pooled = text
                    conditions = {"text_embeds": pooled, "time_ids": batch.time_ids}
                    return model(noisy, timesteps, embeds, added_cond_kwargs=conditions).sample

                with accelerator.accumulate(model):
                    micro_loss = denoising_loss(
                        predict,
                        batch.latents,
                        batch.noise,
                        batch.timesteps,
                        noise_scheduler,
                        training.snr_gamma,
                    )
                    accelerator.backward(micro_loss)
                    losses.append(micro_loss.detach())
                    if accelerator.sync_gradients:
                        if learned:
                            learned.share_gradients(state)
                        norms = clip_gradients(accelerator, trainables, settings)
                        loss, stop = _agree(torch.stack(losses).mean(), interrupted(), state)
                        _check_finite(loss, norms, step, run, training.precision)
                    optimizer.step()
                    optimizer.zero_grad()
            skipped = accelerator.optimizer_step_was_skipped  # normal where an fp16 scaler lowers its scale
            rates = schedule.get_last_lr()
            if not skipped:
                schedule.step()
                if learned:
                    learned.stepped()

            moved, seconds, peak = trainables.moved(), time.perf_counter() - began, peak_gib(state.device)
            log.write(
                {"step": step, "loss": loss, "lr": rates, "alpha": moved, "grad_norm": norms}
                | ({"token": learned.moved()} if learned else {})
                | {"seconds": round(seconds, 4), "peak_gib": round(peak, 3), "skipped": skipped}
            )
            bar(step, _status(loss, moved, seconds, peak))
            if stop or step == steps or (training.checkpoint_every and step % training.checkpoint_every == 0):
                save(step, loss)
            if stop and step < steps:
                raise Interrupted(
                    f"Stopped after step {step}, saved in {run.checkpoint(step)}. "
                    f"Continue with: coeffdiff train --resume --output {run.path}"
                )
            if settings.validation.every and step % settings.validation.every == 0 and step < steps:
                preview(step, functools.partial(_drawing, bar, step))

    # 7. The result, before its pictures: they are worth less than it
    clear_dropout(trainables.coefficients)

    def finish(pictures: list[Path]) -> None:
        if state.is_main_process:
            card = model_card(header, settings, loss, [picture.name for picture in pictures])
            extras = {picture.name: picture.read_bytes() for picture in pictures}
            with disk_errors(f"The adapter {run.adapter}"):
                save_adapter(
                    run.adapter, unet, header, extras | {"README.md": card.encode()}, rows=trainables.token
                )
        state.wait_for_everyone()

    finish([])
    if previews:
        with progress("pictures", len(previews) * len(settings.validation.seeds)) as bar:
            finish(preview(step, bar))
    return Result(run.path, run.adapter, step, loss, time.monotonic() - begun)


def _restore(
    run: RunFolder,
    trainables: Trainables,
    optimizer: Any,
    schedule: Any,
    scaler: Any,
    identities: list[str],
    samples_a_step: int,
) -> tuple[int, float]:
    """Step and loss of the newest whole checkpoint, after loading it; (0, nan) if none has been written yet."""
    checkpoint = load_checkpoint(run)
    if checkpoint is None:
        return 0, math.nan
    if checkpoint.photos != identities:
        raise ResumeError(
            f"The photos or their captions have changed since {run.path} began. Put them back, or start a new run."
        )
    if checkpoint.samples_a_step != samples_a_step:
        raise ResumeError(
            f"{run.path} took {checkpoint.samples_a_step} samples a step over all processes, this launch would take "
            f"{samples_a_step}. Start as many processes as before."
        )
    trainables.restore(checkpoint.tensors)
    optimizer.load_state_dict(checkpoint.optimizer)
    schedule.load_state_dict(checkpoint.schedule)
    if scaler and checkpoint.scaler:
        scaler.load_state_dict(checkpoint.scaler)
    return checkpoint.step, checkpoint.loss


def _check_same_step(step: int, state: PartialState) -> None:
    """All machines must read the same checkpoint. Raises: ResumeError on all of them if one does not."""
    steps = gather_object([step]) if state.num_processes > 1 else [step]
    if len(set(steps)) > 1:
        raise ResumeError(
            f"The processes would continue after different steps ({steps}). Every machine needs the newest "
            "checkpoint: copy the run folder to all of them, or keep it on a shared disk."
        )


def clip_gradients(accelerator: Accelerator, trainables: Trainables, settings: Settings) -> dict[str, float]:
    """Clip alpha, LoRA and token apart, so that the many do not drown the few; returns their norms before clipping."""
    accelerator.unscale_gradients()
    training = settings.training
    norms = {}
    for name, parameters, limit in (
        ("coeff", trainables.alphas, training.clip_coeff),
        ("lora", list(trainables.lora.values()), training.clip_lora),
        ("token", list(trainables.token.values()), training.clip_token),
    ):
        if parameters:
            norms[name] = float(nn.utils.clip_grad_norm_(parameters, limit or math.inf))
    return norms


def _agree(loss: Tensor, stop: bool, state: PartialState) -> tuple[float, bool]:
    """The mean loss of all processes, and whether any of them was asked to stop."""
    if state.num_processes == 1:
        return float(loss), stop
    both = torch.stack(
        [loss.float() / state.num_processes, torch.full_like(loss, float(stop), dtype=torch.float32)]
    )
    torch.distributed.all_reduce(both)
    return float(both[0]), bool(both[1] > 0)


def _check_finite(loss: float, norms: dict[str, float], step: int, run: RunFolder, precision: str) -> None:
    # With fp16 a gradient that overflows is the scaler's business: it skips the step and lowers its scale.
    if math.isfinite(loss) and (precision == "fp16" or all(map(math.isfinite, norms.values()))):
        return
    cause = {
        "fp16": "fp16 overflows in some models: try --set training.precision=bf16",
        "bf16": "the learning rate is the usual cause: lower it under method.coeff, method.lora or method.token",
        "no": "the learning rate is the usual cause: lower it under method.coeff, method.lora or method.token",
    }[precision]
    last = next(iter(run.checkpoints()), None)
    kept = f"The last good checkpoint is {last}." if last else "No checkpoint had been written yet."
    what = "loss" if not math.isfinite(loss) else "gradient"
    raise NonFiniteLoss(f"The {what} is not finite at step {step}; {cause}. {kept}")


def _from_main(state: PartialState, decide: Callable[[], Any]) -> Any:
    """What the main process decides, on all processes; its error is raised on all as well."""
    answer: list[Any] = [None]
    if state.is_main_process:
        try:
            answer = [decide()]
        except ConfigError as error:
            answer = [error]
    if state.num_processes > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], ConfigError):
        raise answer[0]
    return answer[0]


def _status(loss: float, moved: float | None, seconds: float, peak: float) -> str:
    alpha = "" if moved is None else f"  |alpha| {moved:.4f}"
    return f"loss {loss:.4f}{alpha}  {seconds:.2f} s/step  {peak:.1f} GiB"


def _drawing(bar: Bar, step: int, done: float) -> None:
    bar(step, f"making validation pictures, {done:.1f} done")


@contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM only raise a flag, so that the step ends and is saved; a second Ctrl-C ends at once.

    A launcher passes a signal on that the terminal has already sent, so two within two seconds are one.
    """
    first: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now
            say("stopping after this step (press Ctrl-C again to stop at once, without saving)")
        elif number == signal.SIGINT and now - first > 2:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: first is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
