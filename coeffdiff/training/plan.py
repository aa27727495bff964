"""What a run is asked for: settled and checked before anything is slow or written."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState

from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import with_values
from coeffdiff.data.batches import share_of
from coeffdiff.data.photos import NO_PHOTOS, PhotoSet
from coeffdiff.data.subjects import read_subjects, refuse_incomplete, with_offered_words
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.fingerprints import fingerprints
from coeffdiff.models.loading import Loader, load_pipeline
from coeffdiff.models.source import Backbone
from coeffdiff.training.checkpoints import Checkpoint, load_checkpoint
from coeffdiff.training.collective import check_same_step, on_main
from coeffdiff.training.continuing import (
    check_division,
    check_places,
    check_steps,
    check_weights,
    photos_as_begun,
)
from coeffdiff.training.launch import start_processes
from coeffdiff.training.memory_options import training_switches
from coeffdiff.training.refusals import refuse_early
from coeffdiff.training.resolve import DTYPES, resolve
from coeffdiff.training.run_folder import RunFolder, lock_run, new_run
from coeffdiff.utils.oom import oom_hints
from coeffdiff.utils.output_folder import refuse_unwritable


@dataclass(frozen=True)
class Plan:
    """A run that may begin.

    settings: without "auto"; chosen: what "auto" became, by dotted name; resumed: whether `run` was there before;
    load: what the base model's networks come from.
    """

    settings: Settings
    chosen: dict[str, Any]
    photos: PhotoSet
    class_pictures: PhotoSet | None
    base: Backbone
    state: PartialState
    run: RunFolder
    resumed: bool
    load: Loader = load_pipeline

    @property
    def steps(self) -> int:
        return int(self.settings.training.steps)

    @property
    def accumulate(self) -> int:
        return int(self.settings.training.accumulate)

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks that do not train."""
        return DTYPES[self.settings.training.precision]

    @property
    def samples_a_step(self) -> int:
        """Over all processes and accumulated batches."""
        return int(self.settings.training.batch_size) * self.accumulate * self.state.num_processes

    @property
    def identities(self) -> list[str]:
        """What tells photos, pictures of the class and their captions apart, in order."""
        pictures = (*self.photos.photos, *(self.class_pictures or NO_PHOTOS).photos)
        return [picture.identity for picture in pictures]

    def share(self, micro: int) -> range:
        """Indices of the step's samples that are this process's in accumulated batch `micro`."""
        batch_size, state = int(self.settings.training.batch_size), self.state
        return share_of(self.samples_a_step, batch_size, micro, state.process_index, state.num_processes)


def make_plan(
    settings: Settings, resume: RunFolder | None, until_the_end: ExitStack, load: Loader = load_pipeline
) -> tuple[Plan, Checkpoint | None]:
    """The plan, and the checkpoint that the run goes on from.

    until_the_end: takes what lasts as long as the run, such as the lock of a run that is resumed.
    Raises: CoeffDiffError in one sentence for whatever keeps the run from beginning.
    """
    settings = with_offered_words(settings)
    refuse_incomplete(settings)
    state = start_processes()
    if resume:
        check_places(resume, settings)
    photos = read_subjects(settings)
    base = find_backbone(settings.model)
    settings, chosen = resolve(settings, base, state)
    class_pictures = refuse_early(settings, photos, base)
    options_left = functools.partial(training_switches, settings, state.device.type, resumed=bool(resume))
    until_the_end.enter_context(oom_hints(options_left))
    run = resume or on_main(state, lambda: new_run(settings.output, str(settings.run_name)))
    on_main(state, lambda: refuse_unwritable(run.path, "The run folder"))
    settings = with_values(settings, {"output": str(run.path)})
    if resume and state.is_main_process:
        until_the_end.enter_context(lock_run(resume))
    plan = Plan(settings, chosen, photos, class_pictures, base, state, run, bool(resume), load)
    return _as_begun(plan) if resume else (plan, None)


def _as_begun(plan: Plan) -> tuple[Plan, Checkpoint | None]:
    """The plan of a run that is resumed, with its photos in their first order. Raises: ResumeError."""
    checkpoint = load_checkpoint(plan.run)
    check_same_step(checkpoint.step if checkpoint else 0, plan.state)
    if checkpoint is None:
        return plan, None
    photos, class_pictures = photos_as_begun(plan.run, checkpoint.photos, plan.photos, plan.class_pictures)
    check_division(plan.run, checkpoint, plan.settings, plan.state.num_processes)
    check_weights(plan.run, checkpoint.model, fingerprints(plan.base, plan.dtype), plan.base)
    check_steps(plan.run, checkpoint.step, plan.steps)
    return dataclasses.replace(plan, photos=photos, class_pictures=class_pictures), checkpoint
