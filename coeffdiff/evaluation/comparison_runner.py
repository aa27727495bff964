"""The worker of a comparison: its jobs are planned, trained and scored, one by one."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from coeffdiff import __version__
from coeffdiff.config.fields import EVALUATION_FIRST_SEED
from coeffdiff.config.nested import flattened
from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import with_values
from coeffdiff.errors import ConfigError, NonFiniteLoss, NonFinitePicture
from coeffdiff.evaluation.comparison_cells import MadeCells, work_folder
from coeffdiff.evaluation.comparison_facts import adapter_costs, failed_facts, place_scores, scored_facts
from coeffdiff.evaluation.comparison_plan import (
    ENDLESS,
    FORMAT,
    INDIFFERENT,
    SEED_DISTANCE,
    Comparison,
    Job,
    Point,
    deciding,
    strip_name,
)
from coeffdiff.evaluation.comparison_subjects import ComparisonSubject, find_subjects, subject_of
from coeffdiff.evaluation.facts import device_name
from coeffdiff.evaluation.prompts import choose_prompts, read_listing
from coeffdiff.evaluation.protocol import Protocol, Seen
from coeffdiff.evaluation.scoring import score_adapter
from coeffdiff.hosts.diffusers import load_adapter
from coeffdiff.method.adapter_file import read_header
from coeffdiff.method.families import text_encoders_of
from coeffdiff.metrics.encoders import encoders_for
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.fingerprints import network_fingerprint
from coeffdiff.models.kept import KeptModel
from coeffdiff.models.quantizing import check_quantizing
from coeffdiff.sampling.device import choose_device, prepare_device
from coeffdiff.sampling.options import Options, check_options
from coeffdiff.training.launch import start_processes
from coeffdiff.training.loop import train
from coeffdiff.training.resolve import free_memory, resolve
from coeffdiff.training.run_folder import RunFolder
from coeffdiff.training.trainables import versions
from coeffdiff.utils.grids import labelled_grid
from coeffdiff.utils.hashing import hash_of
from coeffdiff.utils.png import save_png


class ComparisonRunner:
    """A worker of a comparison: it keeps the base model and the encoders, plans jobs, and does one after another."""

    def __init__(self, plan: Comparison, output: Path) -> None:
        self.plan, self.output, self.made = plan, output, MadeCells(output)
        self.state = start_processes()
        self.device, self.dtype = choose_device(device=self.state.device)
        self.base = find_backbone(plan.model)
        check_quantizing(plan.model.quantize, self.device.type)
        self.encoders = encoders_for(self.base.name, plan.dino, plan.clip, self.device)
        self.model = KeptModel()
        pipe = self.lent()
        check_options(pipe, self._options())
        # The base model's pictures for drift, by prompt and seed
        self.before: dict[tuple[str, int], Seen] = {}
        networks = (pipe.unet, pipe.vae, *text_encoders_of(pipe))
        judges = (one.network for one in (self.encoders.dino, self.encoders.clip) if one)
        self.model_hashes = [network_fingerprint(network) for network in networks]
        self.model_hashes += [plan.model.quantize] if plan.model.quantize else []
        self.judge_hashes = [network_fingerprint(network) for network in judges]

    def __call__(self, job: Job | None) -> list[Job]:
        """Do a job; without one, plan them all."""
        if job is None:
            return self.jobs()
        self.work(job)
        return []

    def jobs(self) -> list[Job]:
        """All jobs of the plan, subject by subject, so that early results are complete ones."""
        subjects = list(find_subjects(self.plan.subjects, self.plan.class_word, self.output))
        protocols = {
            (subject.name, seed): self._protocol(subject, seed)
            for subject in subjects
            for seed in self.plan.seeds
        }
        return [
            self._job(arm, given, subject, seed, protocols[subject.name, seed])
            for subject in subjects
            for seed in self.plan.seeds
            for arm, given in self.plan.arms.items()
        ]

    def work(self, job: Job) -> None:
        """Train and score what is missing of a job."""
        missing = self.made.missing_points(job)
        for steps in sorted({point.steps for point in missing}):
            points = [point for point in missing if point.steps == steps]
            try:
                adapter = self._trained(job, steps) if job.settings else None
            except NonFiniteLoss as error:  # a rate that is too high is a finding, too
                for point in points:
                    self._store(job, point, failed_facts(error))
                continue
            finally:
                free_memory(self.state)
            self._score(job, adapter, points)
        if missing and job.settings:
            shutil.rmtree(work_folder(self.output, job) / "run" / "checkpoints", ignore_errors=True)

    def _trained(self, job: Job, steps: int) -> Path:
        """The adapter after so many steps, continued from an earlier one if there is any."""
        assert job.settings
        run = RunFolder(work_folder(self.output, job) / "run")
        made = read_header(run.adapter).trained_steps if run.adapter.is_dir() else 0
        if made == steps:
            return run.adapter
        for checkpoint in run.checkpoints():  # of a plan with more steps
            if checkpoint > run.checkpoint(steps):
                shutil.rmtree(checkpoint)
        resumes = run.config.is_file() and bool(run.checkpoints()) and made < steps
        if not resumes:
            shutil.rmtree(run.path, ignore_errors=True)
        settings = with_values(job.settings, {"training.steps": steps, "output": str(run.path)})
        return train(settings, resume=run if resumes else None, load=self.model.load).adapter

    def _score(self, job: Job, path: Path | None, points: Sequence[Point]) -> None:
        """Score an adapter at some scales, or the bare model."""
        photographed = subject_of(job.subject, self.plan.token)
        pipe = self.lent()
        adapter = load_adapter(pipe, path) if path else None
        prepare_device(pipe, self.device)
        for point in points:
            if adapter:
                adapter.set_scale(point.scale)
            pictures = work_folder(self.output, job) / f"pictures-{point.steps}x{point.scale:g}"
            shutil.rmtree(pictures, ignore_errors=True)  # of an interrupted try
            try:
                scored = score_adapter(
                    pipe,
                    photographed,
                    job.protocol,
                    self.encoders,
                    base=self.before,
                    folder=pictures,
                )
            except NonFinitePicture as error:  # and so is a scale
                self._store(job, point, failed_facts(error))
                continue
            self._keep_strip(job, point, pictures)
            scores = scored.data["scores"] | place_scores(self.base.name, job.protocol, pictures)
            facts = {"scores": scores} | scored_facts(scored)
            self._store(job, point, facts | (adapter_costs(path, pipe) if path else {}))

    def _store(self, job: Job, point: Point, facts: Mapping[str, Any]) -> None:
        given = flattened(self.plan.settings) | flattened(self.plan.arms[job.arm] or {})
        cell = {
            "subject": job.subject.name,
            "class_word": job.subject.class_word,
            "arm": job.arm,
            "seed": job.seed,
            "steps": point.steps,
            "scale": point.scale,
            "settings": {name: value for name, value in given.items() if not name.startswith(INDIFFERENT)},
            **facts,
            "made": {
                "date": datetime.date.today().isoformat(),
                "device": device_name(self.device),
                "precision": str(self.dtype).removeprefix("torch."),
                "model": self.base.name,
                "encoders": self.encoders.names(),
                "versions": {"coeffdiff": __version__, "python": platform.python_version()} | versions(),
            },
        }
        words = f"{job.subject.name}-{job.arm}-s{job.seed}-{point.steps}x{point.scale:g}"
        self.made.cells.write(job.cells[point], words, cell)

    def _keep_strip(self, job: Job, point: Point, pictures: Path) -> None:
        """The first picture of each prompt, side by side, for the page."""
        files = sorted(pictures.glob("*.png"))[:: job.protocol.pictures]
        row = [Image.open(file).convert("RGB") for file in files]
        save_png(labelled_grid([("", row)], cell=128), work_folder(self.output, job) / strip_name(point))

    def lent(self) -> Any:
        """The base model's pipeline, for one adapter."""
        return self.model.load(self.base, dtype=self.dtype)

    def _options(self) -> Options:
        plan = self.plan
        return Options(steps=plan.denoising_steps, guidance=plan.guidance, batch_size=plan.batch_size)

    def _protocol(self, subject: ComparisonSubject, seed: int) -> Protocol:
        plan = self.plan
        prompts = choose_prompts(
            plan.prompts,
            base_model=self.base.name,
            class_word=subject.class_word,
            listing=read_listing(subject.folder),
            limit=plan.limit,
        )
        first = EVALUATION_FIRST_SEED + SEED_DISTANCE * seed
        return Protocol(prompts, plan.pictures, plan.drift_pictures, first, self._options())

    def _job(
        self,
        arm: str,
        given: Mapping[str, Any] | None,
        subject: ComparisonSubject,
        seed: int,
        protocol: Protocol,
    ) -> Job:
        identity = (subject.identity, subject.class_word, self.plan.token)
        if given is None:
            key = hash_of(FORMAT, self.model_hashes, *identity, seed)
            return Job(arm, subject, seed, None, protocol, key, self._cells(key, protocol, [Point(0, 1.0)]))
        values = {
            "subject.images": str(subject.folder), "subject.token": self.plan.token,
            "subject.class_word": subject.class_word, "training.seed": seed, "validation.prompts": [],
            **{f"model.{name}": value for name, value in self.plan.model.model_dump().items()},
            **flattened(self.plan.settings), **flattened(dict(given)),
        }  # fmt: skip
        settings, _ = resolve(with_values(Settings(), values), self.base, self.state)
        last = int(settings.training.steps)
        early = [steps for steps in sorted(self.plan.checkpoints) if steps < last]
        if early and settings.training.lr_schedule not in ENDLESS:
            raise ConfigError(
                f"The arm {arm!r} cannot be scored after {early[0]} steps: its rate follows a schedule over all "
                f"{last} of them. Drop the checkpoints, or its training.lr_schedule."
            )
        key = hash_of(FORMAT, self.model_hashes, *identity, sorted(deciding(settings).items()))
        points = [Point(steps, scale) for steps in (*early, last) for scale in self.plan.scales]
        return Job(arm, subject, seed, settings, protocol, key, self._cells(key, protocol, points))

    def _cells(self, key: str, protocol: Protocol, points: Sequence[Point]) -> dict[Point, str]:
        """See Job. key: of its training."""
        shown = dataclasses.asdict(protocol)
        return {
            point: hash_of(FORMAT, key, dataclasses.astuple(point), shown, self.judge_hashes)
            for point in points
        }
