"""evaluate(): adapters scored by a protocol, with pictures, numbers and a page. What `coeffdiff evaluate` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from coeffdiff.config.fields import EVALUATION_FIRST_SEED
from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.facts import evaluation_facts, run_facts
from coeffdiff.evaluation.prompts import Prompts
from coeffdiff.evaluation.protocol import OPTIONS, THUMBNAIL, Evaluation, Protocol, Seen
from coeffdiff.evaluation.report import RunPage
from coeffdiff.evaluation.runs import Candidate, find_candidates
from coeffdiff.evaluation.scoring import score_adapter
from coeffdiff.evaluation.tables import write_results
from coeffdiff.hosts.applied_adapter import Adapter
from coeffdiff.hosts.diffusers import load_adapter
from coeffdiff.metrics.encoders import Encoders, encoders_for
from coeffdiff.models.loading import Loader
from coeffdiff.models.opening import Asked, recipe
from coeffdiff.sampling.device import choose_device, refuse_offload
from coeffdiff.sampling.memory_options import Offload, Precision
from coeffdiff.sampling.options import Options, check_options
from coeffdiff.sampling.prompts import length_warnings
from coeffdiff.sampling.session import Session, open_session, print_hints
from coeffdiff.utils.console import print_info, progress
from coeffdiff.utils.distributed import ONE_PROCESS, DistributedContext
from coeffdiff.utils.grids import fitted
from coeffdiff.utils.jpeg import jpeg_bytes
from coeffdiff.utils.output_folder import output_folder, refuse_occupied, refuse_unwritable

EVALUATIONS = Path("evaluations")


@dataclass(frozen=True)
class _Group:
    """The candidates of one base model, with their numbers from 1 on."""

    session: Session
    candidates: list[tuple[int, Candidate]] = field(default_factory=list)


def evaluate(
    runs: Sequence[tuple[str, float | None]],
    output: Path | None = None,
    *,
    options: Options = OPTIONS,
    images: Path | None = None,
    prompts: str = "auto",
    limit: int | None = None,
    pictures: int = 4,
    drift_pictures: int = 2,
    first_seed: int = EVALUATION_FIRST_SEED,
    model: str | None = None,
    model_config: str | None = None,
    vae: str | None = None,
    quantize: str | None = None,
    precision: Precision = "auto",
    offload: Offload = "none",
    dino: str | None = None,
    clip: str | None = None,
    team: DistributedContext = ONE_PROCESS,
    load: Loader | None = None,
    judges: Callable[..., Encoders] = encoders_for,
) -> Evaluation:
    """Score runs one after the other, and write pictures, evaluation.json, evaluation.csv and report.html.

    All that can be wrong is found before the weights are read.

    Args:
        runs: run or adapter folders and scales; None is the adapter's recommended one.
        output: must be free; by default the next free folder in EVALUATIONS.
        images, prompts, limit: see find_candidates.  pictures, drift_pictures, first_seed: see Protocol.
        model, model_config, vae, quantize: other than the adapters' own.
        dino, clip: encoders, see encoders_for.
        team: processes that share the work, all called with equal arguments.
        load: what gives the base model's networks, in place of load_pipeline; judges: the encoders, as encoders_for.
    Raises: CoeffDiffError with what to do.
    """
    begun = time.monotonic()

    def protocol(chosen: Prompts) -> Protocol:
        return Protocol(chosen, pictures, drift_pictures, first_seed, options)

    candidates = find_candidates(runs, images=images, prompts=prompts, limit=limit, protocol=protocol)
    if not candidates:
        raise ConfigError("There is nothing to evaluate: name a run folder.")
    device, dtype = choose_device(precision, team.device)
    refuse_offload(device, offload)
    groups = _group_by_base(candidates, Asked(model, model_config, vae, quantize), precision, offload, device)
    for group in groups:
        _check_group(group, options)
    if output:
        refuse_occupied(output)
    team.on_main(lambda: refuse_unwritable(output or EVALUATIONS))
    names = dict.fromkeys(group.session.base.name for group in groups)
    encoders = {name: judges(name, dino, clip, device) for name in names}
    team.gather(None)  # an error of one process ends all before the weights are read

    with output_folder(output, EVALUATIONS, team) as folder:
        team.on_main(lambda: refuse_occupied(folder))  # another evaluate may just have ended there
        pages: dict[int, RunPage] = {}
        for group in groups:
            # Who lends the networks has other options
            with nullcontext() if load else group.session.oom_hints(options):
                pages |= _score_group(group, encoders[group.session.base.name], folder, team, load)
        in_order = [pages[number] for number in sorted(pages)]
        facts = evaluation_facts(device, dtype, team.size, candidates[0].protocol)
        results = facts | {
            "seconds": round(time.monotonic() - begun, 1),
            "runs": [page.data for page in in_order],
        }
        evaluation = Evaluation(
            folder, folder / "evaluation.json", folder / "evaluation.csv", folder / "report.html", results
        )
        team.on_main(lambda: write_results(evaluation, in_order))
    return evaluation


def _group_by_base(
    candidates: Iterable[Candidate],
    asked: Asked,
    precision: Precision,
    offload: Offload,
    device: torch.device,
) -> list[_Group]:
    """The candidates by base model, each opened as the candidate's run opened it."""
    groups: dict[str, _Group] = {}
    for number, candidate in enumerate(candidates, 1):
        opened = open_session([candidate.trained], asked, precision=precision, offload=offload, device=device)
        group = groups.setdefault(repr(opened.base), _Group(opened))
        group.candidates.append((number, candidate))
    return [_with_all_adapters(group) for group in groups.values()]


