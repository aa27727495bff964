"""Methods side by side: what is trained and scored for a comparison, cell by cell; what the cells say together is
paired.py's, the page report.py's.

A cell is one adapter on one subject, trained with one seed for so many steps and scored at one scale. Its key is a
hash of all that decides it (weights, photos, settings, prompts, seeds), so that whatever has been computed anywhere
is never computed again, and several processes or machines can fill one folder:

    asked.yaml             the plan as it was asked for last
    cells/*.json           a cell each; all that a comparison is made of
    cells/*.jsonl          cells that were packed, a line each; see cells.py
    work/*/                photos, a run and its pictures each; may be thrown away when the cells are there
    comparison.json, .csv, .png, report.html
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import platform
import re
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field, field_validator, model_validator

from coeffdiff import __version__, backbone, sampling
from coeffdiff.config import (
    EVALUATION_FIRST_SEED,
    ModelSettings,
    PlaceOrName,
    Section,
    Seed,
    Settings,
    as_tree,
    flattened,
    save_settings,
    with_values,
)
from coeffdiff.console import hushed, progress, say
from coeffdiff.data.photos import read_photos
from coeffdiff.errors import (
    ConfigError,
    Interrupted,
    LaunchError,
    NonFiniteLoss,
    NonFinitePicture,
    PhotoError,
)
from coeffdiff.evaluation.cells import CellFolder, slug
from coeffdiff.evaluation.evaluate import Protocol, Scored, Seen, Subject, device_name, score_adapter
from coeffdiff.evaluation.paired import summarize, table_of
from coeffdiff.evaluation.prompts import LISTING, choose_prompts, read_listing
from coeffdiff.evaluation.report import write_comparison
from coeffdiff.files import appearing, held, refuse_unwritable
from coeffdiff.inspection import inspect_adapter
from coeffdiff.launched import read_launch
from coeffdiff.method.adapter import load_adapter, read_header
from coeffdiff.metrics import encoders_for
from coeffdiff.pictures import labelled_grid, save_png
from coeffdiff.pocket import POCKET, WEIGHTS
from coeffdiff.pocket.judges import QUESTIONS, trusted_judges
from coeffdiff.pocket.world import subjects
from coeffdiff.training.launch import start_processes
from coeffdiff.training.loop import train
from coeffdiff.training.prepare import free_memory, resolve, versions
from coeffdiff.training.state import RunFolder, read_log

FORMAT = 1  # of a cell; goes up when the same key would mean other numbers
SEED_DISTANCE = 10_000  # between the first seeds of the pictures of two training seeds

# What a training setting may differ in without a number of a cell changing.
_INDIFFERENT = (
    "model.",  # its weights count, not where they lie
    "subject.images",
    "photos.cache",
    "training.steps",  # a cell has its own
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.keep_adapters_every",
    "training.log_every",
    "validation.",
    "tracking.",
    "output",
)

_ENDLESS = ("constant", "constant_with_warmup")  # schedules that know nothing of the steps to come
# What compare says itself, for every arm alike
_OWN = (
    "model.", "subject.images", "subject.token", "subject.class_word", "training.seed", "validation.", "output",
)  # fmt: skip


class Comparison(Section):
    """What is to be compared; a plan file holds it as YAML."""

    model: ModelSettings = ModelSettings()
    subjects: PlaceOrName = Field(
        "dev",
        description="of pocket's own dev, eval, fresh:N (fresh:N@SEED) or names with commas between them; or a folder: "
        "a data set in DreamBooth's layout, a folder of folders of photos, or one folder of photos",
    )
    token: str = Field("sks", description="the word that means the subject, in every arm")
    class_word: str | None = Field(None, description="of subjects for which no list of classes has one")
    arms: dict[str, dict[str, Any] | None] = Field(
        {
            "base": None,
            "lora": {"method.kind": "lora"},
            "coeff": {"method.kind": "coeff"},
            "coeff+lora": {"method.kind": "coeff+lora"},
        },
        min_length=1,
        description="name -> settings of training, by dotted name; null is the model without an adapter. Arms named "
        "`lora 1e-3` and `lora 3e-3` are tries of `lora`, of which the report names the best",
        examples=[{"lora": {"method.kind": "lora", "method.lora.rank": 4}}],
    )
    settings: dict[str, Any] = Field(
        {},
        description="settings of every arm that trains, by dotted name",
        examples=[{"training.steps": 500}],
    )
    reference: str = Field("lora", description="arm that the others are paired with")
    seeds: list[Seed] = Field([0, 1], min_length=1, description="of training; pictures have others by each")
    checkpoints: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="steps at which adapters are scored besides the last", examples=[[100]]
    )
    scales: list[float] = Field([1.0], min_length=1, description="that adapters are scored at")
    prompts: PlaceOrName = Field("auto", description="as in evaluate")
    limit: int | None = Field(10, ge=1, description="at most so many prompts, spread over the list")
    pictures: int = Field(1, ge=1, description="for each prompt")
    drift_pictures: int = Field(1, ge=0, description="for each prompt without the token")
    denoising_steps: int = Field(25, ge=1, description="of every picture")
    guidance: float = Field(5.0, ge=0, description="classifier-free guidance of every picture")
    batch_size: int = Field(5, ge=1, description="pictures made at a time")
    dino: PlaceOrName | None = Field(None, description="as in evaluate")
    clip: PlaceOrName | None = Field(None, description="as in evaluate")

    @field_validator("seeds", "checkpoints", "scales")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) < len(values):
            raise ValueError("it names a value twice")
        return values

    @model_validator(mode="after")
    def _arms_are_comparable(self) -> Comparison:
        for given in (self.settings, *self.arms.values()):
            own = next((name for name in flattened(given or {}) if name.startswith(_OWN)), None)
            if own:
                raise ValueError(
                    f"{own} cannot be set for arms: the comparison says it, and for all of them alike"
                )
        if self.reference not in self.arms:
            raise ValueError(f"the reference {self.reference!r} is none of the arms {', '.join(self.arms)}")
        return self

    def only(self, arms: Sequence[str]) -> Comparison:
        """The same with these arms and the reference. Raises: ConfigError for an arm that it has not."""
        for arm in arms:
            if arm not in self.arms:
                raise ConfigError(f"The plan has no arm {arm!r}; it has {', '.join(self.arms)}.")
        kept = {arm: given for arm, given in self.arms.items() if arm in (*arms, self.reference)}
        return self.model_copy(update={"arms": kept})


@dataclass(frozen=True)
class Sitter:
    """A subject of a comparison. identity: what tells its photos from others', the same on every machine."""

    name: str
    folder: Path
    class_word: str | None
    identity: str
    made_up: subjects.Subject | None = None

    def write_photos(self) -> None:
        """Of one of pocket's own, if they are not there yet."""
        if self.made_up and not self.folder.is_dir():
            with appearing(self.folder) as unfinished:
                subjects.write_photos(self.made_up, unfinished, masks=True)


