"""Reports as single HTML files: photos, pictures, scores, curves and heat maps."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from coeffdiff.data.photos import read_photos
from coeffdiff.evaluation.heatmap import draw_heat_maps
from coeffdiff.evaluation.inspection import inspect_adapter
from coeffdiff.evaluation.plots import draw_comparison
from coeffdiff.evaluation.statistics import SCORES
from coeffdiff.training.curves import draw_curves
from coeffdiff.training.run_folder import RunFolder
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.grids import fitted
from coeffdiff.utils.jpeg import jpeg_bytes

# Cost of an adapter -> title of its column
COSTS = {
    "parameters": "trained numbers",
    "adapter_bytes": "adapter, bytes",
    "seconds_a_step": "s/step",
    "peak_gib": "peak GiB",
    "mean_abs_alpha": "mean |alpha|",
}


@dataclass(frozen=True)
class RunPage:
    """A run on a page. data: as in evaluation.json; thumbnails, photos: JPEG; run: its folder, if known."""

    data: dict[str, Any]
    thumbnails: Mapping[str, bytes]
    run: RunFolder | None
    adapter: Path
    photos: Sequence[bytes]


def write_report(results: Mapping[str, Any], pages: Sequence[RunPage], file: Path) -> None:
    """Write the page. Every text from the user or a file is escaped; nothing is loaded from elsewhere."""
    file.write_text(render_report(results, pages), encoding="utf-8")


def render_report(results: Mapping[str, Any], pages: Sequence[RunPage]) -> str:
    """The page as HTML."""
    return _filled(
        "report.html.j2",
        results=results,
        columns=_columns(page.data["scores"] for page in pages),
        runs=[_run(page) for page in pages],
    )


def write_comparison(
    results: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    photos: Mapping[str, Path],
    strips: Mapping[tuple[str, str], Path],
    folder: Path,
) -> None:
    """report.html and comparison.png of a comparison.

    Args:
        results: of statistics.summarize().
        photos: subject -> folder.  strips: (subject, arm) -> a picture of each prompt in a row, where they are kept.
    """
    plot = folder / "comparison.png"
    with atomic_write(plot) as unfinished:
        draw_comparison(results, unfinished)
    shown = [
        {
            "name": name,
            "photos": [_uri(_as_jpeg(fitted(photo.open(), 128))) for photo in read_photos(of).photos[:6]],
            "rows": [
                {"arm": arm, "uri": _uri(_as_jpeg(Image.open(strips[name, arm])))}
                for arm in results["arms"]
                if (name, arm) in strips
            ],
        }
        for name, of in photos.items()
    ]
    page = _filled(
        "comparison.html.j2",
        results=results,
        columns=_columns(arm["scores"] for arm in results["arms"].values()),
        costs=[name for name in COSTS if any(name in arm["cost"] for arm in results["arms"].values())],
        cost_names=COSTS,
        plot=_uri(_as_jpeg(Image.open(plot))),
        subjects=shown,
        cells=cells,
        score_names=SCORES,
    )
    with atomic_write(folder / "report.html") as unfinished:
        unfinished.write_text(page, encoding="utf-8")


def _filled(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("coeffdiff.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def _columns(scores: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Name, label and better direction of every score that any of them has."""
    present = {name for of in scores for name in of}
    return [(name, *labels) for name, labels in SCORES.items() if name in present]


def _run(page: RunPage) -> dict[str, Any]:
    """A run as the template takes it."""
    curves = _curves(page.run) if page.run else None
    return {
        **page.data,
        "photo_uris": [_uri(photo) for photo in page.photos],
        "rows": _rows(page),
        "pairs": _pairs(page),
        "curves": curves and _uri(curves),
        "maps": [_uri(content) for content in _heat_maps(page.adapter)],
    }


def _rows(page: RunPage) -> list[dict[str, Any]]:
    """The subject's pictures, a row for each prompt."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for number, picture in enumerate(page.data["pictures"]):
        shown = {"uri": _uri(page.thumbnails[f"subject-{number}"]), "seed": picture["seed"]}
        own = [(SCORES[name][0], picture[name]) for name in ("dino", "clip_t") if name in picture]
        rows.setdefault(picture["prompt"], []).append(shown | {"scores": own})
    return [{"prompt": prompt, "pictures": pictures} for prompt, pictures in rows.items()]


def _pairs(page: RunPage) -> list[dict[str, Any]]:
    """Pictures without the token, the base model's beside the adapter's; those that moved farthest first."""
    pairs = [
        {
            "prompt": one["prompt"],
            "seed": one["seed"],
            "moved": one.get("dino", one.get("clip")),
            "base": _uri(page.thumbnails[f"base-{number}"]),
            "adapted": _uri(page.thumbnails[f"drift-{number}"]),
        }
        for number, one in enumerate(page.data["drift"])
    ]
    return sorted(pairs, key=lambda pair: -pair["moved"])


def _curves(run: RunFolder) -> bytes | None:
    """Loss, alpha and validation scores over the steps; None if the run has no log."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "curves.png"
        draw_curves(run.log, file)
        return _as_jpeg(Image.open(file)) if file.is_file() else None


def _heat_maps(adapter: Path) -> list[bytes]:
    """All alphas of an adapter in one picture, or none if it has no alpha."""
    inspection = inspect_adapter(adapter)
    if not inspection.deviations:
        return []
    deviations = {layer: deviation.numpy() for layer, deviation in inspection.deviations.items()}
    return [_as_jpeg(draw_heat_maps(deviations, f"alpha of {' and '.join(inspection.header.tokens)}"))]


def _as_jpeg(image: Image.Image) -> bytes:
    return jpeg_bytes(image, quality=88)


def _uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
