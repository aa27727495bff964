"""How good adapters are: DreamBooth's protocol, drift beside it, and files with all of it; the page is report.py's.

    score_adapter(pipe, subject, protocol, encoders)     one adapter, or the bare model, on one subject: plain data
    evaluate(runs, ...)                                  runs in, a folder with JSON, CSV, pictures and a page out

Source of the protocol: DreamBooth (arXiv 2208.12242), section 4. Drift is ours: how far pictures of prompts without
the token move from the base model's of the same seed, for the subject's class and for what has nothing to do with it.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from coeffdiff import __version__, backbone, opening, sampling
from coeffdiff.config import EVALUATION_FIRST_SEED
from coeffdiff.console import progress, say
from coeffdiff.data.photos import Photo, fill, read_photos
from coeffdiff.errors import AdapterError, ConfigError, PhotoError
from coeffdiff.evaluation.prompts import (
    LISTING,
    Prompts,
    choose_prompts,
    parse_listing,
    read_listing,
    without_token,
)
from coeffdiff.evaluation.report import RunPage, write_report
from coeffdiff.files import appearing, refuse_unwritable
from coeffdiff.method.adapter import (
    AdapterHeader,
    check_architecture,
    load_adapter,
    loaded_adapters,
    read_header,
)
from coeffdiff.method.finding import find_adapter, run_of
from coeffdiff.metrics import (
    Encoders,
    References,
    diversity,
    drift,
    encoders_for,
    joined,
    mean_cosine_among,
    mean_paired_cosine,
    mean_pairwise_cosine,
    references_of,
)
from coeffdiff.pictures import fitted, save_png
from coeffdiff.processes import Team
from coeffdiff.training.state import RunFolder

# Of the class: every k-th, so the first six of fewer than twelve (to spread them better would be another FORMAT of
# comparisons' cells); of the unrelated all
DRIFT_PROMPTS = 6
THUMBNAIL = 288  # pixels; pages are for phones

ONE_PROCESS = Team()
OPTIONS = sampling.Options()


@dataclass(frozen=True)
class Subject:
    """Photos [M] and masks (one for each photo, or None) of what an adapter has learned, and how it is called."""

    name: str
    photos: Sequence[Photo]
    masks: Sequence[Image.Image | None]
    token: str
    class_word: str | None


@dataclass(frozen=True)
class Protocol:
    """What is asked for: `pictures` of each prompt for the subject, `drift_pictures` of each without the token.

    The p-th picture of the n-th prompt has the seed first_seed + n * pictures + p, whoever makes it, so that arms
    share their noise and no two prompts of a group do (the subject's, its class's, the unrelated).
    """

    prompts: Prompts
    pictures: int = 4
    drift_pictures: int = 2
    first_seed: int = EVALUATION_FIRST_SEED
    options: sampling.Options = OPTIONS

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise ConfigError(f"An evaluation needs at least 1 picture of each prompt, not {self.pictures}.")
        if self.drift_pictures < 0:
            raise ConfigError(f"There cannot be {self.drift_pictures} pictures of a prompt.")
        if self.first_seed < EVALUATION_FIRST_SEED:
            raise ConfigError(
                f"The seeds of evaluation begin at {EVALUATION_FIRST_SEED}, those below are training's and "
                f"validation's; {self.first_seed} is one of them."
            )


@dataclass(frozen=True)
class Asked:
    """A picture to be made. group: subject, class or unrelated; text: the prompt without the token."""

    group: str
    prompt: str
    text: str
    seed: int

    @property
    def request(self) -> sampling.Request:
        return sampling.Request(self.prompt, self.seed)


@dataclass(frozen=True)
class Seen:
    """A picture that was made, as the encoders see it ([D] each), and small, as JPEG."""

    features: Mapping[str, Tensor]
    thumbnail: bytes


@dataclass(frozen=True)
class Scored:
    """data: plain values, see score_adapter. thumbnails: JPEG by "subject-3", "drift-0", "base-0", ..."""

    data: dict[str, Any]
    thumbnails: dict[str, bytes]


@dataclass(frozen=True)
class Evaluation:
    """What evaluate() leaves. results is what its JSON file holds."""

    folder: Path
    numbers: Path
    table: Path
    report: Path
    results: dict[str, Any] = field(default_factory=dict)


# --- one adapter, one subject ----------------------------------------------------------------------------------


def asked_for(protocol: Protocol, token: str, class_word: str | None, *, known: bool = True) -> list[Asked]:
    """Every picture of an evaluation, in order. known: whether the model knows the token; the bare one does not,
    and is asked for any of the class."""
    asked = []
    prompts = [fill(template, token, class_word) for template in protocol.prompts.subject]
    texts = [without_token(prompt, token) for prompt in prompts]
    groups = [("subject", prompts if known else texts, texts, protocol.pictures)]
    if known and protocol.drift_pictures:
        of_class = texts[:: max(1, len(texts) // DRIFT_PROMPTS)][:DRIFT_PROMPTS] if class_word else []
        groups.append(("class", of_class, of_class, protocol.drift_pictures))
        others = list(protocol.prompts.unrelated)
        groups.append(("unrelated", others, others, protocol.drift_pictures))
    for group, wanted, without, count in groups:
        for number, (prompt, text) in enumerate(zip(wanted, without, strict=True)):
            seeds = range(protocol.first_seed + number * count, protocol.first_seed + (number + 1) * count)
            asked += [Asked(group, prompt, text, seed) for seed in seeds]
    return asked


def score_adapter(
    pipe: Any,
    subject: Subject,
    protocol: Protocol,
    encoders: Encoders,
    *,
    references: References | None = None,
    base: dict[tuple[str, int], Seen] | None = None,
    folder: Path | None = None,
    details: Mapping[str, Any] | None = None,
    team: Team = ONE_PROCESS,
    on_progress: Callable[[float], None] = lambda done: None,
) -> Scored:
    """Make all pictures with what is loaded on `pipe`, one adapter or none, and score them against the subject.

    Several processes of a team make whole batches each, and all of them return the same: a batch is made and looked
    at by one of them, of whichever size the team is.

    Args:
        references: from see_photos, for a subject that is scored several times.
        base: the base model's pictures for drift, which are looked up here and added here; share it among adapters
            on one model with one protocol.
        folder: where the subject's pictures go, as PNGs with their recipes.
        on_progress: how many pictures are done, the base model's for drift among them.
    Returns: data with
        scores: dino, clip_i and, where photos have masks, dino_masked, clip_i_masked; clip_t; diversity; drift,
            drift_class, drift_unrelated; those that encoders, masks and prompts allow of;
        photos: how near the photos are to each other (dino, clip_i), how many there are and how many have masks;
        pictures: for each of the subject's pictures its prompt, text, seed and own scores;
        drift: for each prompt without the token, seed by seed, how far it moved.
    """
    adapters = loaded_adapters(pipe)
    if len(adapters) > 1:
        raise ConfigError("One adapter is scored at a time, and several are loaded.")
    asked = asked_for(protocol, subject.token, subject.class_word, known=bool(adapters))
    away = [one for one in asked if one.group != "subject"]
    base = {} if base is None else base
    lacking = [one for one in away if (one.prompt, one.seed) not in base]
    references = references or see_photos(encoders, subject)

    def told(before: int) -> Callable[[float], None]:
        return lambda done: on_progress(before + done)

    seen = _make(pipe, asked, protocol.options, encoders, team, told(0), folder, details)
    if lacking:
        with _switched_off(adapters[0]):
            found = _make(pipe, lacking, protocol.options, encoders, team, told(len(asked)))
        base |= {(one.prompt, one.seed): picture for one, picture in zip(lacking, found, strict=True)}
    pairs = list(zip(asked, seen, strict=True))
    mine = [(one, picture) for one, picture in pairs if one.group == "subject"]
    others = [(one, picture) for one, picture in pairs if one.group != "subject"]
    return Scored(
        {
            "scores": _scores(mine, others, base, references, encoders),
            "photos": _photo_scores(subject, references),
            "pictures": _each_picture(mine, references, encoders),
            "drift": _each_drift(others, base),
        },
        _thumbnails(mine, others, base),
    )


def see_photos(encoders: Encoders, subject: Subject) -> References:
    """The photos as the encoders see them."""
    pairs = zip(subject.photos, subject.masks, strict=True)
    return joined([references_of(encoders, [photo.open()], [mask]) for photo, mask in pairs])


@contextmanager
def _switched_off(adapter: Any) -> Iterator[None]:
    """At scale 0 a layer runs its original processor: the base model, bit for bit."""
    scale = adapter.scale
    adapter.set_scale(0.0)
    try:
        yield
    finally:
        adapter.set_scale(scale)


def _make(
    pipe: Any,
    asked: Sequence[Asked],
    options: sampling.Options,
    encoders: Encoders,
    team: Team,
    on_progress: Callable[[float], None],
    folder: Path | None = None,
    details: Mapping[str, Any] | None = None,
) -> list[Seen]:
    """Pictures and features of all that is asked for, on every process: each makes every n-th batch."""
    requests = [one.request for one in asked]
    batches = sampling.plan(requests, options.batch_size)[team.rank :: team.size]
    order = [index for batch in batches for index in batch]
    made: dict[int, Seen] = {}
    pictures = sampling.generate(
        pipe, [requests[i] for i in order], options, on_progress=lambda done: on_progress(done * team.size)
    )
    with closing(pictures):
        for batch in batches:
            images = [next(pictures)[1] for _ in batch]
            # In the lots that they were made in, so that no feature depends on how many processes there are
            features = {kind: encoder.features(images) for kind, encoder in _kinds(encoders)}
            for place, (index, image) in enumerate(zip(batch, images, strict=True)):
                own = {kind: of[place] for kind, of in features.items()}
                made[index] = Seen(own, _jpeg(fitted(image, THUMBNAIL, smoothly=True)))
                if folder and asked[index].group == "subject":
                    recipe = sampling.recipe(pipe, requests[index], options, details)
                    save_png(image, folder / f"{index + 1:03d}-seed{asked[index].seed}.png", recipe)
    together = {index: seen for part in team.gather(made) for index, seen in part.items()}
    return [together[index] for index in range(len(asked))]


def _kinds(encoders: Encoders) -> list[tuple[str, Any]]:
    return [(kind, getattr(encoders, kind)) for kind in encoders.names()]


def _stacked(pictures: Sequence[tuple[Asked, Seen]], kind: str) -> Tensor:
    return torch.stack([seen.features[kind] for _, seen in pictures])


_FIDELITY = {"dino": "dino", "clip": "clip_i"}


def _fidelity(features: Mapping[str, Tensor], references: References) -> dict[str, float]:
    found = {}
    for kind, of in features.items():
        found[_FIDELITY[kind]] = mean_pairwise_cosine(of, references.whole[kind])
        if kind in references.masked:
            found[f"{_FIDELITY[kind]}_masked"] = mean_pairwise_cosine(of, references.masked[kind])
    return found


def _scores(
    mine: Sequence[tuple[Asked, Seen]],
    others: Sequence[tuple[Asked, Seen]],
    base: Mapping[tuple[str, int], Seen],
    references: References,
    encoders: Encoders,
) -> dict[str, float]:
    """All numbers that describe an adapter on a subject."""
    kinds = list(encoders.names())
    scores: dict[str, float | None] = dict(_fidelity({k: _stacked(mine, k) for k in kinds}, references))
    if encoders.clip:
        texts = encoders.clip.text_features([one.text for one, _ in mine])
        scores["clip_t"] = mean_paired_cosine(_stacked(mine, "clip"), texts)
    apart = "dino" if encoders.dino else "clip"
    prompts = dict.fromkeys(one.prompt for one, _ in mine)
    groups = [[pair for pair in mine if pair[0].prompt == prompt] for prompt in prompts]
    scores["diversity"] = diversity([_stacked(group, apart) for group in groups])
    for name, wanted in (
        ("drift", ("class", "unrelated")), ("drift_class", ("class",)), ("drift_unrelated", ("unrelated",)),
    ):  # fmt: skip
        moved = [pair for pair in others if pair[0].group in wanted]
        if moved:
            before = torch.stack([base[one.prompt, one.seed].features[apart] for one, _ in moved])
            scores[name] = drift(_stacked(moved, apart), before)
    return {name: round(value, 6) for name, value in scores.items() if value is not None}


def _photo_scores(subject: Subject, references: References) -> dict[str, Any]:
    """How near photos are to each other: what a perfect adapter would reach, were its pictures photos of the same."""
    found: dict[str, Any] = {
        "count": len(subject.photos),
        "with_masks": sum(mask is not None for mask in subject.masks),
    }
    if len(subject.photos) > 1:
        found |= {_FIDELITY[kind]: round(mean_cosine_among(of), 6) for kind, of in references.whole.items()}
    return found


def _each_picture(
    mine: Sequence[tuple[Asked, Seen]], references: References, encoders: Encoders
) -> list[dict[str, Any]]:
    texts = encoders.clip.text_features([one.text for one, _ in mine]) if encoders.clip else None
    found = []
    for number, (one, seen) in enumerate(mine):
        own = _fidelity({kind: of[None] for kind, of in seen.features.items()}, references)
        if texts is not None:
            own["clip_t"] = mean_paired_cosine(seen.features["clip"][None], texts[number : number + 1])
        values = {name: round(value, 6) for name, value in own.items()}
        found.append({"prompt": one.prompt, "text": one.text, "seed": one.seed, **values})
    return found


def _each_drift(
    others: Sequence[tuple[Asked, Seen]], base: Mapping[tuple[str, int], Seen]
) -> list[dict[str, Any]]:
    found = []
    for one, seen in others:
        before = base[one.prompt, one.seed].features
        moved = {kind: round(drift(of[None], before[kind][None]), 6) for kind, of in seen.features.items()}
        found.append({"group": one.group, "prompt": one.prompt, "seed": one.seed, **moved})
    return found


def _thumbnails(
    mine: Sequence[tuple[Asked, Seen]],
    others: Sequence[tuple[Asked, Seen]],
    base: Mapping[tuple[str, int], Seen],
) -> dict[str, bytes]:
    found = {f"subject-{i}": seen.thumbnail for i, (_, seen) in enumerate(mine)}
    for i, (one, seen) in enumerate(others):
        found |= {f"drift-{i}": seen.thumbnail, f"base-{i}": base[one.prompt, one.seed].thumbnail}
    return found


def _jpeg(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=85)
    return content.getvalue()


# --- runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """An adapter that is to be judged, with all that was found before anything slow begins."""

    label: str
    adapter: Path
    scale: float | None
    header: AdapterHeader
    run: RunFolder | None
    subject: Subject
    protocol: Protocol

    @property
    def trained(self) -> opening.Trained:
        return opening.Trained(self.adapter, self.header)


def find_candidates(
    runs: Sequence[tuple[str, float | None]],
    *,
    images: Path | None,
    prompts: str,
    limit: int | None,
    protocol: Callable[[Prompts], Protocol],
) -> list[Candidate]:
    """Adapters with their photos and prompts. Raises: CoeffDiffError for the first that lacks something."""
    found: list[Candidate] = []
    for label, scale in runs:
        adapter = find_adapter(label)
        if twin := next((one for one in found if one.scale == scale and one.adapter.samefile(adapter)), None):
            raise AdapterError(
                f"{label} and {twin.label} are the same adapter at the same scale; give it once, or with another "
                "scale behind it (RUN:0.6)."
            )
        header = read_header(adapter)
        its_run = run_of(adapter)
        run = RunFolder(its_run) if its_run else None
        if Path(label).is_file():
            label = str(adapter)
        folder = photo_folder(run, images, label)
        photos = read_photos(folder).photos
        listing = read_listing(folder)
        class_word = header.class_word or (listing.classes.get(folder.name) if listing else None)
        masks = [photo.open_mask() for photo in photos]
        subject = Subject(folder.name, photos, masks, header.token, class_word)
        chosen = choose_prompts(
            prompts, base_model=header.base_model, class_word=class_word, listing=listing, limit=limit
        )
        found.append(Candidate(label, adapter, scale, header, run, subject, protocol(chosen)))
    return found


def photo_folder(run: RunFolder | None, images: Path | None, label: str) -> Path:
    """The run's own photos, or `images`: a folder of photos, or a data set in DreamBooth's layout that has a folder
    of the same name as the run's. Raises: ConfigError if it does not, or no folder is known."""
    own = run.settings().subject.images if run else None
    if images is None:
        if own is None:
            raise ConfigError(
                f"{label} does not say which photos it was trained on; name them with --images."
            )
        if not own.is_dir():
            raise PhotoError(
                f"The photos of {label} are no longer in {own}; name their folder with --images."
            )
        return own
    if not (images / LISTING).is_file():
        return images
    classes = parse_listing(images / LISTING).classes
    there = sorted(f.name for f in images.iterdir() if f.is_dir() and f.name in classes)
    if own is None or own.name not in there:
        named = f"its photos were in a folder {own.name!r}" if own else "it does not name its photos"
        raise ConfigError(
            f"{images} holds the subjects {', '.join(there) or '(none)'}, and none of them is that of {label}: "
            f"{named}. Name the subject's own folder with --images."
        )
    return images / own.name


