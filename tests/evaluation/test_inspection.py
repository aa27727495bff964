"""Inspection: numbers that can be worked out by hand, from files alone."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save, save_file

from coeffdiff.errors import AdapterError
from coeffdiff.evaluation.heatmap import _places, draw_heat_maps
from coeffdiff.evaluation.inspection import block_and_attention, inspect_adapter
from coeffdiff.evaluation.inspection_tables import tables
from coeffdiff.method.adapter_header import AdapterHeader, LoraHeader, format_for
from coeffdiff.method.adapter_paths import COEFF_FILE, LORA_FILE

SELF = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
CROSS = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
MIDDLE = "mid_block.attentions.0.transformer_blocks.1.attn1"

ALPHAS = {
    SELF: torch.tensor([[0.0, 0.5], [-0.25, 0.25]]),  # coeff rows [1, 1/2] and [-1/4, 5/4]
    CROSS: torch.zeros(3, 3),
    MIDDLE: torch.tensor([[-0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [3.0, 4.0, 0.0]]),
}


def write(folder: Path, alphas=ALPHAS, lora=None, tensors=None, mixes="maps", **more) -> Path:
    folder.mkdir()
    kind = "+".join(["coeff"] * bool(alphas) + ["lora"] * bool(lora))
    header = AdapterHeader(
        kind=kind,
        base_model="some/model",
        token="sks",
        class_word="ball",
        heads={layer: len(alpha) for layer, alpha in alphas.items()},
        lora=lora,
        trained_steps=9,
        resolution=64,
        mixes=mixes,
        **{"format_version": format_for(mixes)} | more,
    )
    content = {f"{layer}.alpha": alpha.contiguous() for layer, alpha in alphas.items()}
    (folder / COEFF_FILE).write_bytes(save(content, metadata={"coeffdiff": header.model_dump_json()}))
    if tensors:
        save_file(tensors, folder / LORA_FILE)
    return folder


def lora_of(module: str, down: list, up: list) -> dict[str, torch.Tensor]:
    return {
        f"unet.{module}.lora.down.weight": torch.tensor(down),
        f"unet.{module}.lora.up.weight": torch.tensor(up),
    }


def printed(found) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(tables(found))
    return console.export_text()


def test_how_far_alpha_moved_by_hand(tmp_path):
    """Norms 0, sqrt(1/4 + 1/16 + 1/16) and sqrt(1/4 + 1/4 + 25), split into the diagonal and the rest."""
    found = inspect_adapter(write(tmp_path / "a"))
    assert found.alpha_parameters == 4 + 9 + 9 and found.lora_parameters == 0
    first, untouched, middle = found.layers
    assert (first.block, first.attention, first.heads) == ("down_blocks.1", "self", 2)
    assert first.norm == pytest.approx(math.sqrt(3 / 8))
    assert first.diagonal == pytest.approx(1 / 4)
    assert first.off_diagonal == pytest.approx(math.sqrt(5 / 16))
    assert (first.mean, first.largest) == (0.25, 0.5)
    assert untouched.norm == untouched.mean == 0
    assert middle.norm == pytest.approx(math.sqrt(25.5))
    blocks = {(b.block, b.attention): b for b in found.alpha_blocks}
    assert list(blocks) == [
        ("down_blocks.1", "self"),
        ("down_blocks.1", "cross"),
        ("mid_block", "self"),
        ("all", "both"),
    ]
    whole = blocks["all", "both"]
    assert whole.layers == 3 and whole.norms["all"] == pytest.approx(math.sqrt(3 / 8 + 25.5))
    assert whole.norms["mean"] == pytest.approx((1.0 + 0 + 8.0) / 22)
    assert whole.norms["largest"] == 4


def test_the_most_recombined_heads_by_hand(tmp_path):
    """Head 2 of the middle block, row [3, 4, 1]: norm 5, own map 1, most of head 1 with weight 4."""
    found = inspect_adapter(write(tmp_path / "a"))
    top = found.heads[0]
    assert (top.layer, top.head, top.norm, top.own, top.source, top.weight) == (MIDDLE, 2, 5.0, 1.0, 1, 4.0)
    norms = [row.norm for row in found.heads]
    assert norms == sorted(norms, reverse=True) and len(norms) == 2 + 3 + 3
    second = found.heads[1]  # row [1/2, 0, 1/2]
    assert (second.layer, second.head, second.own, second.source) == (MIDDLE, 0, 0.5, 2)
    negative = next(row for row in found.heads if (row.layer, row.head) == (SELF, 1))
    assert (negative.source, negative.weight, negative.own) == (0, -0.25, 1.25)


def test_rows_that_leave_the_simplex_are_counted(tmp_path):
    """Of 8 rows: [1, 1/2] sums to 3/2, [-1/4, 5/4] is negative, [3, 4, 1] sums to 8; [1/2, 0, 1/2] is a mixture."""
    simplex = inspect_adapter(write(tmp_path / "a")).simplex
    assert (simplex.rows, simplex.outside, simplex.negative, simplex.sums) == (8, 3, 1, 2)
    assert (simplex.smallest, simplex.lowest_sum, simplex.highest_sum) == (-0.25, 1.0, 8.0)


def test_mixed_values_leave_no_hull(tmp_path):
    """The same numbers of the same heads, but said to mix values, whose weights are bound to no simplex."""
    maps, values = (inspect_adapter(write(tmp_path / mixes, mixes=mixes)) for mixes in ("maps", "values"))
    assert values.simplex is None and values.as_json()["header"]["mixes"] == "values"
    assert (values.layers, values.heads) == (maps.layers, maps.heads)
    assert "mixing values" in printed(values) and "own values" in printed(values)
    assert "convex hull" not in printed(values) and "own map" not in printed(values)
    assert "mixing values" not in printed(maps) and "own map" in printed(maps)


def test_other_forms_are_measured_from_the_identity(tmp_path):
    """alpha = I in the identity form is the base model: nothing moved."""
    found = inspect_adapter(write(tmp_path / "a", {SELF: torch.eye(3)}, form="identity"))
    assert found.layers[0].norm == 0 and found.simplex.outside == 0
    assert not found.deviations[SELF].any()


def test_the_norm_of_a_lora_by_hand(tmp_path):
    """alpha / rank * |B A| with B A = [[3, 4], [0, 0]]: 2 * 5; and [[1], [2]] [[2, 0]] = [[2, 0], [4, 0]]."""
    tensors = lora_of(f"{SELF}.to_q", [[3.0, 4.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]])
    tensors |= lora_of(f"{CROSS}.to_out.0", [[2.0, 0.0], [0.0, 0.0]], [[1.0, 9.0], [2.0, 9.0]])
    found = inspect_adapter(write(tmp_path / "a", {}, LoraHeader(rank=2, alpha=4), tensors))
    assert (found.lora_parameters, found.alpha_blocks, found.simplex) == (16, [], None)
    blocks = {(b.block, b.attention): b for b in found.lora_blocks}
    assert blocks["down_blocks.1", "self"].norms == {"all": pytest.approx(10), "to_q": pytest.approx(10)}
    assert blocks["down_blocks.1", "cross"].norms["to_out.0"] == pytest.approx(2 * math.sqrt(20))
    assert blocks["all", "both"].norms["all"] == pytest.approx(math.sqrt(100 + 80))
    assert blocks["all", "both"].layers == 2


def test_a_person_and_a_program_read_the_same(tmp_path):
    """The tables name what the JSON holds; JSON has only plain values."""
    tensors = lora_of(f"{SELF}.to_q", [[3.0, 4.0]], [[1.0]])
    found = inspect_adapter(write(tmp_path / "a", ALPHAS, LoraHeader(rank=1, alpha=1), tensors))
    answer = json.loads(json.dumps(found.as_json()))
    assert answer["header"]["base_model"] == "some/model"
    assert answer["files"] == {f.name: f.stat().st_size for f in (tmp_path / "a").iterdir()}
    assert answer["heads"][0]["weight"] == 4.0 and answer["simplex"]["outside"] == 3
    text = printed(found)
    for part in ("some/model", "sks", "ball", "22 numbers in 3 layers of 2 or 3 heads", "rank 1, alpha 1"):
        assert part in text
    assert "3 of 8 heads (38%) leave the convex hull" in text
    assert f"{MIDDLE} " in text and "head 1 x +4.000" in text
    assert "to_out.0" in text
    taught = found.header.model_copy(update={"vectors": 2, "kind": "coeff+lora+token"})
    said = printed(dataclasses.replace(found, header=taught))
    assert "learned token sks: 2 vectors each in text_encoder and text_encoder_2" in said


def test_text_out_of_a_file_is_no_markup(tmp_path):
    """A layer that is named like rich's markup is printed as it is."""
    name = "[red]layer[/red].attn1"
    found = inspect_adapter(write(tmp_path / "a", {name: torch.ones(2, 2)}))
    assert block_and_attention(name) == ("other", "self")
    assert name in printed(found)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: tensors.pop(f"unet.{SELF}.to_q.lora.up.weight"),
        lambda tensors: tensors.update({f"unet.{SELF}.to_q.lora.up.weight": torch.ones(4, 3)}),
        lambda tensors: tensors.update({"unet.something.weight": torch.ones(2)}),
        lambda tensors: tensors.update({f"unet.{SELF}.to_q.lora.up.weight": torch.ones(2)}),
    ],
    ids=["one of two", "ranks differ", "foreign", "no matrix"],
)
def test_a_lora_that_does_not_fit_is_one_sentence(tmp_path, spoil):
    tensors = lora_of(f"{SELF}.to_q", [[3.0, 4.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]])
    spoil(tensors)
    folder = write(tmp_path / "a", {}, LoraHeader(rank=2, alpha=4), tensors)
    with pytest.raises(AdapterError, match="is not a LoRA of this layout"):
        inspect_adapter(folder)


