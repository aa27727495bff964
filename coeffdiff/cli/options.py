"""Options that several commands share, and parsers of their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from coeffdiff.cli.root import complain
from coeffdiff.errors import CoeffDiffError, ConfigError
from coeffdiff.sampling.memory_options import Offload, Precision
from coeffdiff.utils.paths import expanded

Method = Literal["coeff", "lora", "coeff+lora", "token"]
QuantizedOrNot = Literal["none", "int8", "fp8", "nf4"]


def expanded_text(text: Any) -> str:
    """An option's value with its ~ expanded. Every option that may be a path uses PATH or NAME."""
    try:
        return str(expanded(text))
    except ValueError as error:
        complain(f"ConfigError: {str(text)!r}: {error}.")
        raise typer.Exit(2) from None


def parsed_by(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    """A parser for typer of which a ConfigError ends the command like any other: one sentence, exit code 2."""

    def parser(text: Any) -> Any:
        try:
            return parse(text) if isinstance(text, str) else text
        except CoeffDiffError as error:
            complain(f"{type(error).__name__}: {error}")
            raise typer.Exit(error.exit_code) from None

    return parser


def expanded_path(text: Any) -> Path:
    return Path(expanded_text(text))


PATH: dict[str, Any] = {"parser": expanded_path, "metavar": "PATH"}
NAME: dict[str, Any] = {"parser": expanded_text, "metavar": "NAME"}
Images = Annotated[Path | None, typer.Option(help="Folder with the photos.", **PATH)]
Token = Annotated[str | None, typer.Option(help="The word for the subject, such as ohwx.")]
ClassWord = Annotated[str | None, typer.Option(help='What the subject is, such as "stuffed animal".')]
Subjects = Annotated[
    Path | None,
    typer.Option(
        help="YAML list of several subjects, each with images, token and class_word; in place of these options.",
        **PATH,
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        help="Hub id, diffusers folder, .safetensors file, or pocket. (default: SDXL base 1.0)", **NAME
    ),
]
TrainedMethod = Annotated[
    Method | None, typer.Option(help="What is trained. (default: coeff+lora; for small models lora)")
]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML file with settings; flags override it.", **PATH)]
TrainingSteps = Annotated[int | None, typer.Option(help="Optimizer steps. (default: by model)")]
Pixels = Annotated[int | None, typer.Option(help="In pixels. (default: the model's own)")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Any setting; repeatable.")
]


def subject_flags(
    subjects: Path | None,
    images: Path | None,
    token: str | None,
    class_word: str | None,
    model: str | None,
    method: str | None,
    steps: int | None,
    resolution: int | None,
) -> dict[str, Any]:
    """The settings that train's and check's shared options stand for; None: not given.

    Raises: ConfigError for a file of subjects that cannot be read, or beside options that are each subject's own.
    """
    own = {
        "subject.images": str(images) if images else None,
        "subject.token": token,
        "subject.class_word": class_word,
    }
    if subjects:
        from coeffdiff.config.subjects_file import settings_of_subjects

        for option, value in zip(("--images", "--token", "--class-word"), own.values(), strict=True):
            if value is not None:
                raise ConfigError(f"{subjects} says it for each subject, so leave {option} out.")
        own |= settings_of_subjects(subjects)
    return own | {
        "model.name": model,
        "method.kind": method,
        "training.steps": steps,
        "training.resolution": resolution,
    }


ResultAsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
CompileUnet = Annotated[
    bool, typer.Option("--compile", help="torch.compile the UNet: slower to start, then faster.")
]
Count = Annotated[int, typer.Option("-n", min=1, help="Pictures for each prompt.")]
DenoisingSteps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
PrecisionOption = Annotated[Precision, typer.Option(help="auto: bf16 or fp16 on a GPU, fp32 elsewhere.")]
OffloadOption = Annotated[Offload, typer.Option(help="Keep parts of the model off the GPU.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures made at a time.")]
AdaptersModel = Annotated[str | None, typer.Option(help="Base model. (default: the adapter's)", **NAME)]
ModelConfig = Annotated[
    str | None,
    typer.Option(
        help="Where a single-file model takes its configs from: a diffusers folder. (default: the adapter's)",
        **NAME,
    ),
]
OtherVae = Annotated[
    str | None,
    typer.Option(
        help="Another VAE; none: the model's own. (default: what the adapter was trained with)", **NAME
    ),
]
Quantize = Annotated[
    QuantizedOrNot | None,
    typer.Option(
        help="Linear layers of UNet and text encoders in few bits. (default: as the adapter was trained)"
    ),
]
NumbersAsJson = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON on stdout.")]