def _with_all_adapters(group: _Group) -> _Group:
    adapters = tuple(candidate.trained for _, candidate in group.candidates)
    return replace(group, session=replace(group.session, adapters=adapters))


def _check_group(group: _Group, options: Options) -> None:
    """Raises: what the base model cannot do, before its weights are read. Prints hints."""
    session = group.session
    outline = session.outline()
    check_options(outline, options)
    session.print_differences()
    for _, candidate in group.candidates:
        session.check_adapter(candidate.trained)
        for prompt in dict.fromkeys(one.prompt for one in candidate.asked):
            print_hints(length_warnings(prompt, outline))


def _score_group(
    group: _Group, encoders: Encoders, output: Path, team: DistributedContext, load: Loader | None
) -> dict[int, RunPage]:
    """Load the base model once, and score its candidates one after the other. Returns: their pages by number."""
    session = group.session
    session.print_model(team.size)
    print_info(f"scores   by {' and '.join(encoders.names().values())}")
    pipe = session.load(load)
    before: dict[tuple[str, int], Seen] = {}  # the base model's pictures, for drift
    pages = {}
    for number, candidate in group.candidates:
        adapter = load_adapter(pipe, candidate.adapter, candidate.scale)
        session.prepare(pipe)
        folder = output / "pictures" / f"{number:02d}-{Path(candidate.label).resolve().name}"
        pages[number] = _score_candidate(pipe, session, candidate, adapter, encoders, before, folder, team)
        adapter.remove()
        if session.offload == "sequential":  # or the next adapter would find a UNet without weights
            pipe.remove_all_hooks()
    return pages


def _score_candidate(
    pipe: Any,
    session: Session,
    candidate: Candidate,
    adapter: Adapter,
    encoders: Encoders,
    before: dict[tuple[str, int], Seen],
    folder: Path,
    team: DistributedContext,
) -> RunPage:
    """before: the base model's pictures by prompt and seed; those that are missing are added."""
    begun = time.monotonic()
    protocol, subject, asked = candidate.protocol, candidate.subject, candidate.asked
    print_info(
        f"run      {candidate.label} at scale {adapter.scale:g}: {len(protocol.prompts.subject)} prompts "
        f"({protocol.prompts.name}), pictures of each: {protocol.pictures}"
    )
    missing = [one for one in asked if one.group != "subject" and (one.prompt, one.seed) not in before]
    with progress("evaluating", len(asked) + len(missing)) as bar:
        scored = score_adapter(
            pipe,
            subject,
            protocol,
            encoders,
            base=before,
            folder=folder,
            details=recipe(session.base),
            team=team,
            on_progress=bar,
        )
    seconds = time.monotonic() - begun
    facts = run_facts(candidate, adapter.scale, encoders, session.base.name, seconds)
    photos = [jpeg_bytes(fitted(photo.open(), THUMBNAIL, smoothly=True)) for photo in subject.photos]
    return RunPage(facts | scored.data, scored.thumbnails, candidate.run, candidate.adapter, photos)
