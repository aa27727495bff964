"""The tab of the pictures: an adapter, a scale, prompts; a grid, and the files to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, get_args

import gradio as gr

from coeffdiff.sampling.memory_options import Offload, Precision
from coeffdiff.sampling.sampler_names import SAMPLERS
from coeffdiff.ui import markup
from coeffdiff.ui.drawing import Wanted, draw_wanted, find_adapters
from coeffdiff.ui.events import shown, speaking

_COMPARED = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def sample_tab(page: gr.Blocks, tab: gr.Tab) -> None:
    with gr.Row():
        with gr.Column(scale=4):
            fields = _fields()
            button = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Column(scale=7):
            where = gr.HTML(
                markup.quiet("Pictures appear here. Each PNG carries its own recipe."), elem_id="where"
            )
            grid = gr.Image(
                show_label=False,
                type="filepath",
                interactive=False,
                visible=False,
                elem_id="grid",
                buttons=["fullscreen"],
            )
            files = gr.File(
                label="Download", file_count="multiple", interactive=False, visible=False, elem_id="pictures"
            )
    button.click(
        _draw,
        fields,
        [where, grid, files],
        concurrency_id="model",
        api_visibility="private",
        show_progress_on=where,
    )
    list_adapters(fields[0], (page.load, tab.select))


def list_adapters(adapter: Any, events: Iterable[Callable[..., Any]]) -> None:
    """At each event a dropdown gets the adapters there are, the newest chosen until the user chooses one."""
    chosen, quiet = gr.State(None), {"show_progress": "hidden", "api_visibility": "private"}
    adapter.input(lambda value: value, adapter, chosen, **quiet)
    for event in events:
        event(adapter_choices, chosen, adapter, **quiet)


def adapter_choices(chosen: str | None) -> Any:
    """The adapters there are, for a dropdown. chosen: by the user."""
    found = find_adapters()
    return gr.Dropdown(list(found.items()), value=chosen or next(iter(found.values()), None))


def _fields() -> list[Any]:
    adapter = gr.Dropdown(
        [],
        label="Adapter",
        info="Or a folder, or user/repo on the Hub",
        allow_custom_value=True,
        elem_id="adapter",
    )
    prompts = gr.Textbox(
        "a photo of <V>",
        label="Prompts",
        lines=3,
        info="One a line; <V> stands for the token",
        elem_id="prompts",
    )
    scale = gr.Slider(
        0,
        2,
        1,
        step=0.05,
        label="Scale",
        info="0 is the base model, 1 the adapter as trained",
        elem_id="scale",
    )
    compared = gr.CheckboxGroup(
        [(f"{one:g}", one) for one in _COMPARED], label="Compare scales in the grid",
        info="In place of the one above", elem_id="compared",
    )  # fmt: skip
    with gr.Row():
        count = gr.Number(2, label="Pictures a prompt", precision=0, minimum=1, maximum=64, elem_id="count")
        seed = gr.Number(0, label="First seed", precision=0, minimum=0, elem_id="seed")
        steps = gr.Number(30, label="Steps", precision=0, minimum=1, elem_id="denoising")
        guidance = gr.Number(5.0, label="Guidance", minimum=0)
    with gr.Accordion("More", open=False):
        negative = gr.Textbox("", label="Negative prompt")
        with gr.Row():
            width = gr.Number(0, label="Width", info="0: the model's own", precision=0, minimum=0)
            height = gr.Number(0, label="Height", info="0: the model's own", precision=0, minimum=0)
        names = [("The model's own", ""), *((sampler.label, sampler.label) for sampler in SAMPLERS)]
        scheduler = gr.Dropdown(names, value="", label="Sampler")
        with gr.Row():
            precision = gr.Dropdown(list(get_args(Precision)), value="auto", label="Precision")
            offload = gr.Dropdown(
                list(get_args(Offload)), value="none", label="Offload", info="Keep parts off a small GPU"
            )
    first = [adapter, prompts, scale, compared, count, seed, steps, guidance]
    return [*first, negative, width, height, scheduler, precision, offload]


@speaking
def _draw(*values: Any, bar: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008  # gradio's way
    with shown(bar):
        drawn = draw_wanted(Wanted(*values))
    *pictures, grid = map(str, drawn.files)
    said = f"{len(pictures)} picture{'s' * (len(pictures) != 1)} and their grid in {drawn.folder}"
    return [markup.quiet(said), gr.Image(grid, visible=True), gr.File([*pictures, grid], visible=True)]
