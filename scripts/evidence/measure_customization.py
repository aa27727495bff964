"""What an adapter learns of a subject that pocket does not know, and what it costs: every arm on the dev subjects.

python scripts/evidence/measure_customization.py --folder build/customization
python scripts/evidence/measure_customization.py --folder build/customization --arms coeff --subjects wooden_pot \\
    --set method.coeff.learning_rate=0.01 method.coeff.learning_rate=0.02

Similarity: mean pairwise cosine of pocket-dino's features of pictures and of the five photos that were trained on,
in six places that no photo shows, two pictures a place, of the same seeds in every arm. Setting: how often the judge
sees the place of the prompt. The ceiling are other photos of the subject in the same places after a round trip through
the VAE, the floor round trips of others of its class there. Every cell is a small JSON file, of these weights and
settings, and is not computed twice; --pack moves those asked for into one file, cells/dev.jsonl, as lines.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import platform
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "build"))  # pocket_build

TRAINED = ("lora", "coeff", "coeff+lora")
ARMS = ("base", *TRAINED, "ceiling", "floor")
TOKEN, SEEDS = "sks", (11, 12)
USED = ("pocket", "pocket-dino", "judges")  # of the weights
DENOISING_STEPS = 25


def main() -> int:
    from coeffdiff.utils.threads import choose_waiting

    choose_waiting()
    from coeffdiff.errors import CoeffDiffError
    from coeffdiff.evaluation.cells import CellFolder
    from coeffdiff.pocket.world.subjects import DEV

    names = [subject.name for subject in DEV]
    from coeffdiff.utils.paths import path_argument

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=path_argument, required=True, help="cells, runs and pictures; resumes"
    )
    parser.add_argument("--subjects", nargs="+", default=names, choices=names)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--steps", type=int, help="of training; default: by model")
    parser.add_argument(
        "--denoising-steps",
        type=int,
        default=DENOISING_STEPS,
        help="of every picture; fewer only to try things out",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="A.B=C[,D.E=F]",
        help="a variant of every trained arm; settings joined by commas",
    )
    parser.add_argument(
        "--pack", action="store_true", help="move the cells asked for into one file, a line each"
    )
    chosen = parser.parse_args()
    asked = [
        (subject, arm, variant)
        for subject in chosen.subjects
        for arm in chosen.arms
        for variant in (chosen.set if arm in TRAINED and chosen.set else [""])
    ]
    try:
        cells = [cell(chosen, *one) for one in asked]
        if chosen.pack:
            keys = [key_of_cell(*one, chosen.steps, chosen.denoising_steps) for one in asked]
            CellFolder(chosen.folder / "cells").pack("dev", keys)
    except CoeffDiffError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(table(cells))
    return 0


def cell(chosen: Any, subject: str, arm: str, variant: str) -> dict[str, Any]:
    """One subject under one arm, from the folder if it is there."""
    from coeffdiff.evaluation.cells import CellFolder

    key = key_of_cell(subject, arm, variant, chosen.steps, chosen.denoising_steps)
    store = CellFolder(chosen.folder / "cells")
    found = store.read(key)
    if found is None:
        print(f"{subject}  {arm}  {variant}", file=sys.stderr)
        work = chosen.folder / "work" / f"{subject}-{arm}-{key}"
        found = measure(chosen, work, subject, arm, variant)
        store.write(key, f"{subject}-{arm}", found)
    return found


def key_of_cell(subject: str, arm: str, variant: str, steps: int | None, denoising_steps: int) -> str:
    """What a cell is kept under: a hash of these weights, and of what the settings come to, defaults among them."""
    from coeffdiff.utils.seeding import stable_seed

    trained = resolved(arm, variant, steps) if arm in TRAINED else ""
    return f"{stable_seed(subject, arm, trained, denoising_steps, *weights()):016x}"


@functools.cache
def resolved(arm: str, variant: str, steps: int | None) -> str:
    """All settings that decide a training, as JSON."""
    from coeffdiff.config.loading import load_settings
    from coeffdiff.evaluation.comparison_plan import deciding
    from coeffdiff.models.finding import find_backbone
    from coeffdiff.training.launch import start_processes
    from coeffdiff.training.resolve import resolve

    settings = load_settings(None, values_of(arm, steps), variant.split(",") if variant else [])
    settings, _ = resolve(settings, find_backbone(settings.model), start_processes())
    return json.dumps(deciding(settings) | {"steps": settings.training.steps}, sort_keys=True)


def values_of(arm: str, steps: int | None) -> dict[str, Any]:
    """What every training of an arm is given."""
    from coeffdiff.pocket import POCKET

    return {
        "model.name": POCKET, "subject.token": TOKEN, "method.kind": arm, "training.steps": steps,
        "validation.prompts": [],
    }  # fmt: skip


@functools.cache
def weights() -> tuple[str, ...]:
    """Fingerprints of what makes the pictures and of what scores them."""
    from coeffdiff.pocket import WEIGHTS
    from pocket_build.workshop import fingerprint

    return tuple(
        fingerprint(file) for part in USED for file in sorted((WEIGHTS / part).rglob("*.safetensors"))
    )


def kept(folder: Path) -> list[dict[str, Any]]:
    """The cells of a folder that are of the weights that ship, and of default lengths."""
    from coeffdiff.evaluation.cells import CellFolder

    cells = [
        (f"{one['subject']}-{one['arm']}-{key}", one)
        for key, one in CellFolder(folder / "cells").all().items()
        if key == key_of_cell(one["subject"], one["arm"], one["variant"], None, DENOISING_STEPS)
    ]
    return [one for _, one in sorted(cells, key=lambda named: named[0])]


def measure(chosen: Any, folder: Path, name: str, arm: str, variant: str) -> dict[str, Any]:
    """Train if the arm trains, make its pictures, and score them."""
    from PIL import Image

    from coeffdiff.demo import new_places
    from coeffdiff.metrics.encoders import load_dino
    from coeffdiff.metrics.features import mean_pairwise_cosine
    from coeffdiff.pocket import POCKET_DINO, WEIGHTS
    from coeffdiff.pocket.judges import trusted_judges
    from coeffdiff.pocket.world.subjects import SUBJECTS, write_photos
    from coeffdiff.utils.grids import labelled_grid
    from coeffdiff.utils.png import save_png

    subject, judges = SUBJECTS[name], trusted_judges(WEIGHTS)
    photos = [Image.open(path).convert("RGB") for path in write_photos(subject, folder / "photos")]
    places = [place for place in new_places(subject) for _ in SEEDS]
    if arm in ("ceiling", "floor"):
        pictures, learned = round_trips(subject, arm, places), {}
    else:
        pictures, learned = adapted(chosen, folder, subject, arm, variant, places)
    dino = load_dino(POCKET_DINO)
    answers = judges.see("setting", pictures)
    rows = [(place, pictures[i : i + len(SEEDS)]) for i, place in enumerate(places) if i % len(SEEDS) == 0]
    save_png(labelled_grid(rows, [str(seed) for seed in SEEDS]), folder / "pictures.png")
    return {
        "subject": name,
        "arm": arm,
        "variant": variant,
        "similarity": round(mean_pairwise_cosine(dino.features(pictures), dino.features(photos)), 4),
        "setting": round(statistics.fmean(a == b for a, b in zip(answers, places, strict=True)), 4),
        **learned,
        "made": made(),
    }


def made() -> dict[str, str]:
    """On what, with what and when a cell is computed."""
    import torch

    from coeffdiff.sampling.device import choose_device

    device, dtype = choose_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    return {
        "device": name,
        "precision": str(dtype).removeprefix("torch."),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "date": datetime.date.today().isoformat(),
    }


def adapted(
    chosen: Any, folder: Path, subject: Any, arm: str, variant: str, places: Sequence[str]
) -> tuple[list[Any], dict[str, Any]]:
    """The arm's pictures, and what its training came to."""
    import torch

    from coeffdiff.config.loading import load_settings
    from coeffdiff.config.schema import ModelSettings
    from coeffdiff.hosts.diffusers import load_adapter
    from coeffdiff.method.adapter_file import read_coefficients
    from coeffdiff.models.finding import find_backbone
    from coeffdiff.models.loading import load_pipeline
    from coeffdiff.pocket import POCKET
    from coeffdiff.pocket.world import article
    from coeffdiff.sampling.device import choose_device, prepare_device
    from coeffdiff.sampling.generation import generate
    from coeffdiff.sampling.options import Options, Request
    from coeffdiff.training import loop

    device, dtype = choose_device()
    pipe = load_pipeline(find_backbone(ModelSettings(name=POCKET)), dtype=dtype)
    facts: dict[str, Any] = {}
    if arm in TRAINED:
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)  # of a try that was interrupted; a minute is lost at most
        values = values_of(arm, chosen.steps) | {
            "subject.images": str(folder / "photos"), "subject.class_word": subject.class_word, "output": str(run),
        }  # fmt: skip
        result = loop.train(load_settings(None, values, variant.split(",") if variant else []))
        load_adapter(pipe, result.adapter)
        facts = {"steps": result.steps, "training_seconds": round(result.seconds, 1)}
        _, alphas = read_coefficients(result.adapter)
        if alphas:
            every = torch.cat([alpha.flatten().abs() for alpha in alphas.values()])
            facts["mean_abs_alpha"] = round(float(every.mean()), 4)
    prepare_device(pipe, device)
    thing = f"{TOKEN} {subject.class_word}" if arm in TRAINED else article(subject.class_word)
    requests = [
        Request(f"a photo of {thing} {place}", SEEDS[i % len(SEEDS)]) for i, place in enumerate(places)
    ]
    options = Options(steps=chosen.denoising_steps, batch_size=len(requests))
    return [picture for _, picture in generate(pipe, requests, options)], facts


