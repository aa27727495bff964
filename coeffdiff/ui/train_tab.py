"""The tab of a training: start, stop, resume, and watch it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from coeffdiff.errors import ConfigError
from coeffdiff.training.run_folder import RunFolder
from coeffdiff.ui import markup
from coeffdiff.ui.events import speaking
from coeffdiff.ui.photos_tab import form_of
from coeffdiff.ui.run_state import (
    RunState,
    find_runs,
    has_begun,
    printed,
    read_state,
    stopping_sentence,
    validation_pictures,
)
from coeffdiff.ui.training_process import last_training, resume_training, start_training

_EVERY = 2.0  # seconds between looks


def train_tab(page: gr.Blocks, tab: gr.Tab, fields: list[Any]) -> None:
    with gr.Row(equal_height=True):
        start = gr.Button("Start", variant="primary", elem_id="start")
        stop = gr.Button("Stop and save", variant="stop", interactive=False, elem_id="stop")
        resume = gr.Button("Resume", interactive=False, elem_id="resume")
        run = gr.Dropdown([], label="Run", elem_id="run", scale=2, container=False)
    status = gr.HTML(markup.status(None), elem_id="status")
    with gr.Row():
        with gr.Column(scale=5):
            curve = gr.HTML(elem_id="curve")
        with gr.Column(scale=6):
            gr.HTML(markup.quiet("Validation pictures, the newest first"))
            pictures = gr.Gallery(
                show_label=False, columns=4, height=480, object_fit="contain",
                elem_id="validation", interactive=False, buttons=["fullscreen"],
            )  # fmt: skip
    with gr.Accordion("What the training prints", open=False):
        text = gr.Textbox(show_label=False, lines=14, max_lines=14, elem_id="printed", container=False)
    gr.Markdown("A training goes on when this page is closed; open it again, and it is found.")

    seen = gr.State(())
    looks = {"fn": _look, "inputs": [run, seen], "show_progress": "hidden", "api_visibility": "private"}
    looks |= {
        "outputs": [status, curve, pictures, text, start, stop, resume, seen],
        "concurrency_limit": None,
    }
    gr.Timer(_EVERY).tick(**looks)
    run.change(**looks)
    hidden: dict[str, Any] = {"api_visibility": "private"}
    start.click(_start, fields, run, **hidden).success(**looks)
    resume.click(_resume, run, run, **hidden).success(**looks)
    stop.click(_stop, None, None, **hidden).success(**looks)
    for event in (page.load, tab.select):
        event(_choices, run, run, show_progress="hidden", **hidden).then(**looks)


@speaking
def _start(*values: Any) -> Any:
    return _selected(start_training(form_of(*values)).run)


@speaking
def _resume(run: str | None) -> Any:
    if not run:
        raise ConfigError("There is no run to resume.")
    return _selected(resume_training(Path(run)).run)


@speaking
def _stop() -> None:
    training = last_training()
    if not (training and training.running):
        raise ConfigError("No training runs.")
    if training.stopping:
        gr.Info(f"The training is stopping already. {stopping_sentence(has_begun(training))}")
        return
    begun = has_begun(training)
    training.stop()
    gr.Info(stopping_sentence(begun))


def _choices(run: str | None) -> Any:
    """The runs there are; the one that trains is chosen, or what was chosen before, or the newest."""
    training = last_training()
    runs = [str(path) for path in find_runs()]
    kept = run if run in runs else next(iter(runs), None)
    return gr.Dropdown(_named(runs), value=training.run if training and training.running else kept)


def _selected(run: str) -> Any:
    return gr.Dropdown(_named([*dict.fromkeys([run, *map(str, find_runs())])]), value=run)


def _named(runs: list[str]) -> list[tuple[str, str]]:
    return [(Path(run).name, run) for run in runs]


def _look(run: str | None, seen: tuple[Any, ...]) -> list[Any]:
    """What to show of a run now; curve and pictures alone where they are others than were seen."""
    training = last_training()
    busy = training is not None and training.running
    state = read_state(Path(run)) if run else None
    shown = validation_pictures(Path(run)) if run else []
    now = (run, state.step if state else 0, tuple(shown))
    changed_curve, changed_pictures = now[:2] != tuple(seen[:2]), (now[0], now[2]) != (*seen[:1], *seen[2:])
    return [
        markup.status(state),
        _curve(run) if changed_curve else gr.skip(),
        gr.Gallery(shown) if changed_pictures else gr.skip(),
        printed(Path(run)) if run else "",
        gr.Button(interactive=not busy),
        gr.Button(interactive=_stoppable(state)),
        gr.Button(interactive=bool(state and state.resumable and not busy)),
        now,
    ]


def _curve(run: str | None) -> str:
    return markup.curve(RunFolder(Path(run)).log) if run else ""


def _stoppable(state: RunState | None) -> bool:
    return bool(state and state.running and not state.stopping)
