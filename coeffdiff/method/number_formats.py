"""Names of the formats in which frozen weights may be held. Nothing heavy is loaded, as the settings name them too."""

from __future__ import annotations

from typing import Literal

Quantized = Literal["int8", "fp8", "nf4"]
