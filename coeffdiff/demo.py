"""demo(): photos of a made-up subject -> adapter -> one labelled figure, by the code that teaches SDXL."""

from __future__ import annotations

import datetime
import difflib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from coeffdiff import __version__
from coeffdiff.config.loading import load_settings
from coeffdiff.config.schema import Settings
from coeffdiff.errors import ConfigError, LaunchError
from coeffdiff.hosts.diffusers import load_adapter
from coeffdiff.method.adapter_file import read_coefficients, read_lora, read_rows
from coeffdiff.models.architecture import unet_parameters
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.loading import load_pipeline
from coeffdiff.models.source import Backbone
from coeffdiff.pocket import POCKET
from coeffdiff.pocket.world import article
from coeffdiff.pocket.world.subjects import (
    DEV,
    EVAL,
    PHOTO_SETTINGS,
    Subject,
    photo_scenes,
    write_photos,
)
from coeffdiff.sampling.device import choose_device, prepare_device
from coeffdiff.sampling.generation import generate
from coeffdiff.sampling.options import Options, Request
from coeffdiff.sampling.output import recipe
from coeffdiff.training import loop
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.console import duration, print_info, progress
from coeffdiff.utils.figures import Band, figure
from coeffdiff.utils.launch_environment import read_launch
from coeffdiff.utils.output_folder import hold, is_free, refuse_occupied, refuse_unwritable, write_errors
from coeffdiff.utils.png import save_png

FOLDER = Path("demo")  # or demo-2, demo-3, ... where there is one already
TOKEN = "sks"
PLACES = 6
STEPS = 200
GUIDANCE = 3.0  # nearer to a learned subject, and cleaner, than pocket's pictures at sampling's own 5


@dataclass(frozen=True)
class Result:
    """Paths and figures of a demo. seconds: wall time of the whole demo; training_seconds: of its training."""

    folder: Path
    figure: Path
    photos: Path
    run: Path
    adapter: Path
    pictures: Path
    subject: str
    class_word: str
    method: str
    steps: int
    trained_numbers: int
    adapter_bytes: int
    training_seconds: float
    seconds: float


def demo(
    folder: Path | None = None,
    *,
    subject: str = DEV[0].name,
    method: str = "coeff+lora",
    steps: int = STEPS,
    seed: int = 0,
    denoising_steps: int = Options.steps,
) -> Result:
    """Teach the pocket model a subject that it does not know, and draw it in places that no photo shows.

    Args:
        folder: must be free; by default `demo`, or the next free `demo-N`.
        subject: a name of DEV.
        steps: of training.
        seed: of training and of the first picture, incremented per picture; the photos are always the same five.
        denoising_steps: of each picture.
    Raises: ConfigError for an unknown subject, an occupied folder or an invalid setting, and LaunchError for several
        processes, before anything is written; Interrupted after Ctrl-C in training; and what else train and generate
        raise.
    """
    begun = time.monotonic()
    individual = _subject_named(subject)
    folder, places, word = _free_folder(folder), new_places(individual), individual.class_word
    options = Options(steps=denoising_steps, guidance=GUIDANCE, batch_size=PLACES)
    refuse_unwritable(folder)
    settings = _settings(individual, folder, method, steps, seed)
    base = find_backbone(settings.model)
    if read_launch().size > 1:
        raise LaunchError("The demo is the work of one process; start it without accelerate launch.")

    with hold(folder):
        refuse_occupied(folder)  # another demo may just have ended there
        print_info(f"demo     {folder}: {individual.name}, {article(word)} that the model does not know")
        _photograph(individual, folder / "photos")
        run = loop.train(settings)
        made = _draw_rows(base, run.adapter, word, places, folder / "pictures", seed, options)
        numbers, size = _adapter_size(run.adapter)
        result = Result(
            folder=folder,
            figure=folder / "demo.png",
            photos=folder / "photos",
            run=run.run,
            adapter=run.adapter,
            pictures=folder / "pictures",
            subject=individual.name,
            class_word=word,
            method=method,
            steps=run.steps,
            trained_numbers=numbers,
            adapter_bytes=size,
            training_seconds=run.seconds,
            seconds=time.monotonic() - begun,
        )
        save_png(_sheet(result, made, places, seed, choose_device()[0], unet_parameters(base)), result.figure)
    return result


def _settings(subject: Subject, folder: Path, method: str, steps: int, seed: int) -> Settings:
    """An ordinary run's. Raises: ConfigError for a value that is not allowed."""
    values: dict[str, Any] = {
        "model.name": POCKET,
        "subject.images": str(folder / "photos"),
        "subject.token": TOKEN,
        "subject.class_word": subject.class_word,
        "method.kind": method,
        "training.steps": steps,
        "training.seed": seed,
        "validation.prompts": [],  # the demo draws its own pictures, beside those of the base model
        "output": str(folder / "run"),
    }
    return load_settings(None, values)


