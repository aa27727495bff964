"""What a batch is asked for: its subjects, each with the settings of its run, and how they are scored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from coeffdiff.config.batch_file import TASKS, settings_of_batch
from coeffdiff.config.fields import PlaceOrName, Section
from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import with_values
from coeffdiff.data.subjects import with_offered_words
from coeffdiff.errors import ConfigError, PhotoError
from coeffdiff.evaluation.protocol import Protocol
from coeffdiff.sampling.options import Options
from coeffdiff.training.continuing import with_absolute_paths


class Scoring(Section):
    """How adapters are scored, as `evaluate` does."""

    prompts: PlaceOrName = Field("auto", description="as in evaluate")
    limit: int | None = Field(None, ge=1, description="at most so many prompts, spread over the list")
    pictures: int = Field(Protocol.pictures, ge=1, description="for each prompt")
    drift_pictures: int = Field(
        Protocol.drift_pictures, ge=0, description="for each prompt without the token; 0: no drift"
    )
    denoising_steps: int = Field(Options.steps, ge=1, description="of every picture")
    guidance: float = Field(Options.guidance, ge=0, description="classifier-free guidance of every picture")
    batch_size: int = Field(4, ge=1, description="pictures made at a time")
    dino: PlaceOrName | None = Field(None, description="as in evaluate")
    clip: PlaceOrName | None = Field(None, description="as in evaluate")


@dataclass(frozen=True)
class SubjectTask:
    """A subject's training. settings: with the run folder and absolute paths; scoring: None, it is not scored.

    log: of the task; who holds its lock trains the subject. entry: the file that says what became of it.
    """

    name: str
    settings: Settings
    scoring: Scoring | None
    log: Path
    entry: Path


@dataclass(frozen=True)
class BatchPlan:
    """All subjects of a batch, and the folder of their runs.

    OUTPUT/NAME/ is a subject's run, OUTPUT/tasks/NAME.log and NAME.json what became of its task.
    """

    output: Path
    settings: dict[str, Settings]
    scoring: Scoring | None

    def tasks(self, part: tuple[int, int] = (1, 1)) -> list[SubjectTask]:
        """part: (k, n): only every n-th subject, from the k-th on."""
        names = list(self.settings)[part[0] - 1 :: part[1]]
        return [
            SubjectTask(
                name,
                self.settings[name],
                self.scoring,
                log=self.outcome(name).with_suffix(".log"),
                entry=self.outcome(name),
            )
            for name in names
        ]

    def outcome(self, name: str) -> Path:
        return self.output / TASKS / f"{name}.json"


def plan_batch(file: Path, shared: Settings, output: Path, scoring: Scoring | None) -> BatchPlan:
    """Raises: ConfigError for anything in the file that is wrong, but nothing for the photos."""
    output = output.absolute()
    settings = {
        name: with_absolute_paths(with_values(_with_words(file, name, own), {"output": str(output / name)}))
        for name, own in settings_of_batch(file, shared).items()
    }
    return BatchPlan(output, settings, scoring)


def _with_words(file: Path, name: str, settings: Settings) -> Settings:
    if settings.subject.token is None:
        try:
            settings = with_offered_words(settings)
        except PhotoError:  # that of its task
            return settings
    if settings.subject.token is None:
        raise ConfigError(f"{file}: {name} has no token; give it one, or all of them one with --token.")
    return settings