def evaluate(
    runs: Sequence[tuple[str, float | None]],
    output: Path,
    *,
    options: sampling.Options = OPTIONS,
    images: Path | None = None,
    prompts: str = "auto",
    limit: int | None = None,
    pictures: int = 4,
    drift_pictures: int = 2,
    first_seed: int = EVALUATION_FIRST_SEED,
    model: str | None = None,
    model_config: str | None = None,
    vae: str | None = None,
    precision: sampling.Precision = "auto",
    offload: sampling.Offload = "none",
    dino: str | None = None,
    clip: str | None = None,
    team: Team = ONE_PROCESS,
) -> Evaluation:
    """Score runs (folder, and scale or None for the adapter's own) one after the other, and write what came out.

    Raises: CoeffDiffError with one sentence, before anything is written for all that can be known then.
    """
    begun = time.monotonic()

    def protocol(chosen: Prompts) -> Protocol:
        return Protocol(chosen, pictures, drift_pictures, first_seed, options)

    # 1. What is asked for, checked before anything is slow or written
    candidates = find_candidates(runs, images=images, prompts=prompts, limit=limit, protocol=protocol)
    if not candidates:
        raise ConfigError("There is nothing to evaluate: name a run folder.")
    device, dtype = sampling.choose_device(precision, None if team is ONE_PROCESS else team.device)
    sampling.refuse_offload(device, offload)
    bases = _bases(candidates, opening.Asked(model, model_config, vae), dtype)
    for base, there in bases:
        shapes = backbone.unet_on_meta(base)
        outline = backbone.load_pipeline(base, dtype=dtype, parts=())
        sampling.check_options(outline, options)
        for line in opening.differences([one.trained for _, one in there], base, dtype):
            say(f"hint     {line}")
        for _, candidate in there:
            check_architecture(shapes, candidate.header, candidate.adapter)
            asked = asked_for(candidate.protocol, candidate.subject.token, candidate.subject.class_word)
            for prompt in dict.fromkeys(one.prompt for one in asked):
                for warning in sampling.length_warnings(prompt, outline):
                    say(f"hint     {warning}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is not empty; name another --output. Nothing was changed.")
    names = dict.fromkeys(base.name for base, _ in bases)
    team.from_main(lambda: refuse_unwritable(output))
    encoders = {name: encoders_for(name, dino, clip, device) for name in names}
    team.gather(None)  # here at the latest, what one of them lacks ends all

    # 2. Model by model, adapter by adapter
    pages: dict[int, RunPage] = {}
    for base, there in bases:
        judges = encoders[base.name]
        shared = f" in {team.size} processes" if team.size > 1 else ""
        say(f"model    {base.name} on {device.type}, {str(dtype).removeprefix('torch.')}{shared}")
        if base.vae:
            say(f"vae      {opening.where(base.vae[0])}")
        say(f"scores   by {' and '.join(judges.names().values())}")
        pipe = backbone.load_pipeline(base, dtype=dtype)
        before: dict[tuple[str, int], Seen] = {}
        for number, candidate in there:
            adapter = load_adapter(pipe, candidate.adapter, candidate.scale)
            sampling.prepare_device(pipe, device, offload)
            chosen = candidate.protocol
            say(
                f"run      {candidate.label} at scale {adapter.scale:g}: {len(chosen.prompts.subject)} prompts "
                f"({chosen.prompts.name}), pictures of each: {pictures}"
            )
            folder = output / "pictures" / f"{number:02d}-{Path(candidate.label).resolve().name}"
            took = time.monotonic()
            asked = asked_for(chosen, candidate.subject.token, candidate.subject.class_word)
            unseen = [one for one in asked if one.group != "subject" and (one.prompt, one.seed) not in before]
            with progress("evaluating", len(asked) + len(unseen)) as bar:
                scored = score_adapter(
                    pipe,
                    candidate.subject,
                    chosen,
                    judges,
                    base=before,
                    folder=folder,
                    details=opening.recipe(base),
                    team=team,
                    on_progress=bar,
                )
            facts = _facts(candidate, adapter.scale, judges, base.name, time.monotonic() - took)
            photos = [_jpeg(fitted(p.open(), THUMBNAIL, smoothly=True)) for p in candidate.subject.photos]
            pages[number] = RunPage(
                facts | scored.data, scored.thumbnails, candidate.run, candidate.adapter, photos
            )
            adapter.remove()
            if offload == "sequential":  # or the next adapter would find a UNet without weights
                pipe.remove_all_hooks()
    in_order = [pages[number] for number in sorted(pages)]

    # 3. Files
    results = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["coeffdiff", *sys.argv[1:]])
        if "coeffdiff" in Path(sys.argv[0]).parts[-2:]
        else "",
        "device": device_name(device),
        "precision": str(dtype).removeprefix("torch."),
        "processes": team.size,
        "versions": {"coeffdiff": __version__, "torch": str(torch.__version__)},
        "protocol": _protocol_facts(candidates[0].protocol),
        "seconds": round(time.monotonic() - begun, 1),
        "runs": [page.data for page in in_order],
    }
    evaluation = Evaluation(
        output, output / "evaluation.json", output / "evaluation.csv", output / "report.html", results
    )
    team.from_main(lambda: _write(evaluation, in_order))
    return evaluation


