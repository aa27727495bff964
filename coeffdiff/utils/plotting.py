"""matplotlib without a display: figures that are drawn into files or arrays. It is loaded when it is needed."""

from __future__ import annotations

import logging
from typing import Any


def new_figure(**options: Any) -> Any:
    """A matplotlib Figure with a canvas of its own, apart from pyplot. options: Figure's arguments."""
    # Its font cache, built on the first import, is no news to the user
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure
