"""train(): photos in, adapter out. Reads top to bottom; Accelerate owns devices, precision and processes."""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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

from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import with_values
from coeffdiff.data.batches import share_of
from coeffdiff.data.photos import NO_PHOTOS, read_photos, with_offers
from coeffdiff.errors import CoeffDiffError, ConfigError, Interrupted, NonFiniteLoss, ResumeError
from coeffdiff.hosts.diffusers import save_adapter, write_adapter
from coeffdiff.hosts.guard import verify
from coeffdiff.method.coefficients import clear_dropout, draw_dropout
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.fingerprints import fingerprints
from coeffdiff.models.loading import load_pipeline
from coeffdiff.models.opening import recipe
from coeffdiff.training.blame import cause_of, first_not_finite
from coeffdiff.training.card import model_card
from coeffdiff.training.checkpoints import Checkpoint, amend_checkpoint, load_checkpoint, save_checkpoint
from coeffdiff.training.continuing import (
    check_division,
    check_places,
    check_steps,
    check_weights,
    introduction,
    photos_as_begun,
    with_absolute_paths,
)
from coeffdiff.training.inputs import encode
from coeffdiff.training.judge import judge_for
from coeffdiff.training.launch import start_processes
from coeffdiff.training.memory import peak_gib, reset_peak
from coeffdiff.training.memory_options import training_switches
from coeffdiff.training.objective import denoising_loss
from coeffdiff.training.optimizer import make_optimizer
from coeffdiff.training.preview import write_previews
from coeffdiff.training.prior import loss_terms
from coeffdiff.training.refusals import refuse_early
from coeffdiff.training.resolve import DTYPES, resolve
from coeffdiff.training.run_folder import RunFolder, claim, disk_errors, lock_run, new_run, store
from coeffdiff.training.run_summary import print_run_summary
from coeffdiff.training.step_log import StepLog
from coeffdiff.training.trackers import start_trackers, trackers_for
from coeffdiff.training.trainables import Trainables, header_for, make_trainable
from coeffdiff.training.watch import FinalState, Watch
from coeffdiff.utils.atomic import atomic_write, sweep
from coeffdiff.utils.console import Bar, is_main_process, print_error, print_info, progress
from coeffdiff.utils.oom import oom_hints
from coeffdiff.utils.output_folder import refuse_unwritable
from coeffdiff.utils.torch_setup import compile_blocks, prepare_kernels

# Seconds. Several processes hear of Ctrl-C at looks alone, and torchrun kills them 30 seconds after it
_BETWEEN_LOOKS = 10.0
# Steps in a row that an fp16 scaler may skip: it halves its scale at each, and begins at 2^16
_MOST_OVERFLOWS = 40


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
    with ExitStack() as until_the_end:
        return _train(settings, resume, until_the_end)


def _train(settings: Settings, resume: RunFolder | None, until_the_end: ExitStack) -> Result:
    begun = time.monotonic()
    # 1. What is asked for, checked before anything is slow or written
    settings = with_offers(settings)
    if settings.subject.images is None or settings.subject.token is None:
        missing = "--images" if settings.subject.images is None else "--token"
        raise ConfigError(f"Training needs {missing}; for instance: train --images photos/ --token sks.")
    state = start_processes()
    if resume:
        check_places(resume, settings)
    photos = read_photos(settings.subject.images, settings.training.masked_loss)
    base = find_backbone(settings.model)
    settings, chosen = resolve(settings, base, state)
    class_pictures = refuse_early(settings, photos, base)
    training, coeff, lora = settings.training, settings.method.coeff, settings.method.lora
    steps, accumulate, batch_size = int(training.steps), int(training.accumulate), int(training.batch_size)
    left = functools.partial(training_switches, settings, state.device.type, resumed=bool(resume))
    until_the_end.enter_context(oom_hints(left))
    run = resume or _from_main(state, lambda: new_run(settings.output, str(settings.subject.token)))
    _from_main(state, lambda: refuse_unwritable(run.path, "The run folder"))
    settings = with_values(settings, {"output": str(run.path)})
    if resume and state.is_main_process:
        until_the_end.enter_context(lock_run(resume))
    checkpoint = load_checkpoint(resume) if resume else None
    if resume:
        _check_same_step(checkpoint.step if checkpoint else 0, state)
    if resume and checkpoint:
        photos, class_pictures = photos_as_begun(resume, checkpoint, photos, class_pictures)
        check_division(resume, checkpoint, settings, state.num_processes)
        check_weights(resume, checkpoint.model, fingerprints(base, DTYPES[training.precision]), base)
        check_steps(resume, checkpoint.step, steps)
    print_run_summary(settings, chosen, photos, base, run, state, class_pictures)
    judge = _from_main(state, lambda: judge_for(settings, photos), share=False)

    # 2. Photos and captions become latents and embeddings; the text encoders leave memory before the UNet comes,
    # unless a token is learned in them
    dtype = DTYPES[training.precision]
    data, previews, vae, learned = encode(settings, photos, base, dtype, state, class_pictures)

    # 3. The UNet, frozen, and what learns on it
    pipe = load_pipeline(base, dtype=dtype, parts={"unet"})
    weights = fingerprints(base, dtype)  # all its files are here now
    if resume and checkpoint:
        check_weights(resume, checkpoint.model, weights, base)
    unet, noise_scheduler = pipe.unet.to(state.device), DDPMScheduler.from_config(pipe.scheduler.config)
    prepare_kernels(state.device, dtype, unet)
    trainables = make_trainable(unet, settings, learned)
    if training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    if training.compile:
        compile_blocks(unet, state.device)

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
    adamw = make_optimizer(training.optimizer, groups)
    schedule = get_scheduler(
        training.lr_schedule, adamw, num_warmup_steps=training.warmup_steps, num_training_steps=steps
    )
    AcceleratorState._reset_state()  # or a second train() in one process could not choose its own precision
    accelerator = Accelerator(
        mixed_precision=training.precision,
        gradient_accumulation_steps=accumulate,
        log_with=trackers_for(settings, run) or None,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    # DDP refuses a network without anything to learn; a token's rows are none of its parameters
    model = accelerator.prepare_model(unet, evaluation_mode=not (trainables.alphas or trainables.lora))
    optimizer = accelerator.prepare(adamw)
    # Made now, although it is written last: what it refuses must not cost a whole run
    header = header_for(with_absolute_paths(settings), trainables, base.name, steps, weights)
    watch = Watch(run, settings, accelerator, judge)

    # 5. From the beginning, or from where it stopped
    step, loss = 0, math.nan
    samples_a_step = batch_size * accumulate * state.num_processes
    trained_on = (*photos.photos, *(class_pictures or NO_PHOTOS).photos)
    identities = [photo.identity for photo in trained_on]
    if resume:
        if checkpoint:
            step, loss = _restore(checkpoint, trainables, optimizer, schedule, accelerator.scaler, watch)
        checkpoint = None  # its tensors
        print_info(introduction(run, step, steps))
    if state.is_main_process:
        with disk_errors(f"The run folder {run.path}"):
            (store if resume else claim)(run, with_absolute_paths(settings))
        if not resume:
            until_the_end.enter_context(lock_run(run))
    state.wait_for_everyone()
    _from_main(state, lambda: start_trackers(accelerator, settings, run, step), share=False)

    def save(step: int, loss: float) -> None:
        learned = trainables.tensors()
        _check_learned(learned, step, run)
        if state.is_main_process:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}
            states = (optimizer.state_dict(), schedule.state_dict(), scaler)
            saved = Checkpoint(
                step, learned, *states, identities, samples_a_step, loss, *watch.state(), weights
            )
            save_checkpoint(run, saved, training.keep_checkpoints, functools.partial(adapter_at, step))
        state.wait_for_everyone()

    def adapter_at(step: int, folder: Path, extras: dict[str, bytes] | None = None) -> None:
        reached = header.model_copy(update={"trained_steps": step})
        write_adapter(folder, unet, reached, extras, rows=trainables.token)

    def keep(step: int, loss: float) -> None:
        _check_learned(trainables.tensors(), step, run)
        if state.is_main_process:
            reached = header.model_copy(update={"trained_steps": step})
            extras = {"README.md": model_card(reached, settings, loss, []).encode()}
            kept = run.kept_adapter(step)
            with disk_errors(f"The adapter {kept}"):
                with atomic_write(kept, durable=True) as temporary:
                    adapter_at(step, temporary, extras)
                sweep(kept.parent)
        state.wait_for_everyone()

    def preview(step: int, loss: float, log: StepLog, on_progress: Callable[[float], None]) -> list[Path]:
        files: list[Path] = []
        if previews and state.is_main_process:
            clear_dropout(trainables.coefficients)
            parts = {"unet": unet, "vae": vae, "scheduler": pipe.scheduler}
            adapter = {"path": str(run.adapter), "scale": 1.0, "kind": header.kind, "token": header.token}
            details = recipe(base) | {"adapters": [adapter | {"trained_steps": step}]}
            encoded = learned.encoded(list(previews)) if learned else previews
            files = write_previews(run.samples(step), settings, encoded, parts, details, state, on_progress)
            watch.validated(step, loss, files, log, trainables)
        watch.draw()
        state.wait_for_everyone()
        return files

    def cause(step: int, groups: list[str]) -> str:
        """Of a loss or gradient of this step that is not finite; no other process is asked."""
        shares = (
            share_of(samples_a_step, batch_size, micro, state.process_index, state.num_processes)
            for micro in range(accumulate)
        )
        batches = (data.batch(step, share, state.device) for share in shares)
        return cause_of(step, batches, unet, noise_scheduler, settings, groups)

    # 6. The loop: draw, predict, loss, backward, step; once in a while look, log, preview, save. Between two looks
    # nothing waits for a GPU (but for fp16, whose scaler has to know whether a gradient overflowed)
    reset_peak(state.device)
    alone = state.num_processes == 1
    looks = int(training.log_every) if alone else 1  # several decide at a look when the next one is
    unseen: list[Unseen] = []
    overflowed = 0  # steps in a row that an fp16 scaler has skipped
    with (
        StepLog(run.log, step, state.is_main_process) as log,
        watch,
        _interruptions() as interrupted,
        progress("training", steps) as bar,
    ):
        bar(step)
        if watch.due(step) and step < steps:
            # Its checkpoint came before its pictures: Ctrl-C, or steps were added
            preview(step, loss, log, functools.partial(_drawing, bar, step))
        looked = time.perf_counter()
        while step < steps:
            step += 1
            verify(unet)
            draw_dropout(trainables.coefficients, coeff.dropout, seed=training.seed, step=step)
            losses: list[Tensor] = []
            prior_losses: list[Tensor] = []
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
                        **loss_terms(batch, unet, settings),
                        prior_losses=prior_losses,
                    )
                    accelerator.backward(micro_loss)
                    losses.append(micro_loss.detach())
                    if accelerator.sync_gradients:
                        if learned:
                            learned.share_gradients(state)
                        norms = clip_gradients(accelerator, trainables, settings)
                    optimizer.step()
                    optimizer.zero_grad()
            skipped = accelerator.optimizer_step_was_skipped  # normal where an fp16 scaler lowers its scale
            means = {
                name: torch.stack(parts).mean()
                for name, parts in (("loss", losses), ("loss_prior", prior_losses))
                if parts
            }
            moved = {"alpha": trainables.moved(), "token": learned.moved() if learned else None}
            unseen.append(Unseen(step, means, norms, moved, schedule.get_last_lr(), skipped))
            if not skipped:
                schedule.step()
                if learned:
                    learned.stepped()

            saves = step == steps or (training.checkpoint_every and step % training.checkpoint_every == 0)
            shows = watch.due(step) and step < steps
            keeps = training.keep_adapters_every and step % training.keep_adapters_every == 0
            if not (saves or shows or keeps or len(unseen) >= looks or (alone and interrupted())):
                continue
            lines, stop = _look(unseen, interrupted(), state)
            unseen = []
            now = time.perf_counter()
            seconds, peak, looked = (now - looked) / len(lines), peak_gib(state.device), now
            if not alone:
                looks = _from_main(state, functools.partial(_next_look, seconds, int(training.log_every)))
            for line in lines:
                overflowed = overflowed + 1 if line["skipped"] else 0
                _check_finite(line, run, training.precision, overflowed, cause)
                line |= {"seconds": round(seconds, 4), "peak_gib": round(peak, 3)}
                log.write(line)
                watch.step(line)
            loss = lines[-1]["loss"]
            bar(step, _status(loss, lines[-1]["alpha"], seconds, peak))
            if keeps:
                keep(step, loss)
            if shows and not stop:
                preview(step, loss, log, functools.partial(_drawing, bar, step))
            if stop or saves:
                save(step, loss)
            if stop and step < steps:
                raise Interrupted(
                    f"Stopped after step {step}, saved in {run.checkpoint(step)}. "
                    f"Continue with: coeffdiff train --resume --output {run.path}"
                )
            looked = time.perf_counter()

    # 7. The result, before its pictures: they are worth less than it
    clear_dropout(trainables.coefficients)
    _check_learned(trainables.tensors(), step, run)

    def finish(pictures: list[Path], last: bool) -> None:
        if state.is_main_process:
            made = FinalState(header, loss, pictures, watch.scores if pictures else {})
            with disk_errors(f"The adapter {run.adapter}"), watch.choice(trainables, made, last) as made:
                card = model_card(
                    made.header, settings, made.loss, [p.name for p in made.pictures], made.scores
                )
                extras = {picture.name: picture.read_bytes() for picture in made.pictures}
                extras |= {"README.md": card.encode()}
                save_adapter(run.adapter, unet, made.header, extras, rows=trainables.token)
        state.wait_for_everyone()

    finish([], last=not previews)
    if previews:
        with progress("pictures", len(previews) * len(settings.validation.seeds)) as bar:
            pictures = preview(step, loss, log, bar)
        if state.is_main_process:
            amend_checkpoint(run, step, *watch.state())
        finish(pictures, last=True)
    else:
        watch.draw()
    watch.close()
    return Result(run.path, run.adapter, step, loss, time.monotonic() - begun)


def _restore(
    checkpoint: Checkpoint,
    trainables: Trainables,
    optimizer: Any,
    schedule: Any,
    scaler: Any,
    watch: Watch,
) -> tuple[int, float]:
    """Step and loss of a checkpoint, after loading it."""
    trainables.restore(checkpoint.tensors)
    optimizer.load_state_dict(checkpoint.optimizer)
    schedule.load_state_dict(checkpoint.schedule)
    if scaler and checkpoint.scaler:
        scaler.load_state_dict(checkpoint.scaler)
    watch.restore(checkpoint.watched, checkpoint.best)
    return checkpoint.step, checkpoint.loss


def _check_same_step(step: int, state: PartialState) -> None:
    """All machines must read the same checkpoint. Raises: ResumeError on all of them if one does not."""
    steps = gather_object([step]) if state.num_processes > 1 else [step]
    if len(set(steps)) > 1:
        raise ResumeError(
            f"The processes would continue after different steps ({steps}). Every machine needs the newest "
            "checkpoint: copy the run folder to all of them, or keep it on a shared disk."
        )


def clip_gradients(accelerator: Accelerator, trainables: Trainables, settings: Settings) -> dict[str, Tensor]:
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
            norms[name] = nn.utils.clip_grad_norm_(parameters, limit or math.inf).detach()
    return norms


