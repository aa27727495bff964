"""What of an adapter goes to the Hub: its own files, a card and the pictures of the card, and nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coeffdiff.errors import AdapterError, ConfigError
from coeffdiff.method.adapter_file import files_of, read_coefficients, read_lora, read_rows
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.method.adapter_paths import find_adapter, run_of
from coeffdiff.training.card import model_card, subject_of
from coeffdiff.training.hub_card import hub_card
from coeffdiff.training.run_folder import RunFolder
from coeffdiff.utils.png import read_recipe

CARD = "README.md"
_GRID = "grid.png"  # shown on the page, but no picture of one prompt
_SHOWN = re.compile(r"!\[[^\n]*?\]\(([^()\s/\\]+\.(?:png|jpe?g|webp))\)")


@dataclass(frozen=True)
class Publication:
    """files: what goes up, by its name in the repository: a file, or the content of the card."""

    header: AdapterHeader
    files: Mapping[str, Path | bytes]

    @property
    def card(self) -> str:
        card = self.files[CARD]
        assert isinstance(card, bytes)
        return card.decode()

    def sizes(self) -> dict[str, int]:
        """Bytes by file."""
        return {
            name: len(what) if isinstance(what, bytes) else what.stat().st_size
            for name, what in self.files.items()
        }

    def paths_of_this_machine(self) -> list[str]:
        """Local paths that the header tells whoever reads it, and that mean nothing elsewhere."""
        base = self.header.base
        named = (self.header.base_model, base.vae if base else None, base.config if base else None)
        return [path for path in dict.fromkeys(named) if path and os.path.isabs(path)]  # noqa: PTH117


def publication(run: str | Path, repo: str, licence: str | None = None) -> Publication:
    """What a push of this run, adapter folder or step would upload.

    Raises: AdapterError for an adapter that is missing or damaged, or whose card cannot be read.
    """
    folder = find_adapter(run)
    header, _ = read_coefficients(folder)
    read_lora(folder, header)
    read_rows(folder, header)
    try:
        card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"{folder / CARD} cannot be read as UTF-8 text: {error}.") from None
    pictures = _pictures(folder, header, card or "")
    card = card or model_card(header, None, None, pictures)
    prompts = {name: _prompt_of(file, header) for name, file in pictures.items() if name != _GRID}
    files: dict[str, Path | bytes] = {name: folder / name for name in files_of(header)}
    content = hub_card(card, header, repo, prompts, licence)
    return Publication(header, {**files, **pictures, CARD: content.encode()})


def _pictures(folder: Path, header: AdapterHeader, card: str) -> dict[str, Path]:
    """Those that the card shows and that lie beside it; else those of the run's validation at this step."""
    shown = {name: folder / name for name in _SHOWN.findall(card) if (folder / name).is_file()}
    run = run_of(folder)
    if shown or run is None:
        return shown
    return {file.name: file for file in sorted(RunFolder(run).samples(header.trained_steps).glob("*.png"))}


def _prompt_of(picture: Path, header: AdapterHeader) -> str:
    """The prompt that made a picture, by its recipe; the subject's usual one for a picture without."""
    try:
        prompt = read_recipe(picture).get("prompt")
    except ConfigError:
        prompt = None
    return prompt if isinstance(prompt, str) and prompt else f"a photo of {subject_of(header)}"