@dataclass(frozen=True)
class Point:
    """Where an adapter is looked at."""

    steps: int
    scale: float


@dataclass(frozen=True)
class Job:
    """An arm on a subject with a seed. settings: resolved, of its training; None for the bare model."""

    arm: str
    sitter: Sitter
    seed: int
    settings: Settings | None
    protocol: Protocol
    points: tuple[Point, ...]
    key: str  # of all that decides the training

    @property
    def label(self) -> str:
        return f"{self.sitter.name}, {self.arm}, seed {self.seed}"

    @property
    def end(self) -> Point:
        """What the arm is judged by: its last step, at the scale nearest to 1."""
        last = max(point.steps for point in self.points)
        return min(
            (point for point in self.points if point.steps == last), key=lambda point: abs(point.scale - 1.0)
        )


@dataclass(frozen=True)
class Outcome:
    """What compare() leaves. results is what comparison.json holds; missing names cells that are not there."""

    folder: Path
    report: Path
    results: dict[str, Any]
    missing: list[str]


def compare(
    plan: Comparison, output: Path, part: tuple[int, int] = (1, 1), pack_as: str | None = None
) -> Outcome:
    """Compute what is missing of a plan's cells, and write what all of them say.

    Args:
        output: folder of the comparison; cells that are in it are not computed again.
        part: (k, n): only every n-th subject and seed, from the k-th on, for machines that share no folder, all of one
            kind (the precision is a part of a cell). Processes that share a folder need nothing: each takes jobs that
            no other is at.
        pack_as: name of the file below cells/ that the plan's cells are packed into at the end, without .jsonl; None
            leaves each in a file of its own, which is easier to gather from several machines.
    Raises: CoeffDiffError with one sentence; what is finished stays.
    """
    if read_launch().size > 1:
        raise LaunchError(
            "compare shares its work among processes that are started one by one: start the same command several "
            "times (each with a GPU of its own in CUDA_VISIBLE_DEVICES), without accelerate launch."
        )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; name another --output.")
    refuse_unwritable(output)
    _check(plan)
    studio = Studio(plan, output)
    jobs = studio.jobs()
    output.mkdir(parents=True, exist_ok=True)
    with appearing(output / "asked.yaml") as unfinished:
        save_settings(plan, unfinished)
    # All arms of a subject and seed stay together: they share the base model's pictures, and are compared
    share = [job for i, job in enumerate(jobs) if i // len(plan.arms) % part[1] == part[0] - 1]
    lacking = [job for job in share if studio.lacks(job)]
    cells = sum(len(job.points) for job in jobs)
    say(
        f"plan     {cells} cells, {cells - sum(len(studio.lacks(job)) for job in jobs)} of them computed before"
    )
    try:
        with progress("trainings", len(lacking)) as bar:
            for number, job in enumerate(lacking):
                bar(number, job.label)
                studio.work(job)
            bar(len(lacking))
    except Interrupted:
        _conclude(plan, studio, jobs)
        raise Interrupted("Stopped, and the step is saved. The same command goes on from there.") from None
    except Exception:
        with suppress(Exception):  # what went wrong first is what there is to be told
            _conclude(plan, studio, jobs)
        raise
    outcome = _conclude(plan, studio, jobs)
    if pack_as:
        studio.cells.pack(pack_as, (studio.key(job, point) for job in jobs for point in job.points))
    return outcome


def _check(plan: Comparison) -> None:
    """What can be wrong with a plan, before a model is loaded. Raises: ConfigError."""
    _made_up_or_folder(plan.subjects)
    for arm, given in plan.arms.items():
        if given is not None:
            try:
                with_values(Settings(), flattened(plan.settings) | flattened(given))
            except ConfigError as error:
                raise ConfigError(f"The arm {arm!r}: {error}") from None


def _conclude(plan: Comparison, studio: Studio, jobs: Sequence[Job]) -> Outcome:
    """Read every cell of the plan that is there, and write the summary, the table, the plot and the page."""
    found: list[dict[str, Any]] = []
    missing: list[str] = []
    for job in jobs:
        for point in job.points:
            cell = studio.read(job, point)
            if cell:
                found.append(cell)
            else:
                missing.append(f"{job.label}, {point.steps} steps at scale {point.scale:g}")
    ends = {job.arm: job.end for job in jobs}
    results = summarize(
        found, {arm: (end.steps, end.scale) for arm, end in ends.items()}, plan.reference, missing
    )
    output, report = studio.output, studio.output / "report.html"
    with appearing(output / "comparison.json") as unfinished:
        unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with appearing(output / "comparison.csv") as unfinished:
        unfinished.write_text(table_of(found), encoding="utf-8")
    for sitter in {job.sitter.name: job.sitter for job in jobs}.values():
        sitter.write_photos()
    photos = {job.sitter.name: job.sitter.folder for job in jobs}
    strips = {
        (job.sitter.name, job.arm): strip
        for job in reversed(jobs)
        if (strip := studio.work_folder(job) / _strip_name(job.end)).is_file()
    }
    write_comparison(results, found, photos, strips, output)
    return Outcome(output, report, results, missing)


class Studio:
    """One base model, its encoders and a folder: everything that jobs have in common, loaded when it is needed."""

    def __init__(self, plan: Comparison, output: Path) -> None:
        self.plan, self.output, self.cells = plan, output, CellFolder(output / "cells")
        self.state = start_processes()
        self.device, self.dtype = sampling.choose_device(device=self.state.device)
        self.base = backbone.find_backbone(plan.model)
        self.encoders = encoders_for(self.base.name, plan.dino, plan.clip, self.device)
        self.pipe = backbone.load_pipeline(self.base, dtype=self.dtype)
        sampling.check_options(self.pipe, self._options())
        # What the base model draws for drift, of every seed
        self.before: dict[tuple[str, int], Seen] = {}
        networks = (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder, self.pipe.text_encoder_2)
        judges = (one.network for one in (self.encoders.dino, self.encoders.clip) if one)
        self.weights = [backbone.fingerprint_of(network) for network in networks]
        self.eyes = [backbone.fingerprint_of(network) for network in judges]

    def jobs(self) -> list[Job]:
        """Everything that the plan asks for: subject by subject, so that early results are whole ones."""
        sitters = list(find_sitters(self.plan.subjects, self.plan.class_word, self.output))
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
        return _hash(FORMAT, job.key, dataclasses.astuple(point), protocol, self.eyes)

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
        with held(folder) as mine:
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
        with hushed():
            return train(settings, resume=run if resumes else None).adapter

    def _look(self, job: Job, path: Path | None, points: Sequence[Point]) -> None:
        """Score an adapter at some scales, or the bare model."""
        subject = subject_of(job.sitter, self.plan.token)
        adapter = load_adapter(self.pipe, path) if path else None
        sampling.prepare_device(self.pipe, self.device)
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
            "settings": {name: value for name, value in given.items() if not name.startswith(_INDIFFERENT)},
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
        save_png(labelled_grid([("", row)], cell=128), self.work_folder(job) / _strip_name(point))

    def _options(self) -> sampling.Options:
        plan = self.plan
        return sampling.Options(
            steps=plan.denoising_steps, guidance=plan.guidance, batch_size=plan.batch_size
        )

    def _protocol(self, sitter: Sitter, seed: int) -> Protocol:
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
        self, arm: str, given: Mapping[str, Any] | None, sitter: Sitter, seed: int, protocol: Protocol
    ) -> Job:
        identity = (sitter.identity, sitter.class_word, self.plan.token)
        if given is None:
            key = _hash(FORMAT, self.weights, *identity, seed)
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
        if early and settings.training.lr_schedule not in _ENDLESS:
            raise ConfigError(
                f"The arm {arm!r} cannot be looked at after {early[0]} steps: its rate follows a schedule over all "
                f"{last} of them. Drop the checkpoints, or its training.lr_schedule."
            )
        key = _hash(FORMAT, self.weights, *identity, sorted(deciding(settings).items()))
        points = tuple(Point(steps, scale) for steps in (*early, last) for scale in self.plan.scales)
        return Job(arm, sitter, seed, settings, protocol, points, key)


