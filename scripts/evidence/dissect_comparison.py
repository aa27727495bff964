"""What the adapters of a comparison are made of, and what their scores could be at best, on pocket.

python scripts/evidence/dissect_comparison.py PLAN.yaml --comparison comparison --output dissected.json

Each adapter of one arm (coeff+lora) is scored as it is, with its alpha switched off, twice and four times as strong,
and with its LoRA switched off: same prompts, seeds and initial noise. Beside it stand the subject's own renders in the
places that the prompts name, after a round trip through the VAE: what a perfect adapter would score. The adapters are
those in the comparison's work folder; of one that is not there, only the renders are looked at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "build"))  # pocket_build

# name -> how strong alpha and LoRA are
PARTS = {
    "as trained": (1.0, 1.0),
    "alpha off": (0.0, 1.0),
    "alpha twice": (2.0, 1.0),
    "alpha four times": (4.0, 1.0),
    "LoRA off": (1.0, 0.0),
}
PHOTOS = "the subject itself"
SCORES = ("dino", "dino_masked", "clip_i", "clip_t", "place")
SHOWN = {"dino_masked": "DINO, photos masked", "clip_t": "CLIP-T", "place": "place"}


def main() -> int:
    from coeffdiff.utils.threads import choose_waiting

    choose_waiting()
    from coeffdiff.config.loading import load_section
    from coeffdiff.errors import CoeffDiffError
    from coeffdiff.evaluation.comparison_plan import Comparison
    from coeffdiff.utils.paths import path_argument

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=path_argument)
    parser.add_argument(
        "--comparison", type=path_argument, required=True, help="its --output, with the work folder"
    )
    parser.add_argument("--arm", default="coeff+lora")
    parser.add_argument(
        "--output", type=path_argument, required=True, help="JSON; what it holds is not computed again"
    )
    chosen = parser.parse_args()
    try:
        plan = load_section(Comparison, chosen.plan, {"drift_pictures": 0}, ())
        rows = dissect(plan.only([chosen.arm]), chosen.arm, chosen.comparison, chosen.output)
    except CoeffDiffError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if not rows:
        print(f"There is no adapter of {chosen.arm} in {chosen.comparison}.", file=sys.stderr)
        return 2
    print(table(rows))
    if any("moved" in row for row in rows):
        print("\n" + moved(rows))
    return 0


def dissect(plan: Any, arm: str, comparison: Path, output: Path) -> list[dict[str, Any]]:
    """A row of scores for each subject, seed and part, from the output file where it is there."""
    from coeffdiff.evaluation.comparison_cells import work_folder
    from coeffdiff.evaluation.comparison_runner import ComparisonRunner
    from coeffdiff.training.run_folder import RunFolder
    from coeffdiff.utils.atomic import atomic_write
    from coeffdiff.utils.console import progress

    studio = ComparisonRunner(plan, comparison)
    rows: list[dict[str, Any]] = json.loads(output.read_text()) if output.exists() else []
    jobs = [job for job in studio.jobs() if job.arm == arm]
    done = {(row["cell"], row["part"]) for row in rows}
    with progress("adapters", len(jobs)) as bar:
        for number, job in enumerate(jobs):
            bar(number, job.label)
            job.subject.write_photos()
            adapter = RunFolder(work_folder(comparison, job) / "run").adapter
            for part in (*PARTS, PHOTOS):
                lacks = not job.subject.made_up if part == PHOTOS else not adapter.is_dir()
                if lacks or (cell_of(studio, job), part) in done:
                    continue
                scores = (
                    itself(studio, job) if part == PHOTOS else as_parts(studio, job, adapter, *PARTS[part])
                )
                facts = {"cell": cell_of(studio, job), "subject": job.subject.name, "seed": job.seed}
                facts |= {"arm": arm, "part": part, "scores": scores}
                rows.append(facts | ({"moved": by_place(adapter)} if part == "as trained" else {}))
                with atomic_write(output) as unfinished:
                    unfinished.write_text(json.dumps(rows, indent=1) + "\n")
        bar(len(jobs))
    return kept(studio, arm, rows)


def cell_of(studio: Any, job: Any) -> str:
    """What a job's row is of: its adapter, prompts, seeds and encoders, as the comparison names its cell."""
    return str(job.cells[job.end])


