"""Write the tables of the README beside this file, core.png and depth.png, from the recorded cells.

python scripts/evidence/evidence_tables.py            # after a comparison has put new cells into cells/, which are
                                                      # packed into cells/PLAN.jsonl
python scripts/evidence/evidence_tables.py --check    # changes nothing; exit code 1 if a table is out of date

A table stands between `<!-- table: core -->` and `<!-- end -->`, where core is a plan of configs/compare. `dissected`,
`moved` and `ceiling` are what dissect_comparison.py found, `shares` is gain_shares.py's, `classify_NAME` is of the file
classify/cells/NAME.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import classify_tables
import depth_curve
import dissect_comparison
import gain_shares

EVIDENCE = Path(__file__).parent
ROOT = EVIDENCE.parent.parent
CELLS = EVIDENCE / "cells"
DISSECTED = EVIDENCE / "dissected.json"
CLASSIFY = EVIDENCE / "classify"
PLANS = {file.stem for file in (ROOT / "configs" / "compare").glob("*.yaml")}
PAGE = EVIDENCE / "README.md"
MARKED = re.compile(r"(?<=<!-- table: )(\w+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)
# Table -> the plans it is of, where that is not the one of its name
MADE_FROM = dict.fromkeys(("dissected", "moved", "ceiling"), ("core",)) | {"shares": gain_shares.PLANS}
BROAD = ("dino", "dino_masked", "clip_i", "clip_t", "place", "drift", "drift_class", "drift_unrelated")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"  # the cells' precision is a part of their names
    text = PAGE.read_text(encoding="utf-8")
    asked = {match[1] for match in MARKED.finditer(text)}
    needed = {plan for name in asked for plan in MADE_FROM.get(name, (name,))}
    plans = gathered(needed & PLANS, pack=not chosen.check)
    found = tables(plans, asked)
    undrawn = [name for name in PICTURES if name in plans and not drawn(name, plans[name])]
    wrong = [f"{name}.png" for name in undrawn]
    wrong += [match[1] for match in MARKED.finditer(text) if match[3] != f"\n{found[match[1]]}\n"]
    if chosen.check:
        if wrong:
            print(f"Not what the cells say: {', '.join(wrong)}.")
        return bool(wrong)
    PAGE.write_text(MARKED.sub(lambda match: f"{match[1]}{match[2]}\n{found[match[1]]}\n", text), "utf-8")
    for name in undrawn:
        draw(name, plans[name])
    return 0


def draw_core(plan: Gathered, file: Path) -> None:
    from coeffdiff.evaluation.plots import draw_comparison

    draw_comparison(plan.results, file)


PICTURES: dict[str, Callable[[Gathered, Path], None]] = {
    "core": draw_core,
    "depth": lambda plan, file: depth_curve.draw(plan.cells, plan.ends, file),
}
"""Of the plans that have one, in NAME.png."""


def draw(name: str, plan: Gathered) -> None:
    """A plan's picture, with a digest in it of what it was drawn from."""
    file, carried = picture(name), PngInfo()
    PICTURES[name](plan, file)
    carried.add_text("results", digest(plan.results))
    with Image.open(file) as image:
        image.save(file, pnginfo=carried, optimize=True)


def drawn(name: str, plan: Gathered) -> bool:
    """Whether a plan's picture is there, of these numbers."""
    return picture(name).exists() and Image.open(picture(name)).info.get("results") == digest(plan.results)


def picture(name: str) -> Path:
    return PAGE.with_name(f"{name}.png")


def digest(results: Mapping[str, Any]) -> str:
    """Of the numbers that a plot shows, to four decimals: the last digits depend on the processor."""
    exact = json.dumps([results["arms"], results["paired"]])
    rounded = json.loads(exact, parse_float=lambda digits: round(float(digits), 4))
    shown = json.dumps(rounded, sort_keys=True)
    return hashlib.sha256(shown.encode()).hexdigest()[:16]


def tables(found: Mapping[str, Gathered], asked: Iterable[str]) -> dict[str, str]:
    """Markdown by the name of a table, of these plans and of what is no plan's."""
    own: dict[str, Callable[..., str]] = {
        "dissected": lambda core: dissect_comparison.table(core.dissected),
        "moved": lambda core: dissect_comparison.moved(core.dissected),
        "ceiling": lambda core: ceiling(core.dissected, core.cells),
        "shares": lambda *_: gain_shares.table({name: plan.cells for name, plan in found.items()}),
    }
    forms = {"core": transposed, "tuning": at_every_step, "ranks": by_rank, "depth": by_depth}
    made = classify_tables.tables(CLASSIFY)
    made |= {
        name: form(*(found[plan] for plan in MADE_FROM[name])) for name, form in own.items() if name in asked
    }
    return made | {name: forms.get(name, by_arm)(plan) for name, plan in found.items()}


