"""Write the tables of the README's evidence section anew, from the cells beside it.

python scripts/evidence_tables.py            # after a comparison has put new cells into scripts/evidence/cells
python scripts/evidence_tables.py --check    # changes nothing; exit code 1 if a table is not what the cells say

A table stands between `<!-- table: core -->` and `<!-- end -->`, where core is a plan of configs/compare;
`dissected` is what dissect_comparison.py found, `customization` and `rates` what measure_customization.py did.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dissect_comparison
import measure_customization

ROOT = Path(__file__).parent.parent
CELLS = ROOT / "scripts" / "evidence" / "cells"
DISSECTED = ROOT / "scripts" / "evidence" / "dissected.json"
CUSTOMIZATION = ROOT / "scripts" / "evidence" / "customization"
README = ROOT / "README.md"
MARKED = re.compile(r"(?<=<!-- table: )(\w+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)
BROAD = ("dino", "dino_masked", "clip_i", "clip_t", "place", "drift", "drift_class", "drift_unrelated")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"  # the cells' precision is a part of their names
    before = README.read_text(encoding="utf-8")
    found = tables(match[1] for match in MARKED.finditer(before))
    after = MARKED.sub(lambda match: f"{match[1]}{match[2]}\n{found[match[1]]}\n", before)
    if chosen.check:
        wrong = [
            match[1] for match, now in zip(MARKED.finditer(before), MARKED.finditer(after), strict=True)
            if match[3] != now[3]
        ]  # fmt: skip
        if wrong:
            print(f"Not what the cells say: {', '.join(wrong)}.")
        return bool(wrong)
    README.write_text(after, encoding="utf-8")
    return 0


def tables(names: Any) -> dict[str, str]:
    """Markdown by the plan's name."""
    from coeffdiff.config import load_section
    from coeffdiff.console import hushed
    from coeffdiff.evaluation.compare import Comparison, Studio
    from coeffdiff.evaluation.paired import summarize

    customized = measure_customization.kept(CUSTOMIZATION)
    made = {
        "dissected": dissect_comparison.table(json.loads(DISSECTED.read_text())),
        "customization": measure_customization.by_subject(customized),
        "rates": measure_customization.by_variant(customized),
    }
    with tempfile.TemporaryDirectory() as folder, hushed():
        output = Path(folder)
        (output / "cells").symlink_to(CELLS, target_is_directory=True)
        studio = None
        for name in set(names) - set(made):
            plan = load_section(Comparison, ROOT / "configs" / "compare" / f"{name}.yaml", {}, ())
            studio = studio or Studio(plan, output)
            studio.plan = plan
            jobs = studio.jobs()
            asked = [(job, point) for job in jobs for point in job.points]
            cells = [cell for job, point in asked if (cell := studio.read(job, point))]
            ends = {job.arm: (job.end.steps, job.end.scale) for job in jobs}
            missing = [""] * (len(asked) - len(cells))
            results = summarize(cells, ends, plan.reference, missing)
            of = {
                "core": transposed, "tuning": at_every_step, "tuning_controls": at_every_step,
                "scales": at_every_scale,
            }  # fmt: skip
            made[name] = of.get(name, by_arm)(results)
    return made


def by_arm(results: Mapping[str, Any]) -> str:
    """A row for each arm: the two axes with their differences to the reference, and what it costs."""
    lines = [
        f"| arm | DINO, photos masked | less {results['reference']}'s | CLIP-T | less {results['reference']}'s | place "
        "| drift | mean abs alpha | numbers | adapter, KB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, found in results["arms"].items():
        pairs, cost = results["paired"].get(arm, {"scores": {}})["scores"], found["cost"]
        entries = [arm]
        for name in ("dino_masked", "clip_t"):
            entries += [mean(found, name), difference(pairs, name)]
        alpha = f"{cost['mean_abs_alpha']:.3f}" if "mean_abs_alpha" in cost else ""
        entries += [percent(found, "place"), mean(found, "drift"), alpha]
        entries += (
            [f"{cost['parameters']:,.0f}", f"{cost['adapter_bytes'] / 1000:,.0f}"] if cost else ["", ""]
        )
        lines.append("| " + " | ".join(entries) + " |")
    return "\n".join([*lines, "", how_many(results)])


def transposed(results: Mapping[str, Any]) -> str:
    """A row for each score: the arms, then their differences to the reference."""
    from coeffdiff.evaluation.paired import SCORES

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


def at_every_step(results: Mapping[str, Any]) -> str:
    return _curves(results, "steps", "{} steps")


def at_every_scale(results: Mapping[str, Any]) -> str:
    return _curves(results, "scale", "scale {:g}")


def _curves(results: Mapping[str, Any], over: str, title: str) -> str:
    """DINO / CLIP-T / place of each arm at every point; the point that is best of an arm's tries stands out."""
    points = sorted({point[over] for curve in results["curves"].values() for point in curve})
    lines = ["| arm | " + " | ".join(title.format(point) for point in points) + " |"]
    lines.append("|---" * (len(points) + 1) + "|")
    best = {(one["arm"], one["steps"], one["scale"]) for one in results["best"].values()}
    for arm, curve in results["curves"].items():
        entries = []
        at = {point[over]: point for point in curve}
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
    if name not in pairs:
        return ""
    one = pairs[name]
    return f"{one['difference']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"


def how_many(results: Mapping[str, Any]) -> str:
    counts = sorted({found["subjects"] for found in results["arms"].values()}) or [0]
    cells = sum(made["cells"] for made in results["made"])
    lacking = f"; {len(results['missing'])} more are missing" if results["missing"] else ""
    subjects = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    return f"{subjects} subjects, {cells} cells{lacking}."


if __name__ == "__main__":
    sys.exit(main())