def round_trips(subject: Any, arm: str, places: Sequence[str]) -> list[Any]:
    """The subject, or another of its class, in each place, through the VAE."""
    import torch
    from diffusers import AutoencoderKL

    from coeffdiff.pocket import POCKET, shipped
    from coeffdiff.pocket.world import sample_scene
    from coeffdiff.utils.seeding import stable_seed
    from pocket_build.renders import seen_through

    seeds = [stable_seed(arm, subject.name, i) for i in range(len(places))]
    if arm == "ceiling":
        scenes = [subject.scene(seed, setting=place) for seed, place in zip(seeds, places, strict=True)]
    else:
        scenes = [
            sample_scene(seed, kind=subject.kind, setting=place)
            for seed, place in zip(seeds, places, strict=True)
        ]
    vae = AutoencoderKL.from_pretrained(shipped(POCKET) / "vae", torch_dtype=torch.float32).eval()
    return seen_through(vae, scenes)


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Means over subjects as Markdown, with the share of the way from base to ceiling, mean and deviation of the
    subjects' own shares; then on what it was measured."""
    import torch

    from coeffdiff.pocket import WEIGHTS

    arms: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in cells:
        arms.setdefault((one["arm"], one["variant"]), []).append(one)
    ways = ways_gone(cells)

    def gap(found: Sequence[dict[str, Any]]) -> str:
        known = [ways[key] for one in found if (key := key_of(one)) in ways]
        spread = f" +- {statistics.stdev(known):.0%}" if len(known) > 1 else ""
        return f"{statistics.fmean(known):.0%}{spread}" if len(known) == len(found) else ""

    lines = [
        "| arm | subjects | similarity | of the gap | setting | mean abs alpha | training s |",
        "|---|---|---|---|---|---|---|",
    ]
    for (arm, variant), found in arms.items():
        row = (
            f"{arm} {variant}".strip(), str(len(found)), mean(found, "similarity", 3), gap(found),
            mean(found, "setting", 2), mean(found, "mean_abs_alpha", 3), mean(found, "training_seconds", 0),
        )  # fmt: skip
        lines.append("| " + " | ".join(row) + " |")
    steps = json.loads((WEIGHTS / "record.json").read_text())["unet"]["steps"]
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    lines += [
        "",
        f"{datetime.date.today().isoformat()}, {device}, Python {platform.python_version()}, torch "
        f"{torch.__version__}; pocket's UNet has {steps} steps; {' '.join(sys.argv)}",
    ]
    return "\n".join(lines)


def by_subject(cells: Sequence[dict[str, Any]]) -> str:
    """A row for each subject, the arms as they are by default beside each other, as Markdown."""
    plain = [one for one in cells if not one["variant"]]
    ways, at = ways_gone(plain), {key_of(one): one for one in plain}
    lines = ["| subject | " + " | ".join(ARMS) + " |", "|---" * (len(ARMS) + 1) + "|"]
    for subject in dict.fromkeys(one["subject"] for one in plain):
        row = [subject.replace("_", " ")]
        for key in [(subject, arm, "") for arm in ARMS]:
            share = f" ({percent(ways[key])})" if key in ways else ""
            row.append(f"{at[key]['similarity']:.2f}{share}" if key in at else "")
        lines.append("| " + " | ".join(row) + " |")
    gone, places, alphas = ["**mean of the way**"], ["the place is right, mean (worst)"], ["mean abs alpha"]
    for arm in ARMS:
        found = [one for one in plain if one["arm"] == arm]
        settings = [one["setting"] for one in found]
        known = [ways[key] for one in found if (key := key_of(one)) in ways]
        gone.append(f"**{percent(statistics.fmean(known))}**" if known else "")
        places.append(f"{percent(statistics.fmean(settings))} ({percent(min(settings))})" if settings else "")
        alphas.append(mean(found, "mean_abs_alpha", 3))
    lines += ["| " + " | ".join(row) + " |" for row in (gone, places, alphas)]
    return "\n".join(lines)


