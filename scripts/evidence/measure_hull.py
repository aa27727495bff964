"""How often an adapter's attention leaves the convex hulls that ordinary attention is caught in (proposition 4.2).

python scripts/evidence/measure_hull.py runs/a/adapter runs/b/adapter --json hull.json

A head's ordinary output is a convex combination of its values. Two denoising steps of each of three prompts are looked
at in every layer: of random heads and queries, how many outputs of the mixed maps lie outside the hull of their head's
values, by more than a ten-thousandth of the values' spread? An output projection of full rank is one-to-one, so where
one head is outside its hull, the layer is outside the sum of its projected hulls. Beside it stands the same count with
coeff = I, which must be 0. Needs scipy.

Source of the proposition: Miao, Chen and Qiu 2025, arXiv 2503.18337, section 4.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

PROMPTS = ("a photo of {} in the snow", "a photo of {} on the beach", "a photo of {} on a cobblestone street")
TOLERANCE = 1e-4  # of the values' spread


def main() -> int:
    from coeffdiff.utils.threads import choose_waiting

    choose_waiting()
    from coeffdiff.errors import CoeffDiffError
    from coeffdiff.utils.paths import path_argument

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "adapters", type=path_argument, nargs="+", help="run or adapter folders, all of one base model"
    )
    parser.add_argument("--looks", type=int, default=8, help="heads and queries a layer and prompt")
    parser.add_argument("--json", type=path_argument, help="also write the shares of each adapter here")
    chosen = parser.parse_args()
    try:
        rows = [look(path, chosen.looks) for path in chosen.adapters]
    except CoeffDiffError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(
        "| adapter | layers | outputs | outside | by, of the values' spread, on average | outside without alpha |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        for kind, found in row["layers"].items():
            print(
                f"| {row['adapter']} | {kind} | {found['outputs']} | {found['outside']:.0%} | "
                f"{found['distance']:.4f} | {found['outside_without_alpha']:.0%} |"
            )
    return 0


def look(path: Path, looks: int) -> dict[str, Any]:
    """One adapter on its own base model: for self- and cross-attention the share of outputs that are outside."""
    import torch

    from coeffdiff.method.attention import mixed_attention

    draw = np.random.default_rng(0)
    found: dict[str, list[tuple[float, float]]] = {"self": [], "cross": []}
    for q, k, v, coeff, mask in _attention_of(path):
        q, k, v = (tensor.double() for tensor in (q, k, v))
        kind = "self" if q.shape[2] == k.shape[2] else "cross"
        eye = torch.eye(len(coeff), dtype=torch.float64)
        outputs = [mixed_attention(q, k, v, c, mask=mask, backend="reference") for c in (coeff.double(), eye)]
        for _ in range(looks):
            head, query = draw.integers(q.shape[1]), draw.integers(q.shape[2])
            values = v[0, head].numpy()[None]
            spread = np.ptp(values[0], axis=0).max()
            mixed, plain = (
                distance_to_sum_of_hulls(out[0, head, query].numpy(), values) / spread for out in outputs
            )
            found[kind].append((mixed, plain))
    return {
        "adapter": str(path),
        "layers": {
            kind: {
                "outputs": len(distances),
                "outside": statistics.fmean(mixed > TOLERANCE for mixed, _ in distances),
                "distance": statistics.fmean([mixed for mixed, _ in distances if mixed > TOLERANCE] or [0.0]),
                "outside_without_alpha": statistics.fmean(plain > TOLERANCE for _, plain in distances),
            }
            for kind, distances in found.items()
            if distances
        },
    }


def _attention_of(path: Path) -> Iterator[tuple[Any, ...]]:
    """q, k, v, coeff and mask of every layer that mixes maps, at every step of each prompt's picture."""
    import torch

    from coeffdiff.config.schema import ModelSettings
    from coeffdiff.hosts.diffusers import load_adapter
    from coeffdiff.method.adapter_file import read_header
    from coeffdiff.method.adapter_paths import find_adapter
    from coeffdiff.method.attention import mixed_attention
    from coeffdiff.models.finding import find_backbone
    from coeffdiff.models.loading import load_pipeline
    from coeffdiff.sampling.generation import generate
    from coeffdiff.sampling.options import Options, Request

    folder = find_adapter(path)
    header = read_header(folder)
    pipe = load_pipeline(find_backbone(ModelSettings(name=header.base_model)), dtype=torch.float32)
    load_adapter(pipe, folder)
    seen: list[tuple[Any, ...]] = []

    def watched(q: Any, k: Any, v: Any, coeff: Any, *, mask: Any = None, **options: Any) -> Any:
        seen.append(tuple(t if t is None else t.detach() for t in (q, k, v, coeff, mask)))
        return mixed_attention(q, k, v, coeff, mask=mask, **options)

    name = f"{header.token} {header.class_word}" if header.class_word else header.token
    with mock.patch("coeffdiff.hosts.summed_alphas.mixed_attention", watched), torch.no_grad():
        for number, prompt in enumerate(PROMPTS):
            options = Options(steps=2, guidance=1.0)
            list(generate(pipe, [Request(prompt.format(name), number)], options))
    yield from seen


def distance_to_sum_of_hulls(point: np.ndarray, values: np.ndarray) -> float:
    """Largest coordinate, in the best case, by which `point` [C] lies outside the sum of hulls of values [H, K, C].

    A linear program: weights w[h, k] >= 0, sum_k w[h, k] = 1 for every head, and the smallest t for which the point,
    moved by at most t in every coordinate, is sum_hk w[h, k] values[h, k].
    """
    from scipy.optimize import linprog

    heads, keys, width = values.shape
    columns = values.transpose(2, 0, 1).reshape(width, heads * keys)
    slack = -np.ones((width, 1))
    found = linprog(
        c=[0.0] * (heads * keys) + [1.0],
        A_ub=np.block([[columns, slack], [-columns, slack]]),
        b_ub=np.concatenate([point, -point]),
        A_eq=np.hstack([np.kron(np.eye(heads), np.ones((1, keys))), np.zeros((heads, 1))]),
        b_eq=np.ones(heads),
        bounds=(0, None),
        method="highs",
    )
    if found.status != 0:
        raise ArithmeticError(found.message)
    return float(found.fun)


if __name__ == "__main__":
    sys.exit(main())
