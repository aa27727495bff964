"""The cells of a comparison: trained and scored, one by one."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from coeffdiff import __version__
from coeffdiff.config.fields import EVALUATION_FIRST_SEED
from coeffdiff.config.nested import flattened
from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import with_values
from coeffdiff.errors import ConfigError, NonFiniteLoss, NonFinitePicture
from coeffdiff.evaluation.cells import CellFolder, slug
from coeffdiff.evaluation.comparison_plan import (
    ENDLESS,
    FORMAT,
    INDIFFERENT,
    SEED_DISTANCE,
    Comparison,
    ComparisonSubject,
    Job,
    Point,
    deciding,
    find_subjects,
    hash_of,
    subject_of,
    without_name,
)
from coeffdiff.evaluation.facts import device_name
from coeffdiff.evaluation.inspection import inspect_adapter
from coeffdiff.evaluation.prompts import choose_prompts, read_listing
from coeffdiff.evaluation.protocol import Protocol, Scored, Seen
from coeffdiff.evaluation.scoring import score_adapter
from coeffdiff.hosts.diffusers import load_adapter
from coeffdiff.method.adapter_file import read_header
from coeffdiff.metrics.encoders import encoders_for
from coeffdiff.models.files import fingerprint_of
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.loading import load_pipeline
from coeffdiff.pocket import POCKET, WEIGHTS
from coeffdiff.pocket.judges import QUESTIONS, trusted_judges
from coeffdiff.sampling.device import choose_device, prepare_device
from coeffdiff.sampling.options import Options, check_options
from coeffdiff.training.launch import start_processes
from coeffdiff.training.loop import train
from coeffdiff.training.resolve import free_memory, resolve
from coeffdiff.training.run_folder import RunFolder
from coeffdiff.training.step_log import read_log
from coeffdiff.training.trainables import versions
from coeffdiff.utils.console import muted
from coeffdiff.utils.grids import labelled_grid
from coeffdiff.utils.locks import try_lock
from coeffdiff.utils.png import save_png


class ComparisonRunner:
    """One base model, its encoders and a folder: everything that jobs have in common, loaded when it is needed."""

    def __init__(self, plan: Comparison, output: Path) -> None:
        self.plan, self.output, self.cells = plan, output, CellFolder(output / "cells")
        self.state = start_processes()
        self.device, self.dtype = choose_device(device=self.state.device)
        self.base = find_backbone(plan.model)
        self.encoders = encoders_for(self.base.name, plan.dino, plan.clip, self.device)
        self.pipe = load_pipeline(self.base, dtype=self.dtype)
        check_options(self.pipe, self._options())
        # What the base model draws for drift, of every seed
        self.before: dict[tuple[str, int], Seen] = {}
        networks = (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder, self.pipe.text_encoder_2)
        judges = (one.network for one in (self.encoders.dino, self.encoders.clip) if one)
        self.weights = [fingerprint_of(network) for network in networks]
        self.eyes = [fingerprint_of(network) for network in judges]

    def jobs(self) -> list[Job]:
        """Everything that the plan asks for: subject by subject, so that early results are whole ones."""
        sitters = list(find_subjects(self.plan.subjects, self.plan.class_word, self.output))
        protocols = {
            (sitter.name, seed): self._protocol(sitter, seed)
            for sitter in sitters
            for seed in self.plan.seeds
        }
        return [
            self._job(arm, given, sitter, seed, protocols[sitter.name, seed])
            for sitter in sitters
            for seed in self.plan.seeds
            for arm, given in self.plan.arms.items()
        ]

    def key(self, job: Job, point: Point) -> str:
        """A hash of all that decides a cell's numbers, under which it is kept whatever its arm is called."""
        protocol = dataclasses.asdict(job.protocol)
        return hash_of(FORMAT, job.key, dataclasses.astuple(point), protocol, self.eyes)

    def read(self, job: Job, point: Point) -> dict[str, Any] | None:
        """A cell under the name that this plan gives its arm; None if it is not there, or not whole."""
        cell = self.cells.read(self.key(job, point))
        return cell | {"arm": job.arm} if cell else None

    def work_folder(self, job: Job) -> Path:
        return self.output / "work" / f"{slug(f'{job.sitter.name}-{job.arm}-s{job.seed}')}-{job.key}"

    def lacks(self, job: Job) -> list[Point]:
        return [point for point in job.points if self.read(job, point) is None]

    def work(self, job: Job) -> None:
        """Train and score what is lacking of a job, unless another process is at it."""
        folder = self.work_folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        job.sitter.write_photos()
        with try_lock(folder) as mine:
            lacking = self.lacks(job) if mine is not False else []  # another may have finished it meanwhile
            for steps in sorted({point.steps for point in lacking}):
                points = [point for point in lacking if point.steps == steps]
                try:
                    adapter = self._trained(job, steps) if job.settings else None
                except NonFiniteLoss as error:  # a rate that is too high is a finding, too
                    for point in points:
                        self._store(job, point, _failed(error))
                    continue
                finally:
                    free_memory(self.state)
                self._look(job, adapter, points)
            if lacking and job.settings:
                shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)

    def _trained(self, job: Job, steps: int) -> Path:
        """The adapter of so many steps, continued from fewer if there are any."""
        assert job.settings
        run = RunFolder(self.work_folder(job) / "run")
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
        if self.device.type != "cpu":  # two models at a time are more than a training needs
            self.pipe.to("cpu")
            free_memory(self.state)
        with muted():
            return train(settings, resume=run if resumes else None).adapter

    def _look(self, job: Job, path: Path | None, points: Sequence[Point]) -> None:
        """Score an adapter at some scales, or the bare model."""
        subject = subject_of(job.sitter, self.plan.token)
        adapter = load_adapter(self.pipe, path) if path else None
        prepare_device(self.pipe, self.device)
        try:
            for point in points:
                if adapter:
                    adapter.set_scale(point.scale)
                pictures = self.work_folder(job) / f"pictures-{point.steps}x{point.scale:g}"
                shutil.rmtree(pictures, ignore_errors=True)  # of a try that was cut short
                try:
                    scored = score_adapter(
                        self.pipe, subject, job.protocol, self.encoders, base=self.before, folder=pictures
                    )
                except NonFinitePicture as error:  # and so is a scale
                    self._store(job, point, _failed(error))
                    continue
                self._keep_strip(job, point, pictures)
                scores = scored.data["scores"] | self.places(job, pictures)
                self._store(job, point, {"scores": scores} | _facts(scored) | self._cost(job, path))
        finally:
            if adapter:
                adapter.remove()

    def _store(self, job: Job, point: Point, facts: Mapping[str, Any]) -> None:
        given = flattened(self.plan.settings) | flattened(self.plan.arms[job.arm] or {})
        cell = {
            "subject": job.sitter.name,
            "class_word": job.sitter.class_word,
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
        words = f"{job.sitter.name}-{job.arm}-s{job.seed}-{point.steps}x{point.scale:g}"
        self.cells.write(self.key(job, point), words, cell)

    def _cost(self, job: Job, adapter: Path | None) -> dict[str, Any]:
        """What an adapter takes to keep and took to make."""
        if adapter is None:
            return {}
        found, lines = inspect_adapter(adapter), list(read_log(adapter.parent / "log.jsonl"))
        vectors = found.header.vectors * sum(
            encoder.config.hidden_size for encoder in (self.pipe.text_encoder, self.pipe.text_encoder_2)
        )
        cost = {
            "parameters": found.alpha_parameters + found.lora_parameters + vectors,
            "adapter_bytes": sum(n for name, n in found.files.items() if name.endswith(".safetensors")),
            "seconds_a_step": round(statistics.median(line["seconds"] for line in lines), 4),
            "peak_gib": max(line["peak_gib"] for line in lines),
        }
        if found.deviations:
            entries = torch.cat([deviation.flatten().abs() for deviation in found.deviations.values()])
            cost["mean_abs_alpha"] = round(float(entries.mean()), 5)
        return {"cost": cost}

    def places(self, job: Job, pictures: Path) -> dict[str, float]:
        """On pocket: in how many of the pictures its judges see the place that the prompt names."""
        if self.base.name != POCKET or job.protocol.prompts.name != "pocket":
            return {}
        asked = [
            next(place for place in QUESTIONS["setting"] if template.endswith(place))
            for template in job.protocol.prompts.subject
            for _ in range(job.protocol.pictures)
        ]
        seen = trusted_judges(WEIGHTS).see("setting", [Image.open(f) for f in sorted(pictures.glob("*.png"))])
        return {"place": statistics.fmean(a == b for a, b in zip(seen, asked, strict=True))}

    def _keep_strip(self, job: Job, point: Point, pictures: Path) -> None:
        """The first picture of each prompt, side by side, for the page."""
        files = sorted(pictures.glob("*.png"))[:: job.protocol.pictures]
        row = [Image.open(file).convert("RGB") for file in files]
        save_png(labelled_grid([("", row)], cell=128), self.work_folder(job) / without_name(point))

    def _options(self) -> Options:
        plan = self.plan
        return Options(steps=plan.denoising_steps, guidance=plan.guidance, batch_size=plan.batch_size)

    def _protocol(self, sitter: ComparisonSubject, seed: int) -> Protocol:
        plan = self.plan
        prompts = choose_prompts(
            plan.prompts,
            base_model=self.base.name,
            class_word=sitter.class_word,
            listing=read_listing(sitter.folder),
            limit=plan.limit,
        )
        first = EVALUATION_FIRST_SEED + SEED_DISTANCE * seed
        return Protocol(prompts, plan.pictures, plan.drift_pictures, first, self._options())

    def _job(
        self,
        arm: str,
        given: Mapping[str, Any] | None,
        sitter: ComparisonSubject,
        seed: int,
        protocol: Protocol,
    ) -> Job:
        identity = (sitter.identity, sitter.class_word, self.plan.token)
        if given is None:
            key = hash_of(FORMAT, self.weights, *identity, seed)
            return Job(arm, sitter, seed, None, protocol, (Point(0, 1.0),), key)
        values = {
            "subject.images": str(sitter.folder), "subject.token": self.plan.token,
            "subject.class_word": sitter.class_word, "training.seed": seed, "validation.prompts": [],
            **{f"model.{name}": value for name, value in self.plan.model.model_dump().items()},
            **flattened(self.plan.settings), **flattened(dict(given)),
        }  # fmt: skip
        settings, _ = resolve(with_values(Settings(), values), self.base, self.state)
        last = int(settings.training.steps)
        early = [steps for steps in sorted(self.plan.checkpoints) if steps < last]
        if early and settings.training.lr_schedule not in ENDLESS:
            raise ConfigError(
                f"The arm {arm!r} cannot be looked at after {early[0]} steps: its rate follows a schedule over all "
                f"{last} of them. Drop the checkpoints, or its training.lr_schedule."
            )
        key = hash_of(FORMAT, self.weights, *identity, sorted(deciding(settings).items()))
        points = tuple(Point(steps, scale) for steps in (*early, last) for scale in self.plan.scales)
        return Job(arm, sitter, seed, settings, protocol, points, key)


def _failed(error: Exception) -> dict[str, Any]:
    return {"failed": str(error), "scores": {}}


def _facts(scored: Scored) -> dict[str, Any]:
    """Of the scores' details what fits into a small file."""
    return {"photos": scored.data["photos"], "pictures": scored.data["pictures"]}