def by_variant(cells: Sequence[dict[str, Any]]) -> str:
    """A row for each arm and variant, on the subjects that have variants: the way gone / the place is right, as
    Markdown."""
    ways, at = ways_gone(cells), {key_of(one): one for one in cells}
    subjects = list(dict.fromkeys(one["subject"] for one in cells if one["variant"]))
    varied = [arm for arm in TRAINED if any(one["variant"] and one["arm"] == arm for one in cells)]
    heads = ["arm", *(subject.replace("_", " ") for subject in subjects), "mean abs alpha"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm in varied:
        for variant in sorted({one["variant"] for one in cells if one["arm"] == arm}):
            keys = [(subject, arm, variant) for subject in subjects]
            row = [f"{arm}, {variant or 'the default'}"]
            row += [
                f"{percent(ways[key])} / {percent(at[key]['setting'])}" if key in ways else "" for key in keys
            ]
            row.append(mean([at[key] for key in keys if key in at], "mean_abs_alpha", 3))
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def ways_gone(cells: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """What share of the way from its subject's base to its ceiling each trained cell has come; without both, none."""
    ends = {(one["subject"], one["arm"]): one["similarity"] for one in cells if one["arm"] not in TRAINED}
    ways = {}
    for one in cells:
        low, high = (ends.get((one["subject"], end)) for end in ("base", "ceiling"))
        if one["arm"] in TRAINED and low is not None and high is not None:
            ways[key_of(one)] = (one["similarity"] - low) / (high - low)
    return ways


def key_of(one: dict[str, Any]) -> tuple[str, str, str]:
    return one["subject"], one["arm"], one["variant"]


def mean(cells: Sequence[dict[str, Any]], name: str, digits: int) -> str:
    values = [one[name] for one in cells if name in one]
    return f"{statistics.fmean(values):.{digits}f}" if values else ""


if __name__ == "__main__":
    sys.exit(main())