def kept(studio: Any, arm: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are of an arm of this plan as it now is."""
    cells = {cell_of(studio, job) for job in studio.jobs() if job.arm == arm}
    return [row for row in rows if row["cell"] in cells]


def by_place(adapter: Path) -> dict[str, float]:
    """Mean |alpha| by block and kind of layer: "mid_block self", ..."""
    from coeffdiff.evaluation.inspection import inspect_adapter

    blocks = inspect_adapter(adapter).alpha_blocks
    return {f"{one.block} {one.attention}": round(one.norms["mean"], 4) for one in blocks[:-1]}


def as_parts(studio: Any, job: Any, path: Path, alpha: float, lora: float) -> dict[str, float]:
    """The scores of an adapter with its two parts at strengths of their own."""
    from coeffdiff.evaluation.comparison_facts import place_scores
    from coeffdiff.evaluation.comparison_subjects import subject_of
    from coeffdiff.evaluation.scoring import score_adapter
    from coeffdiff.hosts.diffusers import load_adapter
    from coeffdiff.hosts.lora.layers import set_lora_scale
    from coeffdiff.hosts.unet import set_scale
    from coeffdiff.sampling.device import prepare_device

    pipe = studio.lent()
    adapter = load_adapter(pipe, path)
    prepare_device(pipe, studio.device)
    set_scale(pipe.unet, alpha, adapter.name)
    set_lora_scale(pipe.unet, adapter.name, lora)
    protocol = replace(job.protocol, drift_pictures=0)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        subject = subject_of(job.subject, studio.plan.token)
        scored = score_adapter(pipe, subject, protocol, studio.encoders, folder=pictures)
        found = scored.data["scores"] | place_scores(studio.base.name, job.protocol, pictures)
    return {name: round(found[name], 6) for name in SCORES}


def itself(studio: Any, job: Any) -> dict[str, float]:
    """The scores of the subject's own renders in the places of the prompts, through the VAE."""
    from coeffdiff.evaluation.comparison_subjects import subject_of
    from coeffdiff.evaluation.protocol import asked_for
    from coeffdiff.evaluation.scoring import see_photos
    from coeffdiff.metrics.pictures import score_pictures
    from coeffdiff.pocket import WEIGHTS
    from coeffdiff.pocket.judges import QUESTIONS, trusted_judges
    from coeffdiff.utils.seeding import stable_seed
    from pocket_build.renders import seen_through

    subject = subject_of(job.subject, studio.plan.token)
    asked = asked_for(
        replace(job.protocol, drift_pictures=0), studio.plan.token, job.subject.class_word, known=False
    )
    texts = [one.text for one in asked]
    places = [next(place for place in QUESTIONS["setting"] if text.endswith(place)) for text in texts]
    scenes = [
        job.subject.made_up.scene(stable_seed("itself", job.subject.name, n), setting=place)
        for n, place in enumerate(places)
    ]
    pictures = seen_through(studio.lent().vae, scenes)
    found = score_pictures(studio.encoders, see_photos(studio.encoders, subject), pictures, texts)
    answers = trusted_judges(WEIGHTS).see("setting", pictures)
    found["place"] = statistics.fmean(a == b for a, b in zip(answers, places, strict=True))
    return {name: round(found[name], 6) for name in SCORES}


def table(rows: list[dict[str, Any]]) -> str:
    """Means over subjects, seeds averaged first, with 95 % intervals of the differences to "as trained"."""
    from coeffdiff.evaluation.statistics import interval

    lines = ["| | " + " | ".join(SHOWN.values()) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    subjects = sorted({row["subject"] for row in rows})
    for part in dict.fromkeys(row["part"] for row in rows):
        entries = []
        for name in SHOWN:
            of = {
                (row["subject"], kind): [
                    other["scores"][name]
                    for other in rows
                    if other["subject"] == row["subject"] and other["part"] == kind
                ]
                for row in rows
                for kind in (part, "as trained")
            }
            values = [statistics.fmean(of[subject, part]) for subject in subjects if of[subject, part]]
            apart = [
                statistics.fmean(of[subject, part]) - statistics.fmean(of[subject, "as trained"])
                for subject in subjects
                if of[subject, part] and of[subject, "as trained"]
            ]
            entry = f"{statistics.fmean(values):.3f}"
            low, high = interval(apart)
            if part != "as trained" and low is not None:
                entry += f" ({statistics.fmean(apart):+.3f} [{low:+.3f}, {high:+.3f}])"
            entries.append(entry)
        lines.append(f"| {part} | " + " | ".join(entries) + " |")
    return "\n".join([*lines, "", f"{len(subjects)} subjects; in brackets the difference to the first row."])


def moved(rows: list[dict[str, Any]]) -> str:
    """Mean |alpha| over adapters: a row for each block, self- and cross-attention beside each other."""
    found = [row["moved"] for row in rows if "moved" in row]
    blocks = list(dict.fromkeys(place.split()[0] for one in found for place in one))
    lines = ["| mean abs alpha | self | cross |", "|---|---|---|"]
    for block in blocks:
        means = [statistics.fmean(one[f"{block} {kind}"] for one in found) for kind in ("self", "cross")]
        lines.append(f"| {block} | " + " | ".join(f"{value:.3f}" for value in means) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