def _draw_rows(
    base: Backbone,
    adapter: Path,
    word: str,
    places: Sequence[str],
    folder: Path,
    seed: int,
    options: Options,
) -> dict[str, list[Image.Image]]:
    """A picture of each place from the same noise, by the base model ("base") and with the adapter ("adapter")."""
    device, dtype = choose_device()
    pipe = load_pipeline(base, dtype=dtype)
    prepare_device(pipe, device)
    made: dict[str, list[Image.Image]] = {}
    with progress("sampling", 2 * PLACES) as bar:
        prompts = {place: f"a photo of {article(word)} {place}" for place in places}
        made["base"] = _pictures(pipe, prompts, seed, options, folder / "base", bar)
        load_adapter(pipe, adapter)
        prepare_device(pipe, device)  # the adapter is still on the CPU
        prompts = {place: f"a photo of {TOKEN} {word} {place}" for place in places}
        made["adapter"] = _pictures(
            pipe, prompts, seed, options, folder / "adapter", lambda done: bar(PLACES + done)
        )
    return made


def _sheet(
    result: Result,
    made: Mapping[str, list[Image.Image]],
    places: Sequence[str],
    seed: int,
    device: torch.device,
    unet: int,
) -> Image.Image:
    """The photos above the base model's pictures above the adapter's. unet: how many parameters the UNet has."""
    word, threads = result.class_word, torch.get_num_threads()
    where = f"a {device.type} GPU" if device.type != "cpu" else f"{threads} CPU thread{'s' * (threads > 1)}"
    known, learned = f"a photo of {article(word)} {places[0]}", f"a photo of {TOKEN} {word} {places[0]}"
    return figure(
        [
            Band("Photos", _opened(result.photos), "all that training sees"),
            Band("Base model", made["base"], f'"{known}", ...', places),
            Band("With the adapter", made["adapter"], f'"{learned}", ... from the same noise'),
        ],
        title=f"{article(word).capitalize()}, learned from five photos, in places that none of them shows",
        facts=f"{result.method}: {result.trained_numbers:,} numbers, trained for {result.steps} steps in "
        f"{duration(result.training_seconds)} on {where}; an adapter of {readable_size(result.adapter_bytes)}\n"
        f"Base model: {POCKET}, SDXL's architecture with {unet:,} numbers in its UNet",
        footer=f"coeffdiff demo --subject {result.subject} --method {result.method} --steps {result.steps} "
        f"--seed {seed} (guidance {GUIDANCE:g})\n"
        f"coeffdiff {__version__}, torch {torch.__version__}, {datetime.date.today().isoformat()}",
    )


def new_places(subject: Subject, count: int = PLACES) -> tuple[str, ...]:
    """Places that the subject's photos do not show, of those in which it is clearly visible."""
    shown = {scene.setting for scene in photo_scenes(subject)}
    return tuple(setting for setting in PHOTO_SETTINGS if setting not in shown)[:count]


def readable_size(size: int) -> str:
    """274000 -> '274 KB'."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{max(1, round(size / 1e3))} KB"


def _subject_named(name: str) -> Subject:
    """Raises: ConfigError for an unknown subject, or one that is held back."""
    known = {subject.name: subject for subject in DEV}
    if name in known:
        return known[name]
    names = ", ".join(known)
    if any(name == subject.name for subject in EVAL):
        raise ConfigError(
            f"{name} is held back: the comparison of methods needs subjects that nothing else has trained on. "
            f"The demo has {names}."
        )
    near = difflib.get_close_matches(name, known, 1)
    raise ConfigError(
        f"There is no subject {name!r}.{f' Did you mean {near[0]}?' if near else ''} The demo has {names}."
    )


def _free_folder(folder: Path | None) -> Path:
    """The folder, or the next free name. Raises: ConfigError if the named one holds something."""
    if folder is None:
        names = (FOLDER if n == 1 else FOLDER.with_name(f"{FOLDER.name}-{n}") for n in itertools.count(1))
        return next(path for path in names if is_free(path))
    refuse_occupied(folder)
    return folder


def _photograph(subject: Subject, folder: Path) -> None:
    """All photos or none. Raises: ConfigError if they cannot be written."""
    with write_errors(f"The photos {folder}"), atomic_write(folder) as unfinished:
        write_photos(subject, unfinished)


def _pictures(
    pipe: Any,
    prompts: Mapping[str, str],
    seed: int,
    options: Options,
    folder: Path,
    on_progress: Callable[[float], None],
) -> list[Image.Image]:
    """A picture for each place's prompt, with incremented seeds, written with its recipe as `sample` does."""
    requests = [Request(prompt, seed + i) for i, prompt in enumerate(prompts.values())]
    images = []
    made = generate(pipe, requests, options, on_progress=on_progress)
    for number, (place, (request, image)) in enumerate(zip(prompts, made, strict=True), 1):
        file = folder / f"{number}-{place.replace(' ', '-')}.png"
        save_png(image, file, recipe(pipe, request, options, {"model": POCKET}))
        images.append(image)
    return images


def _opened(folder: Path) -> list[Image.Image]:
    return [Image.open(file) for file in sorted(folder.glob("*.jpg"))]


def _adapter_size(adapter: Path) -> tuple[int, int]:
    """How many numbers an adapter holds, and how many bytes its folder takes."""
    header, alphas = read_coefficients(adapter)
    tensors = [*alphas.values(), *read_lora(adapter, header).values(), *read_rows(adapter, header).values()]
    return sum(t.numel() for t in tensors), sum(file.stat().st_size for file in adapter.iterdir())