def _bases(
    candidates: Sequence[Candidate], asked: opening.Asked, dtype: torch.dtype
) -> list[tuple[backbone.Backbone, list[tuple[int, Candidate]]]]:
    """Each base model, opened as its adapters' runs opened it, with those and their numbers from 1 on."""
    found: dict[str, tuple[backbone.Backbone, list[tuple[int, Candidate]]]] = {}
    for number, candidate in enumerate(candidates, 1):
        base = opening.open_base([candidate.trained], asked, dtype)
        _, there = found.setdefault(repr(base), (base, []))
        there.append((number, candidate))
    return list(found.values())


def _facts(
    candidate: Candidate, scale: float, encoders: Encoders, base_model: str, seconds: float
) -> dict[str, Any]:
    header, subject = candidate.header, candidate.subject
    return {
        "run": candidate.label + ("" if candidate.scale is None else f":{candidate.scale:g}"),
        "subject": subject.name,
        "token": subject.token,
        "class_word": subject.class_word,
        "kind": header.described,
        "base_model": base_model,
        "trained_steps": header.trained_steps,
        "scale": scale,
        "encoders": encoders.names(),
        "prompts": candidate.protocol.prompts.name,
        "seconds": round(seconds, 1),
    }


def _protocol_facts(protocol: Protocol) -> dict[str, Any]:
    plain = replace(protocol).options
    return {
        "pictures_a_prompt": protocol.pictures,
        "drift_pictures_a_prompt": protocol.drift_pictures,
        "first_seed": protocol.first_seed,
        **vars(plain),
    }


