"""train(): photos in, adapter out. Accelerate owns devices, precision and processes."""

from __future__ import annotations

import functools
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from coeffdiff.config.schema import Settings
from coeffdiff.errors import Interrupted
from coeffdiff.models.loading import Loader, load_pipeline
from coeffdiff.training.blame import cause_of
from coeffdiff.training.checkpoints import Checkpoint, amend_checkpoint
from coeffdiff.training.collective import on_main
from coeffdiff.training.continuing import introduction, with_absolute_paths
from coeffdiff.training.finite import check_finite
from coeffdiff.training.inputs import Inputs, encode
from coeffdiff.training.judge import judge_for
from coeffdiff.training.memory import reset_peak
from coeffdiff.training.metric_buffer import MetricBuffer
from coeffdiff.training.network import Network, build_network
from coeffdiff.training.plan import Plan, make_plan
from coeffdiff.training.run_folder import RunFolder, claim, disk_errors, lock_run, store
from coeffdiff.training.run_outputs import RunOutputs
from coeffdiff.training.run_summary import print_findings, print_run_summary
from coeffdiff.training.step import make_step
from coeffdiff.training.step_log import StepLog
from coeffdiff.training.trackers import start_trackers
from coeffdiff.training.watch import Watch
from coeffdiff.utils.console import Bar, print_info, progress
from coeffdiff.utils.interruptions import stoppable

STOPPING = "stopping after this step (press Ctrl-C again to stop at once, without saving)"


@dataclass(frozen=True)
class Result:
    """What a finished run leaves. seconds is the wall time of this call, loading included."""

    run: Path
    adapter: Path
    steps: int
    loss: float
    seconds: float


def train(settings: Settings, *, resume: RunFolder | None = None, load: Loader = load_pipeline) -> Result:
    """Teach the model of `settings` its subject.

    Args:
        settings: subject.images and subject.token must be set; "auto" values are resolved here.
        resume: a run to continue from its newest checkpoint; the settings are then its own.
        load: what gives the base model's networks, such as KeptModel.load; as load_pipeline does.
    Returns: where the adapter is.
    Raises: CoeffDiffError with one sentence for the user; Interrupted after Ctrl-C, with a checkpoint saved.
    """
    begun = time.monotonic()
    with ExitStack() as until_the_end:
        plan, checkpoint = make_plan(settings, resume, until_the_end, load)
        print_run_summary(plan)
        print_findings(plan)
        judge = on_main(plan.state, lambda: judge_for(plan.settings, plan.photos), share=False)

        # The text encoders leave memory before the UNet comes, unless they or a token in them are learned
        inputs = encode(plan)
        network = build_network(plan, inputs, checkpoint)
        watch = Watch(plan.run, plan.settings, network.accelerator, judge)
        outputs = RunOutputs(plan, inputs, network, watch)

        step, loss = _begin(plan, network, watch, checkpoint, until_the_end)
        del checkpoint  # its tensors
        loss, log = _loop(plan, inputs, network, outputs, watch, step, loss)
        _finish(plan, inputs, outputs, watch, loss, log)
    return Result(plan.run.path, plan.run.adapter, plan.steps, loss, time.monotonic() - begun)


def _begin(
    plan: Plan, network: Network, watch: Watch, checkpoint: Checkpoint | None, until_the_end: ExitStack
) -> tuple[int, float]:
    """Claim the run folder, or go on from a checkpoint. Returns: the step that is done, and its loss."""
    step, loss = 0, math.nan
    if checkpoint:
        network.restore(checkpoint)
        watch.restore(checkpoint.watched, checkpoint.best)
        step, loss = checkpoint.step, checkpoint.loss
    if plan.resumed:
        print_info(introduction(plan.run, step, plan.steps))
    if plan.state.is_main_process:
        with disk_errors(f"The run folder {plan.run.path}"):
            (store if plan.resumed else claim)(plan.run, with_absolute_paths(plan.settings))
        if not plan.resumed:
            until_the_end.enter_context(lock_run(plan.run))
    plan.state.wait_for_everyone()
    start = functools.partial(start_trackers, network.accelerator, plan.settings, plan.run, step)
    on_main(plan.state, start, share=False)
    return step, loss


