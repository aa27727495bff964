"""Models of transformers that label photos: found, checked for their kind, loaded whole."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from coeffdiff.errors import ConfigError, ModelError
from coeffdiff.models.finding import encoder_folder
from coeffdiff.models.hub_errors import loading_errors
from coeffdiff.utils.console import quiet_libraries
from coeffdiff.utils.hub import first_sentence
from coeffdiff.utils.oom import is_out_of_memory
from coeffdiff.utils.own_memory import own_memory

# The longer side that a network sees, in pixels: more than any of them keeps, little enough for label maps of many
# classes. A photo of 12 megapixels in 150 classes would take 7 GB.
MOST_PIXELS = 1024


@dataclass(frozen=True)
class Found:
    """A model that was found and is of the wanted kind; its weights are not read yet.

    kind: transformers' model_type.
    """

    name: str
    folder: Path
    kind: str


def find_network(name: str, kinds: Collection[str], wanted: str, usual: str) -> Found:
    """A model by hub id or folder, which is downloaded first if necessary.

    Args:
        kinds: the model_types that will do.
        wanted, usual: what such a model is called, and the name of one, for errors.
    Raises: ModelError if there is none, it is of another kind, or it is not available offline.
    """
    folder = encoder_folder(name)
    needed = f"{wanted} of transformers is needed, such as {usual}"
    try:
        with quiet_libraries(), loading_errors(f"The model {name}"):
            from transformers import AutoConfig

            kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
    except ModelError as error:  # no model at all, or one with code of its own, which is not run
        raise ModelError(f"{str(error).rstrip('.')}; {needed}.") from error
    if kind not in kinds:
        raise ModelError(f"{name} is a {kind}, and {needed}.")
    return Found(name, folder, kind)


def load_network(found: Found, auto: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The network on its device, frozen. auto: one of transformers' AutoModel classes.

    Raises: ModelError for damaged files, and for weights that are not those of such a network.
    """
    with quiet_libraries(), what_is_lacking(found.name):
        network, report = auto.from_pretrained(
            found.folder, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    if lacking := sorted(report["missing_keys"]):  # transformers fills them with noise
        raise ModelError(
            f"The model {found.name} cannot be loaded: its weights lack {lacking[0]} and {len(lacking) - 1} others of "
            f"a {type(network).__name__}."
        )
    return own_memory(network).requires_grad_(False).eval().to(device)


@contextmanager
def what_is_lacking(name: str) -> Iterator[None]:
    """One sentence for any error of loading; a library that is not installed is named. Raises: ModelError."""
    try:
        with loading_errors(f"The model {name}"):
            yield
    except ModelError as error:
        cause = error.__cause__
        if not isinstance(cause, ImportError):
            raise
        library = re.search(r"requires the (\w+) library|No module named '(\w+)'", str(cause))
        how = f" (`pip install {(library[1] or library[2]).lower()}`)" if library else ""
        raise ModelError(
            f"The model {name} needs a library that is not installed{how}: {first_sentence(cause)}."
        ) from cause


@contextmanager
def running_errors(name: str, advice: str) -> Iterator[None]:
    """One sentence for any error of a network at work, but for a lack of memory. Raises: ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # dozens of architectures are run here, each with errors of its own
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{name} cannot be used on photos: {first_sentence(error)}. {advice}") from error


def shrunk(picture: Image.Image) -> Image.Image:
    """The picture, its longer side at most MOST_PIXELS."""
    small = picture.copy()
    small.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return small


def named_device(name: str | None) -> torch.device | None:
    """cpu, cuda, cuda:1 or mps; None stays None. Raises: ConfigError for one that is not there."""
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError, by device
        raise ConfigError(
            f"--device {name} cannot be used here ({first_sentence(error)}); leave it out, or name cpu, cuda, cuda:1 "
            "or mps."
        ) from None
    if device.type == "meta":
        raise ConfigError(
            f"--device {name} computes nothing; leave it out, or name cpu, cuda, cuda:1 or mps."
        )
    return device