def test_a_heat_map_shows_every_entry_in_its_place():
    """Two layers of one row: an entry of +1 is red, -1 blue, 0 white, at (head that receives, map that is used)."""
    deviations = {SELF: np.zeros((2, 2)), CROSS: np.zeros((2, 2))}
    deviations[SELF][0, 1], deviations[CROSS][1, 0] = 1.0, -1.0
    sheet = np.asarray(draw_heat_maps(deviations, "alpha")).astype(int)
    left, right, top, cell = 200, 200 + 142 + 40, 120, 60

    def colour(start, row, column):
        return sheet[top + row * cell + cell // 2, start + column * cell + cell // 2]

    red, blue = colour(left, 0, 1), colour(right, 1, 0)
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 50
    for start, row, column in (
        (left, 0, 0),
        (left, 1, 0),
        (left, 1, 1),
        (right, 0, 0),
        (right, 0, 1),
        (right, 1, 1),
    ):
        assert colour(start, row, column).min() > 240


def test_blocks_are_in_the_order_that_a_picture_passes_them():
    """Transformer blocks side by side; names that are not SDXL's have a place as well, and no end of layers is drawn."""
    places = _places([MIDDLE, CROSS, "strange", f"{'x' * 70}.transformer_blocks.0.attn1"])
    assert places[MIDDLE] == ("mid_block.attentions.0", 0, 1)
    assert places[CROSS] == ("down_blocks.1.attentions.0", 1, 0)
    assert places["strange"] == ("other 1", 0, 0)
    assert draw_heat_maps({"strange": np.ones((2, 2))}, "a $token$ 猫").width > 0
    with pytest.raises(AdapterError, match="too large for one picture"):
        draw_heat_maps({str(i): np.zeros((1, 1)) for i in range(1001)}, "")


def test_text_encoders_are_blocks_of_their_own(tmp_path):
    """Behind the UNet's blocks, their projections beside the UNet's; ten maps in a row of the heat map."""
    layer = "text_encoder_2.text_model.encoder.layers.11.self_attn"
    assert block_and_attention(layer) == ("text_encoder_2", "self")
    lora = LoraHeader(rank=1, alpha=1, encoders=("text_encoder_2",))
    stem = f"{layer}.v_proj.lora_linear_layer"
    tensors = lora_of(SELF + ".to_v", [[3.0, 4.0]], [[1.0], [0.0]])
    tensors |= {f"{stem}.down.weight": torch.tensor([[0.0, 2.0]]), f"{stem}.up.weight": torch.ones(1, 1)}
    alphas = {SELF: ALPHAS[SELF], layer: torch.eye(2) / 2}
    found = inspect_adapter(write(tmp_path / "a", alphas, lora, tensors, format_version=4))
    assert [(b.block, b.layers) for b in found.alpha_blocks] == [
        ("down_blocks.1", 1),
        ("text_encoder_2", 1),
        ("all", 2),
    ]
    assert [(b.block, b.norms["to_v"]) for b in found.lora_blocks[:2]] == [
        ("down_blocks.1", 5),
        ("text_encoder_2", 2),
    ]
    assert found.header.described == "coeff+lora, text encoders too"
    assert _places([layer, SELF])[layer] == ("text_encoder_2 10", 0, 1)
    assert draw_heat_maps({name: alpha.numpy() for name, alpha in alphas.items()}, "a").width >= 720