@dataclass(frozen=True)
class Unseen:
    """A step that is done or on its way, and figures of it that nobody has waited for yet: 0-d tensors, or None."""

    step: int
    means: dict[str, Tensor]  # loss, and of it what the class's rows came to before their weight
    norms: dict[str, Tensor]  # of the gradients, before clipping
    moved: dict[str, Tensor | None]  # how far each part has come
    rates: list[float]
    skipped: bool


def _look(unseen: list[Unseen], stop: bool, state: PartialState) -> tuple[list[dict[str, Any]], bool]:
    """Wait for the device once, for all figures of all these steps; losses become the mean over all processes.

    Returns: a line for the log for each step, and whether any process was asked to stop.
    """
    means, norms = list(unseen[0].means), list(unseen[0].norms)
    moved = [name for name, value in unseen[0].moved.items() if value is not None]
    table = torch.stack(
        [
            torch.stack([*u.means.values(), *u.norms.values(), *(u.moved[name] for name in moved)]).float()
            for u in unseen
        ]
    )
    if state.num_processes > 1:
        of_all = table[:, : len(means)] / state.num_processes
        shared = torch.cat([of_all.flatten(), table.new_tensor([float(stop)])])
        torch.distributed.all_reduce(shared)
        table[:, : len(means)], stop = shared[:-1].view_as(of_all), bool(shared[-1] > 0)
    lines = []
    for one, row in zip(unseen, table.tolist(), strict=True):
        of_mean, rest = row[: len(means)], row[len(means) :]
        lines.append(
            {"step": one.step}
            | dict(zip(means, of_mean, strict=True))
            | {"lr": one.rates, "alpha": None}
            | dict(zip(moved, rest[len(norms) :], strict=True))
            | {"grad_norm": dict(zip(norms, rest, strict=False)), "skipped": one.skipped}
        )
    return lines, stop