def deciding(settings: Settings) -> dict[str, Any]:
    """The resolved settings that decide what a training comes to; those of methods that take no part are left out."""
    kind = settings.method.kind
    learning = {"coeff": "coeff" in kind, "lora": "lora" in kind, "token": settings.learns_token}
    idle = tuple(f"method.{name}." for name, learns in learning.items() if not learns)
    flat = flattened(as_tree(settings))
    found = {name: value for name, value in flat.items() if not name.startswith((*_INDIFFERENT, *idle))}
    if settings.training.lr_schedule not in _ENDLESS:
        found["training.steps"] = settings.training.steps
    if settings.prior.images:
        found["prior.images"] = [photo.identity for photo in read_photos(settings.prior.images).photos]
    return found


def find_sitters(wanted: str, class_word: str | None, output: Path) -> Iterator[Sitter]:
    """The subjects that a plan names; the photos of pocket's own, once they are written, lie below `output`.

    Raises: ConfigError or PhotoError for what there is not.
    """
    own, root = _made_up_or_folder(wanted)
    if own:
        for subject in own:
            folder = output / "work" / "photos" / subject.name
            yield Sitter(subject.name, folder, subject.class_word, repr(_rounded(subject)), subject)
        return
    listing = read_listing(root)  # in it, or beside it where it is one subject's folder
    classes = listing.classes if listing else {}
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and folder.name[0] != "."]
    if listing and listing.file.parent == root:
        folders = [folder for folder in folders if folder.name in classes]
        if not folders:
            raise PhotoError(f"None of the subjects that {root / LISTING} names has a folder in {root}.")
    for folder in folders or [root]:
        own_class = classes.get(folder.name) or class_word
        identity = _hash([photo.identity for photo in read_photos(folder).photos])
        yield Sitter(folder.name, folder, own_class, identity)


