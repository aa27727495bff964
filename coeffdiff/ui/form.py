"""What the page asks before a run, as the settings that the command line would make of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coeffdiff.config.loading import load_settings
from coeffdiff.config.schema import Settings
from coeffdiff.data.subjects import with_offered_words
from coeffdiff.errors import ConfigError
from coeffdiff.utils.paths import expanded

# A field of Form -> the option of `coeffdiff train`, and the setting that it stands for
OPTIONS = {
    "images": ("--images", "subject.images"),
    "token": ("--token", "subject.token"),
    "class_word": ("--class-word", "subject.class_word"),
    "model": ("--model", "model.name"),
    "method": ("--method", "method.kind"),
}
# Numbers are texts as after --set, where the settings themselves say what is wrong with one
NUMBERS = {"steps": "training.steps", "resolution": "training.resolution", "seed": "training.seed"}


@dataclass(frozen=True)
class Form:
    """The fields of the page. An empty text: not asked for, so the preset or the default holds.

    images: folder with the photos. preset: YAML file. more: lines of `a.b=c`, as after --set.
    """

    images: str
    token: str = ""
    class_word: str = ""
    model: str = ""
    preset: str = ""
    method: str = ""
    steps: str = ""
    resolution: str = ""
    seed: str = ""
    more: str = ""

    def settings(self) -> Settings:
        """Raises: ConfigError for what the settings refuse."""
        flags = {setting: value for _, setting, value in self._given()}
        return with_offered_words(load_settings(self._preset(), flags, self._assignments()))

    def arguments(self) -> list[str]:
        """The same as arguments of `coeffdiff train`."""
        given = [f"{option}={value}" for option, _, value in self._given()]
        preset = [f"--config={path}"] if (path := self._preset()) else []
        return [*given, *preset, *(f"--set={line}" for line in self._assignments())]

    def _preset(self) -> Path | None:
        try:
            return Path(expanded(self.preset)) if self.preset else None
        except ValueError as error:
            raise ConfigError(f"The preset {self.preset} cannot be read: {error}.") from None

    def _given(self) -> list[tuple[str, str, Any]]:
        values = [(*names, getattr(self, field)) for field, names in OPTIONS.items()]
        return [(option, setting, value) for option, setting, value in values if value]

    def _assignments(self) -> list[str]:
        numbers = [(setting, getattr(self, field).strip()) for field, setting in NUMBERS.items()]
        own = [f"{setting}={value}" for setting, value in numbers if value]
        return own + [line.strip() for line in self.more.splitlines() if line.strip()]
