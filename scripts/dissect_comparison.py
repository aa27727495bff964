"""What the adapters of a comparison are made of, and what their scores could be at best, on pocket.

python scripts/dissect_comparison.py configs/compare/controls.yaml --comparison comparison --output dissected.json

Each adapter of one arm (coeff+lora) is scored as it is, with its alpha switched off, twice and four times as strong,
and with its LoRA switched off: same prompts, seeds and initial noise. Beside it stand the subject's own renders in the
places that the prompts name, after a round trip through the VAE: what a perfect adapter would score. The adapters are
those in the comparison's work folder; of one that is not there, nothing is said.
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
    from coeffdiff.console import share_cores

    share_cores()
    from coeffdiff.config import load_section
    from coeffdiff.errors import CoeffDiffError
    from coeffdiff.evaluation.compare import Comparison

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--comparison", type=Path, required=True, help="its --output, with the work folder")
    parser.add_argument("--arm", default="coeff+lora")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON; what it holds is not computed again"
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
    return 0


def dissect(plan: Any, arm: str, comparison: Path, output: Path) -> list[dict[str, Any]]:
    """A row of scores for each subject, seed and part, from the output file where it is there."""
    from coeffdiff.console import progress
    from coeffdiff.evaluation.compare import Studio
    from coeffdiff.files import appearing
    from coeffdiff.training.state import RunFolder

    studio = Studio(plan, comparison)
    rows: list[dict[str, Any]] = json.loads(output.read_text()) if output.exists() else []
    done = {(row["key"], row["part"]) for row in rows}
    jobs = [job for job in studio.jobs() if job.arm == arm]
    keys = {job.key for job in jobs}
    with progress("adapters", len(jobs)) as bar:
        for number, job in enumerate(jobs):
            bar(number, job.label)
            job.sitter.write_photos()
            adapter = RunFolder(studio.work_folder(job) / "run").adapter
            for part in (*PARTS, PHOTOS):
                unknown = part == PHOTOS and not job.sitter.made_up  # nobody can photograph it anew
                if (job.key, part) in done or unknown or not adapter.is_dir():
                    continue
                scores = (
                    itself(studio, job) if part == PHOTOS else as_parts(studio, job, adapter, *PARTS[part])
                )
                facts = {"subject": job.sitter.name, "seed": job.seed, "arm": arm, "part": part}
                rows.append(facts | {"key": job.key, "scores": scores})
                with appearing(output) as unfinished:
                    unfinished.write_text(json.dumps(rows, indent=1) + "\n")
        bar(len(jobs))
    return [row for row in rows if row["key"] in keys]


def as_parts(studio: Any, job: Any, path: Path, alpha: float, lora: float) -> dict[str, float]:
    """The scores of an adapter with its two parts at strengths of their own."""
    from coeffdiff.evaluation.compare import _subject
    from coeffdiff.evaluation.evaluate import score_adapter
    from coeffdiff.method.adapter import load_adapter
    from coeffdiff.method.injection import set_scale
    from coeffdiff.method.lora import set_lora_scale
    from coeffdiff.sampling import prepare_device

    adapter = load_adapter(studio.pipe, path)
    prepare_device(studio.pipe, studio.device)
    try:
        set_scale(studio.pipe.unet, alpha, adapter.name)
        set_lora_scale(studio.pipe.unet, adapter.name, lora)
        protocol = replace(job.protocol, drift_pictures=0)
        with tempfile.TemporaryDirectory() as folder:
            pictures = Path(folder) / "pictures"
            subject = _subject(job.sitter, studio.plan.token)
            scored = score_adapter(studio.pipe, subject, protocol, studio.encoders, folder=pictures)
            found = scored.data["scores"] | studio._places(job, pictures)
    finally:
        adapter.remove()
    return {name: round(found[name], 6) for name in SCORES}


def itself(studio: Any, job: Any) -> dict[str, float]:
    """The scores of the subject's own renders in the places of the prompts, through the VAE."""
    import torch
    from PIL import Image

    from coeffdiff.evaluation.compare import _subject
    from coeffdiff.evaluation.evaluate import asked_for, see_photos
    from coeffdiff.metrics import score_pictures
    from coeffdiff.pocket import WEIGHTS
    from coeffdiff.pocket.judges import QUESTIONS, trusted_judges
    from coeffdiff.pocket.world import render
    from coeffdiff.seeding import stable_seed

    subject = _subject(job.sitter, studio.plan.token)
    asked = asked_for(
        replace(job.protocol, drift_pictures=0), studio.plan.token, job.sitter.class_word, known=False
    )
    texts = [one.text for one in asked]
    places = [next(place for place in QUESTIONS["setting"] if text.endswith(place)) for text in texts]
    scenes = [
        job.sitter.made_up.scene(stable_seed("itself", job.sitter.name, n), setting=place)
        for n, place in enumerate(places)
    ]
    images, _ = render(scenes)
    vae = studio.pipe.vae
    with torch.no_grad():
        latents = vae.encode((images * 2.0 - 1.0).to(vae.device, vae.dtype)).latent_dist.mode()
        seen = vae.decode(latents).sample.float().cpu()
    values = (seen.clamp(-1.0, 1.0) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(picture) for picture in values]
    found = score_pictures(studio.encoders, see_photos(studio.encoders, subject), pictures, texts)
    answers = trusted_judges(WEIGHTS).see("setting", pictures)
    found["place"] = statistics.fmean(a == b for a, b in zip(answers, places, strict=True))
    return {name: round(found[name], 6) for name in SCORES}


def table(rows: list[dict[str, Any]]) -> str:
    """Means over subjects, seeds averaged first, with 95 % intervals of the differences to "as trained"."""
    from coeffdiff.evaluation.paired import interval

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


if __name__ == "__main__":
    sys.exit(main())
