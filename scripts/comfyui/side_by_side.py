"""One adapter drawn by ComfyUI's server and by `coeffdiff sample`, and their difference, side by side.

COMFYUI=path/to/ComfyUI python scripts/comfyui/side_by_side.py     # writes side_by_side.png beside the node

The model is the narrow SDXL with random weights, so the pictures are noise; that they are the same noise is the point.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from coeffdiff.hosts.comfyui.install import install
from coeffdiff.utils.text_drawing import INK, font_for, wrap_text
from comfyui_host import comfyui_folder, put_on_path, version

TARGET = Path(__file__).resolve().parents[2] / "coeffdiff" / "hosts" / "comfyui" / "side_by_side.png"
PROMPT, STEPS, SIDE, GUIDANCE, SEED = "a photo of ohwx toy", 3, 256, 5.0, 0
AMPLIFIED = 100  # how much the difference is made brighter
STRIP = 64  # pixels of text below each picture


def main() -> int:
    comfyui = comfyui_folder()
    if comfyui is None:
        where = "scripts/test_comfyui.sh fetches one into .comfyui/ComfyUI"
        print(f"Set COMFYUI to ComfyUI's folder; {where}.", file=sys.stderr)
        return 2
    put_on_path(comfyui)
    with tempfile.TemporaryDirectory(prefix="comfyui-") as folder:
        base = Path(folder)
        adapter = _prepare(comfyui, base)
        theirs, plain = _by_server(comfyui, base)
        ours = _by_sample(base, adapter)
    difference = abs(theirs - ours)
    largest, moved = difference.max(), abs(theirs - plain).mean()
    print(f"difference: {largest} of 255 at most, {difference.mean():.2f} on average; adapter: {moved:.1f}")
    captions = (
        f"ComfyUI {version(comfyui)}, HTTP API",
        "coeffdiff sample",
        f"difference x {AMPLIFIED} (at most {largest} of 255: the two round differently)",
        f"ComfyUI without the adapter ({moved:.0f} of 255 away on average)",
    )
    _sheet([theirs, ours, (AMPLIFIED * difference).clip(0, 255), plain], captions).save(TARGET, optimize=True)
    return 0


def _prepare(comfyui: Path, base: Path) -> Path:
    """The models for both, the node, an adapter and the first latent. Returns: the adapter's folder."""
    from comfyui_server import make_base
    from comfyui_workflow import first_latent, make_pipeline, save_latent, save_models
    from narrow_sdxl import make_adapter

    make_base(base)
    install(base)
    pipe = make_pipeline(comfyui)
    save_models(pipe, base / "models")
    save_latent(first_latent(pipe, SEED, SIDE, STEPS), base / "input" / "start.latent")
    adapter = make_adapter(base / "models" / "coeffdiff" / "ohwx", pipe.unet)
    pipe.save_pretrained(base / "pipeline")
    return adapter


def _by_server(comfyui: Path, base: Path) -> tuple[np.ndarray, np.ndarray]:
    """[SIDE, SIDE, 3] with the adapter and without it."""
    from comfyui_server import serving
    from comfyui_workflow import output_file, workflow

    with serving(comfyui, base) as server:
        done = [
            server.run(workflow(PROMPT, steps=STEPS, guidance=GUIDANCE, adapter=name))
            for name in ("ohwx", None)
        ]
    first, second = (_pixels(output_file(base, one["outputs"]["image"]["images"][0])) for one in done)
    return first, second


def _by_sample(base: Path, adapter: Path) -> np.ndarray:
    command = [
        *(
            sys.executable,
            "-m",
            "coeffdiff",
            "sample",
            "--model",
            str(base / "pipeline"),
            "--adapter",
            str(adapter),
        ),
        *("--prompt", PROMPT, "--seed", str(SEED), "--steps", str(STEPS), "--guidance", str(GUIDANCE)),
        *(
            "--width",
            str(SIDE),
            "--height",
            str(SIDE),
            "--precision",
            "fp32",
            "--output",
            str(base / "sampled"),
        ),
    ]
    subprocess.run(command, check=True)
    pictures = [file for file in sorted((base / "sampled").glob("*.png")) if file.name != "grid.png"]
    return _pixels(pictures[0])


def _pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"), dtype=int)


def _sheet(pictures: list[np.ndarray], captions: tuple[str, ...]) -> Image.Image:
    """In a row, small: noise does not compress."""
    shown, gap = 144, 12
    sheet = Image.new("RGB", (len(pictures) * (shown + gap) + gap, shown + STRIP + gap), "white")
    draw, font = ImageDraw.Draw(sheet), font_for("".join(captions), 11)
    for i, (pixels, caption) in enumerate(zip(pictures, captions, strict=True)):
        x = gap + i * (shown + gap)
        sheet.paste(Image.fromarray(pixels.astype(np.uint8)).crop((0, 0, shown, shown)), (x, gap))
        draw.multiline_text((x, shown + gap + 6), "\n".join(wrap_text(caption, 11, shown, 3)), INK, font)
    return sheet.quantize(128)


if __name__ == "__main__":
    sys.exit(main())