def _rounded(value: Any) -> Any:
    """A subject with its numbers to four decimals: the last digits of those that torch computes are a processor's."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_rounded(part) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _rounded(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def _made_up_or_folder(wanted: str) -> tuple[list[subjects.Subject], Path]:
    """Those of pocket's own that are meant, or a folder that is there. Raises: ConfigError for neither."""
    own, root = _made_up(wanted), Path(wanted)
    if not own and not root.is_dir():
        raise ConfigError(
            f"There are no subjects {wanted!r}: dev, eval, fresh:N or names of pocket's own, or a folder of photos."
        )
    return own, root


def _made_up(wanted: str) -> list[subjects.Subject]:
    """Those of pocket's own that are meant, or none."""
    fresh = re.fullmatch(r"fresh:(\d+)(?:@(\d+))?", wanted)
    if fresh:
        first = int(fresh[2] or 0)
        return [subjects.fresh_subject(seed) for seed in range(first, first + int(fresh[1]))]
    if wanted in ("dev", "eval"):
        return list(subjects.DEV if wanted == "dev" else subjects.EVAL)
    names = wanted.split(",")
    return [subjects.SUBJECTS[name] for name in names] if set(names) <= set(subjects.SUBJECTS) else []


def subject_of(sitter: Sitter, token: str) -> Subject:
    photos = read_photos(sitter.folder).photos
    return Subject(sitter.name, photos, [photo.open_mask() for photo in photos], token, sitter.class_word)


def _failed(error: Exception) -> dict[str, Any]:
    return {"failed": str(error), "scores": {}}


def _facts(scored: Scored) -> dict[str, Any]:
    """Of the scores' details what fits into a small file."""
    return {"photos": scored.data["photos"], "pictures": scored.data["pictures"]}


def _hash(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _strip_name(point: Point) -> str:
    return f"strip-{point.steps}x{point.scale:g}.png"
