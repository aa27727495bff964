"""An inspection as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from coeffdiff.evaluation.inspection import PROJECTIONS, BlockReport, HeadReport, Inspection, SimplexReport
from coeffdiff.hosts.hub.address import origin_of
from coeffdiff.method.adapter_header import AdapterHeader

# Title of a column -> key of a BlockReport's norms, where they differ
_KEYS = {"off-diagonal": "off_diagonal", "mean |entry|": "mean"}


def tables(inspection: Inspection, heads: int = 10) -> Group:
    """What rich prints: the adapter in words, alpha and LoRA by block, and its most recombined heads."""
    parts: list[Any] = [_facts(inspection)]
    if inspection.alpha_blocks:
        columns = ("norm", "diagonal", "off-diagonal", "mean |entry|", "largest")
        parts += [
            "",
            _block_table("How far alpha moved (coeff - I, at scale 1)", inspection.alpha_blocks, columns),
        ]
    if inspection.lora_blocks:
        title = "LoRA: norm of the weight change" + (
            " before DoRA's magnitudes" if _is_dora(inspection) else ""
        )
        parts += ["", _block_table(title, inspection.lora_blocks, ("norm", *PROJECTIONS))]
    if inspection.simplex:
        parts += ["", _simplex_text(inspection.simplex)]
    if inspection.heads:
        parts += ["", _head_table(inspection.heads[:heads], len(inspection.heads), inspection.taken)]
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def _is_dora(inspection: Inspection) -> bool:
    return bool(inspection.header.lora and inspection.header.lora.dora)


def _facts(inspection: Inspection) -> Table:
    header = inspection.header
    table = Table.grid(padding=(0, 2))
    holds = []
    if header.heads:
        kinds = sorted({*header.heads.values()})
        heads = " or ".join(map(str, kinds))
        holds.append(
            f"alpha: {inspection.alpha_parameters:,} numbers in {len(header.heads)} layers of {heads} heads "
            f"({header.form} form)"
        )
    if header.lora:
        name = "DoRA" if header.lora.dora else "LoRA"
        holds.append(
            f"{name}: {inspection.lora_parameters:,} numbers, rank {header.lora.rank}, alpha {header.lora.alpha:g}"
        )
    if header.vectors:
        tokens = (
            f"learned token{'s' * (len(header.named) > 1)} {', '.join(one.token for one in header.named)}"
        )
        encoders = " and ".join(header.base_family.text_networks)
        holds.append(f"{tokens}: {header.vectors} vector{'s' * (header.vectors > 1)} each in {encoders}")
    files = [f"{name} {size:,} bytes" for name, size in inspection.files.items()]
    lines = {
        "adapter": origin_of(inspection.folder),
        "kind": header.described,
        "base model": header.base_model,
        "VAE": (header.base and header.base.vae) or "",
        "configs": (header.base and header.base.config) or "",
        **_words(header),
        "trained": f"{header.trained_steps} steps at {header.resolution} px",
        "scale": f"{header.recommended_scale:g} recommended",
        "holds": "\n".join(holds),
        "merged": "\n".join(
            f"{part.token} {part.class_word or ''} x {part.scale:g} ({part.kind}, {part.trained_steps} steps)"
            for part in header.merged
        ),
        "files": "\n".join([*files, f"{sum(inspection.files.values()):,} bytes in all"]),
    }
    for name, value in lines.items():
        if value:
            table.add_row(Text(name), Text(value, overflow="fold"))
    return table


def _words(header: AdapterHeader) -> dict[str, str]:
    """Token and class word, or a line for each of several subjects."""
    if header.subjects:
        lines = [f"<V{number}> {call}" for number, call in enumerate(header.calls, 1)]
        return {"subjects": "\n".join(lines)}
    return {"token": header.token, "class word": header.class_word or "none"}


def _table(title: str, *columns: str, words: int) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number < words else "right", overflow="fold")
    return table


def _block_table(title: str, blocks: Sequence[BlockReport], columns: Sequence[str]) -> Table:
    table = _table(title, "block", "attention", "layers", *columns, words=2)
    for block in blocks:
        if block.block == "all":
            table.add_section()
        keys = ["all" if name == "norm" else _KEYS.get(name, name) for name in columns]
        numbers = [f"{block.norms[key]:.4g}" if key in block.norms else "" for key in keys]
        table.add_row(*map(Text, (block.block, block.attention, str(block.layers), *numbers)))
    return table


def _head_table(rows: Sequence[HeadReport], of: int, taken: str) -> Table:
    title = f"The {len(rows)} most recombined of {of:,} heads"
    table = _table(title, "layer", "head", "row norm", f"own {taken}", "most of another", words=1)
    for row in rows:
        source = f"head {row.source} x {row.weight:+.3f}" if row.source != row.head else ""
        table.add_row(*map(Text, (row.layer, str(row.head), f"{row.norm:.4g}", f"x {row.own:.3f}", source)))
    return table


def _simplex_text(simplex: SimplexReport) -> Text:
    share = simplex.outside / simplex.rows
    return Text(
        f"{simplex.outside:,} of {simplex.rows:,} heads ({share:.0%}) leave the convex hull that softmax keeps to: "
        f"{simplex.negative:,} take a map with a negative weight (down to {simplex.smallest:+.3f}), "
        f"the weights of {simplex.sums:,} do not add up to 1 (sums from {simplex.lowest_sum:.3f} "
        f"to {simplex.highest_sum:.3f})."
    )