def _loop(
    plan: Plan,
    inputs: Inputs,
    network: Network,
    outputs: RunOutputs,
    watch: Watch,
    step: int,
    loss: float,
) -> tuple[float, StepLog]:
    """Steps until the last; once in a while flush figures, log, keep, preview, save.

    Returns: the last loss, and the log. Raises: NonFiniteLoss, Interrupted.
    """
    training, alone = plan.settings.training, plan.state.num_processes == 1
    reset_peak(plan.state.device)
    overflowed = 0  # steps in a row that an fp16 scaler has skipped
    with (
        StepLog(plan.run.log, step, plan.state.is_main_process) as log,
        watch,
        stoppable(STOPPING) as stopping,
        stopping.saved_first(),
        progress("training", plan.steps) as bar,
    ):
        bar(step)
        if watch.due(step) and step < plan.steps:
            # Its checkpoint came before its pictures: Ctrl-C, or steps were added
            outputs.preview(step, loss, log, functools.partial(_drawing, bar, step))
        buffer = MetricBuffer(int(training.log_every), plan.state)
        while step < plan.steps:
            step += 1
            buffer.add(make_step(step, plan, inputs, network))
            saves = step == plan.steps or _every(training.checkpoint_every, step)
            shows = watch.due(step) and step < plan.steps
            keeps = _every(training.keep_adapters_every, step)
            if not (saves or shows or keeps or buffer.due or (alone and stopping.asked)):
                continue
            lines, stop, seconds, peak = buffer.flush(stopping.asked)
            for line in lines:
                overflowed = overflowed + 1 if line["skipped"] else 0
                cause = functools.partial(_cause, plan, inputs, network)
                check_finite(line, plan.run, training.precision, overflowed, cause)
                log.write(line)
                watch.step(line)
            loss = lines[-1]["loss"]
            bar(step, _status(loss, lines[-1]["alpha"], seconds, peak))
            if keeps:
                outputs.keep(step, loss)
            if shows and not stop:
                outputs.preview(step, loss, log, functools.partial(_drawing, bar, step))
            if stop or saves:
                outputs.save(step, loss)
            if stop and step < plan.steps:
                raise Interrupted(
                    f"Stopped after step {step}, saved in {plan.run.checkpoint(step)}. "
                    f"Continue with: coeffdiff train --resume --output {plan.run.path}"
                )
            buffer.restart()
    return loss, log


def _finish(plan: Plan, inputs: Inputs, outputs: RunOutputs, watch: Watch, loss: float, log: StepLog) -> None:
    """The result, before its pictures: they are worth less than it."""
    outputs.finish(plan.steps, loss, [], last=not inputs.previews)
    if inputs.previews:
        with progress("pictures", len(inputs.previews) * len(plan.settings.validation.seeds)) as bar:
            pictures = outputs.preview(plan.steps, loss, log, bar)
        if plan.state.is_main_process:
            amend_checkpoint(plan.run, plan.steps, *watch.state())
        outputs.finish(plan.steps, loss, pictures, last=True)
    else:
        watch.draw()
    watch.close()


def _cause(plan: Plan, inputs: Inputs, network: Network, step: int, groups: list[str]) -> str:
    """Of a loss or gradient of this step that is not finite; no other process is asked."""
    batches = (
        inputs.data.batch(step, plan.share(micro), plan.state.device) for micro in range(plan.accumulate)
    )
    return cause_of(step, batches, network.unet, network.noise_scheduler, plan.settings, groups)


def _every(steps: int | None, step: int) -> bool:
    return bool(steps and step % steps == 0)


def _status(loss: float, moved: float | None, seconds: float, peak: float) -> str:
    alpha = "" if moved is None else f"  |alpha| {moved:.4f}"
    return f"loss {loss:.4f}{alpha}  {seconds:.2f} s/step  {peak:.1f} GiB"


def _drawing(bar: Bar, step: int, done: float) -> None:
    bar(step, f"making validation pictures, {done:.1f} done")
