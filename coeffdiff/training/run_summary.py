"""What a run is about to do, printed before it begins."""

from __future__ import annotations

import torch

from coeffdiff.config.auto import learning_rates
from coeffdiff.preflight.check import check
from coeffdiff.preflight.report import lines
from coeffdiff.training.plan import Plan
from coeffdiff.training.prior import print_prior
from coeffdiff.utils.console import print_info
from coeffdiff.utils.threads import waiting

TIMING_SECONDS = 0.3  # for how long operations are timed before a run; `coeffdiff check` takes longer


def print_run_summary(plan: Plan) -> None:
    """Everything that was found and decided, before anything slow begins."""
    settings, photos, state = plan.settings, plan.photos, plan.state
    training = settings.training
    quantized = f", {plan.base.quantize}" if plan.base.quantize else ""
    print_info(f"model    {plan.base.name}{quantized}")
    left_out = f", {len(photos.skipped)} left out" if photos.skipped else ""
    if settings.subjects:
        print_info(f"subjects {len(settings.subjects)} with equal shares of the samples{left_out}")
    for number, subject in enumerate(settings.each_subject):
        count = sum(photo.subject == number for photo in photos.photos)
        of_which = f" of {subject.token}" if settings.subjects else left_out
        print_info(f"photos   {count} in {subject.images}{of_which}")
    for skipped in photos.skipped:
        print_info(f"         left out {skipped.path.name}: {skipped.reason}")
    for note in photos.notes:
        print_info(f"         {note}")
    if masked := sum(photo.mask is not None for photo in photos.photos):
        print_info(
            f"masks    for {masked} of {len(photos.photos)} photos; errors outside weigh {training.outside_mask:g}"
        )
    print_prior(settings, plan.class_pictures)
    batch = f"batch {training.batch_size} x {training.accumulate} accumulated x {state.num_processes} process"
    method = settings.method
    control = ", mixing values" if "coeff" in method.kind and method.coeff.mixes == "values" else ""
    on_text = (
        f", {' and '.join(method.on_text_encoders)} on the text encoders too"
        if method.on_text_encoders
        else ""
    )
    print_info(
        f"method   {settings.trained_kind}{control}{on_text}, {training.steps} steps, "
        f"{batch}{'es' if state.num_processes > 1 else ''}"
    )
    used = learning_rates(settings)
    chosen = {n: value for n, value in plan.chosen.items() if not n.endswith("learning_rate") or n in used}
    if chosen:
        print_info("auto     " + ", ".join(f"{name} {value}" for name, value in chosen.items()))
    print_info(f"run      {plan.run.path} on {state.device.type}, precision {training.precision}")
    if state.device.type == "cpu":
        print_info(f"threads  {torch.get_num_threads()}, {waiting()}")


def print_findings(plan: Plan) -> None:
    """What `coeffdiff check` would find, by the main process."""
    if plan.state.is_main_process:
        report = check(
            plan.settings,
            plan.photos,
            plan.base,
            plan.state.device,
            budget_seconds=TIMING_SECONDS,
            class_pictures=plan.class_pictures,
        )
        for line in lines(report.findings):
            print_info(line)