def _next_look(seconds: float, most: int) -> int:
    """After how many steps, each of so many seconds, several processes look again: `most`, or fewer slow ones."""
    return max(1, min(most, int(_BETWEEN_LOOKS / max(seconds, 1e-6))))


def _check_finite(
    line: dict[str, Any],
    run: RunFolder,
    precision: str,
    overflowed: int,
    cause: Callable[[int, list[str]], str],
) -> None:
    step, groups = line["step"], list(line["grad_norm"])
    if overflowed > _MOST_OVERFLOWS:
        raise NonFiniteLoss(
            f"The gradient has overflowed in fp16 at each of the last {overflowed} steps, so nothing is learned: try "
            f"--set training.precision=bf16. {_last_good(run)}"
        )
    # With fp16 a gradient that overflows is the scaler's business: it skips the step and lowers its scale.
    if math.isfinite(line["loss"]) and (
        precision == "fp16" or all(map(math.isfinite, line["grad_norm"].values()))
    ):
        return
    what = "loss" if not math.isfinite(line["loss"]) else "gradient"
    raise NonFiniteLoss(f"The {what} is not finite at step {step}; {cause(step, groups)}. {_last_good(run)}")


def _check_learned(tensors: dict[str, Tensor], step: int, run: RunFolder) -> None:
    """Nothing that is not finite is ever saved: the step that the optimizer has just made may have overflowed."""
    broken = first_not_finite(tensors.items())
    if broken:
        raise NonFiniteLoss(
            f"{broken} is not finite after step {step}: the learning rate is too high. {_last_good(run)}"
        )


def _last_good(run: RunFolder) -> str:
    last = next(iter(run.checkpoints()), None)
    return f"The last good checkpoint is {last}." if last else "No checkpoint had been written yet."


def _from_main(state: PartialState, decide: Callable[[], Any], share: bool = True) -> Any:
    """What the main process decides, on all processes; its error is raised on all as well.

    share: False for what only the main process needs, and what cannot be sent; the others get None.
    """
    own: Any = None
    answer: list[Any] = [None]
    if state.is_main_process:
        try:
            own = decide()
            answer = [own if share else None]
        except CoeffDiffError as error:
            answer = [error]
    if state.num_processes > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], CoeffDiffError):
        raise answer[0]
    return answer[0] if share else own


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
            if is_main_process():  # even where nothing else is said
                print_error("stopping after this step (press Ctrl-C again to stop at once, without saving)")
        elif number == signal.SIGINT and now - first > 2:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: first is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
