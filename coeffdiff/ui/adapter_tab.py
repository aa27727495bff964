"""The tab of an adapter: what it holds, and the ways to take it along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from coeffdiff.ui import markup
from coeffdiff.ui.adapter_files import Files, export_adapter, new_folder, table_of, zip_adapter
from coeffdiff.ui.events import speaking
from coeffdiff.ui.sample_tab import list_adapters


def adapter_tab(page: gr.Blocks, tab: gr.Tab, place: Path) -> None:
    """place: where files are made for the browser to take."""
    adapter = gr.Dropdown(
        [],
        label="Adapter",
        info="Or a folder, or user/repo on the Hub",
        allow_custom_value=True,
        elem_id="held",
    )
    with gr.Row():
        archive = gr.Button("Download as .zip", variant="primary", elem_id="zip")
        export = gr.Button("Export for A1111, Forge, InvokeAI, SD.Next", elem_id="export")
    notes = gr.HTML()
    files = gr.File(
        label="Download", file_count="multiple", interactive=False, visible=False, elem_id="files"
    )
    table = gr.HTML(markup.quiet("What the adapter holds is shown here."), elem_id="table")

    @speaking
    def packed(chosen: str | None) -> list[Any]:
        return _offered(zip_adapter(chosen or "", new_folder(place)))

    @speaking
    def exported(chosen: str | None) -> list[Any]:
        return _offered(export_adapter(chosen or "", new_folder(place)))

    archive.click(packed, adapter, [notes, files], api_visibility="private")
    export.click(exported, adapter, [notes, files], api_visibility="private")
    adapter.change(_inspect, adapter, table, api_visibility="private")
    list_adapters(adapter, (page.load, tab.select))


@speaking
def _inspect(adapter: str | None) -> str:
    return table_of(adapter) if adapter else markup.quiet("There is no adapter yet.")


def _offered(made: Files) -> list[Any]:
    return [markup.sentences(made.notes), gr.File([str(file) for file in made.files], visible=True)]