def device_name(device: torch.device) -> str:
    """As reports name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    model = _processor() if device.type == "cpu" else ""
    return f"{device.type.upper()}{model and f' ({model})'}, {threads} thread{'s' * (threads > 1)}"


def _processor() -> str:
    """The CPU's model; where Python does not know it, as on Linux, from the kernel's own list."""
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor()


def _write(evaluation: Evaluation, pages: Sequence[RunPage]) -> None:
    """JSON, CSV and page, each whole. Raises: ConfigError if the disk refuses."""
    try:
        with appearing(evaluation.numbers) as unfinished:
            unfinished.write_text(
                json.dumps(evaluation.results, indent=1, default=str) + "\n", encoding="utf-8"
            )
        with appearing(evaluation.table) as unfinished:
            unfinished.write_text(csv_of(evaluation.results["runs"]), encoding="utf-8")
        with appearing(evaluation.report) as unfinished:
            write_report(evaluation.results, pages, unfinished)
    except OSError as error:
        raise ConfigError(f"{evaluation.folder} cannot be written: {error.strerror or error}.") from None


def csv_of(runs: Sequence[Mapping[str, Any]]) -> str:
    """A row for each run: what it is, then its scores; scores that a run has not are left empty."""
    facts = (
        "run",
        "subject",
        "token",
        "class_word",
        "kind",
        "base_model",
        "trained_steps",
        "scale",
        "prompts",
    )
    scores = list(dict.fromkeys(name for run in runs for name in run["scores"]))
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow([*facts, "pictures", *scores])
    for run in runs:
        values = [run["scores"].get(name, "") for name in scores]
        writer.writerow([*(run[name] for name in facts), len(run["pictures"]), *values])
    return content.getvalue()


def summary(results: Mapping[str, Any]) -> str:
    """The scores for the terminal, a line for each run; means where there are several."""
    names = list(dict.fromkeys(name for run in results["runs"] for name in run["scores"]))
    width = max(4, *(len(run["run"]) for run in results["runs"]))

    def line(label: str, values: Mapping[str, float]) -> str:
        cells = (
            f"{values[name]:{max(6, len(name))}.3f}" if name in values else " " * max(6, len(name))
            for name in names
        )
        return "  ".join([label.ljust(width), *cells])

    lines = ["  ".join(["run".ljust(width), *(name.rjust(6) for name in names)])]
    lines += [line(run["run"], run["scores"]) for run in results["runs"]]
    if by_step := _steps_of_one(results):
        # A mean over steps says nothing; which step is best by which score does
        better = [name for name in ("dino", "dino_masked", "clip_i", "clip_t") if name in names]
        said = []
        for name in better:
            scores = {run["scores"].get(name, -1.0): step for step, run in reversed(by_step.items())}
            said.append(f"{name} is highest at step {scores[max(scores)]}")
        lines.append(", ".join(said))
    elif len(results["runs"]) > 1:
        every = {
            name: [run["scores"][name] for run in results["runs"] if name in run["scores"]] for name in names
        }
        lines.append(line("mean", {name: statistics.fmean(values) for name, values in every.items()}))
    return "\n".join(lines)


def _steps_of_one(results: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """The runs by step, if all are steps of one run (RUN@100, RUN@200), else nothing."""
    named = [
        re.fullmatch(r"(?P<run>.+)@(?P<step>\d+)(?P<scale>:[^:]*)?", run["run"]) for run in results["runs"]
    ]
    if (
        len(named) < 2
        or len({(name["run"], name["scale"]) if name else name for name in named}) > 1
        or not named[0]
    ):
        return {}
    return {int(name["step"]): run for name, run in zip(named, results["runs"], strict=True) if name}
