"""The page: its tabs and its look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from coeffdiff.ui.adapter_tab import adapter_tab
from coeffdiff.ui.markup import HEADER
from coeffdiff.ui.photos_tab import photos_tab
from coeffdiff.ui.sample_tab import sample_tab
from coeffdiff.ui.train_tab import train_tab

_DAY = 86_400  # seconds


def build_page(place: Path) -> gr.Blocks:
    """place: a folder of this process for files that the browser takes."""
    with gr.Blocks(title="coeffdiff", analytics_enabled=False, delete_cache=(3600, _DAY)) as page:
        gr.HTML(HEADER)
        with gr.Tabs():
            with gr.Tab("1  Photos"):
                fields = photos_tab()
            with gr.Tab("2  Training", elem_id="training") as training:
                train_tab(page, training, fields)
            with gr.Tab("3  Pictures") as pictures:
                sample_tab(page, pictures)
            with gr.Tab("4  Adapter") as adapter:
                adapter_tab(page, adapter, place)
    return page


def theme() -> Any:
    """The system's fonts; nothing is loaded from elsewhere."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Default(primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", **fonts)