@dataclass(frozen=True)
class Gathered:
    """What is there of a plan: its cells, what they say together, and what was dissected of its adapters."""

    cells: list[dict[str, Any]]
    ends: dict[str, tuple[int, float]]
    results: dict[str, Any]
    dissected: list[dict[str, Any]]

    def against(self, reference: str) -> dict[str, Any]:
        """The arms' paired differences to another than the plan's own reference."""
        from coeffdiff.evaluation.statistics import summarize

        found: dict[str, Any] = summarize(self.cells, self.ends, reference)["paired"]
        return found


def gathered(plans: Iterable[str], pack: bool = False) -> dict[str, Gathered]:
    """By the plan's name in configs/compare. pack: move its new cells into its file."""
    from coeffdiff.config.loading import load_section
    from coeffdiff.evaluation.comparison_plan import Comparison
    from coeffdiff.evaluation.comparison_runner import ComparisonRunner
    from coeffdiff.evaluation.statistics import summarize
    from coeffdiff.utils.console import muted

    found = {}
    dissected = json.loads(DISSECTED.read_text(encoding="utf-8")) if DISSECTED.exists() else []
    with tempfile.TemporaryDirectory() as folder, muted():
        output = Path(folder)
        (output / "cells").symlink_to(CELLS, target_is_directory=True)
        studio = None
        for name in sorted(set(plans)):
            plan = load_section(Comparison, plan_file(name))
            studio = studio or ComparisonRunner(plan, output)
            studio.plan = plan
            jobs = studio.jobs()
            asked = [(job, point) for job in jobs for point in job.points]
            cells = [cell for job, point in asked if (cell := studio.made.read(job, point))]
            if pack:
                studio.made.cells.pack(name, (job.cells[point] for job, point in asked))
            ends = {job.arm: (job.end.steps, job.end.scale) for job in jobs}
            missing = [""] * (len(asked) - len(cells))
            results = summarize(cells, ends, plan.reference, missing)
            studio.plan = plan.model_copy(
                update={"drift_pictures": 0}
            )  # as dissect_comparison.py looks at it
            rows = dissect_comparison.kept(studio, "coeff+lora", dissected) if "coeff+lora" in ends else []
            found[name] = Gathered(cells, ends, results, rows)
    return found


def plan_file(name: str) -> Path:
    return ROOT / "configs" / "compare" / f"{name}.yaml"


def by_arm(gathered: Gathered) -> str:
    """A row for each arm: the two axes with their differences to the reference, and what it costs."""
    results = gathered.results
    return _by_arm(results, results["paired"], f"less {results['reference']}'s")


def by_rank(gathered: Gathered) -> str:
    """The same with each arm beside LoRA of its own rank."""
    pairs = {
        f"coeff+{lora}": gathered.against(lora)[f"coeff+{lora}"]
        for lora in gathered.ends
        if lora.startswith("lora") and f"coeff+{lora}" in gathered.results["arms"]
    }
    return _by_arm(gathered.results, pairs, "less lora's of that rank")


def by_depth(gathered: Gathered) -> str:
    """What alpha brings by how many layers have it."""
    return f"{depth_curve.table(gathered.cells, gathered.ends)}\n\n{how_many(gathered.results)}"


def _by_arm(results: Mapping[str, Any], paired: Mapping[str, Any], less: str) -> str:
    """Columns that no arm fills are left out, as drift where no pictures were made for it."""
    heads = ["arm", "DINO, photos masked", less, "CLIP-T", less, "place", "drift", "mean abs alpha"]
    rows = [[*heads, "numbers", "adapter, KB"]]
    for arm, found in results["arms"].items():
        pairs, cost = paired.get(arm, {"scores": {}})["scores"], found["cost"]
        entries = [arm]
        for name in ("dino_masked", "clip_t"):
            entries += [mean(found, name), difference(pairs, name)]
        alpha = f"{cost['mean_abs_alpha']:.3f}" if "mean_abs_alpha" in cost else ""
        entries += [percent(found, "place"), mean(found, "drift"), alpha]
        entries += (
            [f"{cost['parameters']:,.0f}", f"{cost['adapter_bytes'] / 1000:,.0f}"] if cost else ["", ""]
        )
        rows.append(entries)
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    lines = ["| " + " | ".join(row) + " |" for row in zip(*columns, strict=True)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:], "", how_many(results)])


def transposed(gathered: Gathered) -> str:
    """A row for each score: the arms, then their differences to the reference."""
    from coeffdiff.evaluation.statistics import SCORES

    results = gathered.results
    arms, others = list(results["arms"]), [arm for arm in results["paired"] if arm != "base"]
    heads = [*arms, *(f"{arm} - {results['reference']}" for arm in reversed(others))]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in BROAD:
        entries = [" ".join(SCORES[name])] + [mean(results["arms"][arm], name) for arm in arms]
        for arm in reversed(others):
            says = results["paired"][arm]["scores"][name]["says"]
            entries.append(f"{difference(results['paired'][arm]['scores'], name)}, {says}")
        lines.append("| " + " | ".join(entries) + " |")
    return "\n".join([*lines, "", how_many(results)])


def ceiling(rows: list[dict[str, Any]], cells: list[dict[str, Any]]) -> str:
    """What the subjects' own renders score in the places of the prompts, less what the arms do."""
    from coeffdiff.evaluation.statistics import SCORES, paired

    renders = [
        {"subject": row["subject"], "seed": row["seed"], "scores": row["scores"]}
        for row in rows
        if row["part"] == dissect_comparison.PHOTOS
    ]
    against = ("lora", "coeff", "coeff+lora")
    pairs = {
        arm: paired(renders, [cell for cell in cells if cell["arm"] == arm])["scores"] for arm in against
    }
    lines = [
        "| | the subject itself | " + " | ".join(f"less {arm}'s" for arm in against) + " |",
        "|---" * (len(against) + 2) + "|",
    ]
    for name in dissect_comparison.SHOWN:
        by_subject: dict[str, list[float]] = {}
        for one in renders:
            by_subject.setdefault(one["subject"], []).append(one["scores"][name])
        mean = statistics.fmean(statistics.fmean(values) for values in by_subject.values())
        entries = [" ".join(SCORES[name]), f"{mean:.3f}"]
        entries += [f"{difference(pairs[arm], name)}, {pairs[arm][name]['says']}" for arm in against]
        lines.append("| " + " | ".join(entries) + " |")
    return "\n".join([*lines, "", f"{len({one['subject'] for one in renders})} subjects."])


def at_every_step(gathered: Gathered) -> str:
    """DINO / CLIP-T / place of each arm after so many steps; the point that is best of an arm's tries stands out."""
    results = gathered.results
    points = sorted({point["steps"] for curve in results["curves"].values() for point in curve})
    lines = ["| arm | " + " | ".join(f"{point} steps" for point in points) + " |"]
    lines.append("|---" * (len(points) + 1) + "|")
    best = {(one["arm"], one["steps"], one["scale"]) for one in results["best"].values()}
    for arm, curve in results["curves"].items():
        entries = []
        at = {point["steps"]: point for point in curve}
        for where in points:
            if where not in at:
                entries.append("")
                continue
            point = at[where]
            scores = point["scores"]
            entry = f"{scores['dino']:.2f} / {scores['clip_t']:.2f} / {100 * scores['place']:.0f} %"
            chosen = (arm, point["steps"], point["scale"]) in best
            entries.append(f"**{entry}**" if chosen else entry)
        lines.append(f"| {arm} | " + " | ".join(entries) + " |")
    return "\n".join([*lines, "", how_many(results)])


def mean(found: Mapping[str, Any], name: str) -> str:
    return f"{found['scores'][name]['mean']:.3f}" if name in found["scores"] else ""


def percent(found: Mapping[str, Any], name: str) -> str:
    return f"{100 * found['scores'][name]['mean']:.0f} %" if name in found["scores"] else ""


def difference(pairs: Mapping[str, Any], name: str) -> str:
    return depth_curve.with_interval(pairs[name]) if name in pairs else ""


def how_many(results: Mapping[str, Any]) -> str:
    counts = sorted({found["subjects"] for found in results["arms"].values()}) or [0]
    cells = sum(made["cells"] for made in results["made"])
    lacking = f"; {len(results['missing'])} more are missing" if results["missing"] else ""
    subjects = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    made = results["made"]
    dates = sorted({date for way in made for date in way["dates"]})
    between = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else ""
    devices = " and ".join(dict.fromkeys(way["device"] for way in made))
    return f"{subjects} subjects, {cells} cells{lacking}; {between}, {devices}."


if __name__ == "__main__":
    sys.exit(main())
