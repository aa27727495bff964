"""Draw the workflow that ships with the node as ComfyUI shows it, and the node's icon.

python scripts/comfyui/draw_graph.py     # writes workflow.png and icon.png beside the node
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

NODE = Path(__file__).resolve().parents[2] / "coeffdiff" / "hosts" / "comfyui"
COLOURS = {
    "MODEL": "#b39ddb", "CLIP": "#ffd500", "VAE": "#ff6e6e", "CONDITIONING": "#ffa931", "LATENT": "#ff9cf9",
    "IMAGE": "#64b5f6",
}  # fmt: skip
TITLES = {"LoadCoeffdiffAdapter": "Load coeffdiff adapter", "CheckpointLoaderSimple": "Load Checkpoint",
          "CLIPTextEncode": "CLIP Text Encode (Prompt)", "EmptyLatentImage": "Empty Latent Image",
          "VAEDecode": "VAE Decode", "SaveImage": "Save Image"}  # fmt: skip
WIDGETS = {
    "CheckpointLoaderSimple": ["ckpt_name"], "CLIPTextEncode": [""], "SaveImage": ["filename_prefix"],
    "LoadCoeffdiffAdapter": ["adapter", "strength", "strength_alpha", "strength_lora", "path"],
    "EmptyLatentImage": ["width", "height", "batch_size"],
    "KSampler": ["seed", "control", "steps", "cfg", "sampler_name", "scheduler", "denoise"],
}  # fmt: skip
ROW, TOP, MARGIN = 22, 30, 20


def main() -> None:
    graph = json.loads((NODE / "example_workflows" / "load_adapter.json").read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    width = max(n["pos"][0] + n["size"][0] for n in nodes.values()) + MARGIN
    height = max(n["pos"][1] + n["size"][1] for n in nodes.values()) + MARGIN
    picture = Image.new("RGB", (width, height), "#202020")
    draw = ImageDraw.Draw(picture)
    for _, source, slot, target, into, kind in graph["links"]:
        _wire(draw, _output(nodes[source], slot), _input(nodes[target], into), COLOURS[kind])
    for node in nodes.values():
        _box(draw, node)
    for node in nodes.values():
        _slots(draw, node)
    picture.quantize(64).save(NODE / "workflow.png", optimize=True)
    _icon().save(NODE / "icon.png", optimize=True)


def _input(node: dict[str, Any], slot: int) -> tuple[int, int]:
    return node["pos"][0], node["pos"][1] + TOP + ROW * slot + ROW // 2


def _output(node: dict[str, Any], slot: int) -> tuple[int, int]:
    x, y = _input(node, slot)
    return x + node["size"][0], y


def _box(draw: ImageDraw.ImageDraw, node: dict[str, Any]) -> None:
    (x, y), (width, height) = node["pos"], node["size"]
    ours = node["type"] == "LoadCoeffdiffAdapter"
    draw.rounded_rectangle((x, y, x + width, y + height), 8, "#353535", "#7fd1ae" if ours else "#555555", 2)
    draw.text((x + 12, y + 7), TITLES.get(node["type"], node["type"]), "white", _font(14))
    rows = max(len(node["inputs"]), len(node["outputs"]))
    for i, (name, value) in enumerate(
        zip(WIDGETS.get(node["type"], []), node["widgets_values"], strict=False)
    ):
        at = y + TOP + ROW * (rows + i)
        draw.rounded_rectangle((x + 10, at, x + width - 10, at + ROW - 4), 6, "#222222")
        draw.text((x + 16, at + 2), f"{name}   {value}".strip(), "#cccccc", _font(12))


def _slots(draw: ImageDraw.ImageDraw, node: dict[str, Any]) -> None:
    for i, slot in enumerate(node["inputs"]):
        x, y = _input(node, i)
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), COLOURS[slot["type"]])
        draw.text((x + 12, y - 8), slot["name"], "#bbbbbb", _font(12))
    for i, slot in enumerate(node["outputs"]):
        x, y = _output(node, i)
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), COLOURS[slot["type"]])
        draw.text((x - 12, y - 8), slot["name"], "#bbbbbb", _font(12), anchor="ra")


def _wire(draw: ImageDraw.ImageDraw, start: tuple[int, int], end: tuple[int, int], colour: str) -> None:
    """A cubic curve that leaves and arrives level."""
    reach = max(40, abs(end[0] - start[0]) // 2)
    points = (start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end)
    line = []
    for step in range(41):
        t = step / 40
        parts = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
        line.append(tuple(sum(w * p[axis] for w, p in zip(parts, points, strict=True)) for axis in (0, 1)))
    draw.line(line, colour, 3, joint="curve")


def _icon() -> Image.Image:
    """A matrix of heads: the diagonal of ordinary attention, and what alpha adds beside it."""
    side, cell = 256, 48
    picture = Image.new("RGB", (side, side), "#202020")
    draw = ImageDraw.Draw(picture)
    beside = {(0, 2): "#7fd1ae", (1, 3): "#e07a5f", (2, 0): "#e07a5f", (3, 1): "#7fd1ae", (1, 2): "#4a7a68"}
    for row in range(4):
        for column in range(4):
            x, y = 20 + column * (cell + 8), 20 + row * (cell + 8)
            colour = "#f2f2f2" if row == column else beside.get((row, column), "#3a3a3a")
            draw.rounded_rectangle((x, y, x + cell, y + cell), 8, colour)
    return picture.quantize(16)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


if __name__ == "__main__":
    main()
