"""The tab of the photos: drop them, say what they show, see what a check finds."""

from __future__ import annotations

from typing import Any, get_args

import gradio as gr
from PIL import Image

from coeffdiff.config.fields import SDXL_BASE
from coeffdiff.config.schema import MethodSettings
from coeffdiff.data.photos import PhotoSet
from coeffdiff.method.families import SD15
from coeffdiff.preflight.report import Report
from coeffdiff.training.examining import examine
from coeffdiff.ui import markup
from coeffdiff.ui.events import shown, speaking
from coeffdiff.ui.form import Form
from coeffdiff.ui.model_memory import memory_given_back
from coeffdiff.ui.photo_store import ACCEPTED, store_photos
from coeffdiff.ui.presets import find_presets

MODELS = [
    ("The preset's, or SDXL base 1.0", ""),
    ("pocket (small, comes along, no GPU needed)", "pocket"),
    ("SDXL base 1.0", SDXL_BASE),
    ("Stable Diffusion 1.5", SD15.usual_base),
]
METHODS = get_args(MethodSettings.model_fields["kind"].annotation)
_SIDE = 512  # of the pictures on the page, in pixels


def photos_tab() -> list[Any]:
    """Returns: the components whose values form_of takes."""
    with gr.Row():
        with gr.Column(scale=5):
            fields = _fields()
            button = gr.Button("Check", variant="primary", elem_id="check")
        with gr.Column(scale=6):
            found = gr.HTML(
                markup.quiet("A check tells what it thinks of each photo, and the memory and time needed.")
            )
            pictures = gr.Gallery(
                show_label=False, columns=3, object_fit="contain",
                height=430, visible=False, elem_id="photos", buttons=[], interactive=False,
            )  # fmt: skip
    button.click(
        _check,
        fields,
        [found, pictures],
        concurrency_id="model",
        api_visibility="private",
        show_progress_on=found,
    )
    return fields


def form_of(files: list[str] | None, *values: Any) -> Form:
    """The photos stored where they stay, and the rest as it was typed. Raises: PhotoError."""
    token, *others = (value or "" for value in values)  # gradio has None for a field that was never opened
    return Form(str(store_photos(files or [], token)), token, *others)


def _fields() -> list[Any]:
    files = gr.File(
        label="Photos, with captions (.txt) and masks (.mask.png) if you have them", file_count="multiple",
        file_types=list(ACCEPTED), height=190, elem_id="drop",
    )  # fmt: skip
    with gr.Row():
        token = gr.Textbox(label="Token", info="A new word, such as ohwx", elem_id="token")
        class_word = gr.Textbox(label="Class word", info="Such as stuffed animal", elem_id="class-word")
    with gr.Column():
        model = gr.Dropdown(
            MODELS, value="", label="Model", info="Or a hub id, a folder, a .safetensors file",
            allow_custom_value=True, elem_id="model",
        )  # fmt: skip
        preset = gr.Dropdown(
            [("Automatic", ""), *find_presets().items()], value="", label="Preset",
            info="Or the path of a YAML file", allow_custom_value=True, elem_id="preset",
        )  # fmt: skip
    with gr.Accordion("More settings", open=False, elem_id="more"):
        with gr.Row():
            methods = [("Automatic", ""), *((name, name) for name in METHODS)]
            method = gr.Dropdown(methods, value="", label="Method", min_width=100, elem_id="method")
            steps = gr.Textbox(label="Steps", placeholder="automatic", min_width=90, elem_id="steps")
            resolution = gr.Textbox(label="Resolution", placeholder="automatic", min_width=90)
            seed = gr.Textbox(label="Seed", placeholder="0", min_width=60)
        more = gr.Textbox(
            label="Any other setting",
            info="One a line, as after --set: validation.every=50",
            lines=2,
            elem_id="settings",
        )
    return [files, token, class_word, model, preset, method, steps, resolution, seed, more]


@speaking
def _check(*values: Any, bar: gr.Progress = gr.Progress()) -> tuple[str, Any]:  # noqa: B008  # gradio's way
    with memory_given_back(), shown(bar):
        report, photos = examine(form_of(*values).settings())[:2]
    return markup.findings(report, photos), gr.Gallery(_thumbnails(report, photos), visible=True)


def _thumbnails(report: Report, photos: PhotoSet) -> list[tuple[Image.Image, str]]:
    pairs = []
    for photo, checked in zip(photos.photos, report.photos, strict=True):
        image = photo.open()
        image.thumbnail((_SIDE, _SIDE))
        pairs.append((image, checked.name))
    return pairs
