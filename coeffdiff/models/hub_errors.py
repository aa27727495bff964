"""Errors of loading a base model: those of libraries and of the hub, in one sentence each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from coeffdiff.config.fields import SDXL_BASE
from coeffdiff.errors import ModelError
from coeffdiff.utils.hub import first_sentence, hub_errors
from coeffdiff.utils.oom import is_out_of_memory


@contextlib.contextmanager
def loading_errors(what: str) -> Iterator[None]:
    """One sentence for any error of a library inside. what: the subject of the sentence. Raises: ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # there is no list of what three libraries may raise here
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{what} cannot be loaded: {first_sentence(error)}.") from error


@contextlib.contextmanager
def hub_access_errors(repo: str, files: Sequence[str] = ("*.json", "*.txt")) -> Iterator[None]:
    """One sentence for any error of access to a model's repository inside. Raises: ModelError.

    files: patterns of what is read beside weights in safetensors, for the command that downloads the model elsewhere.
    """
    from huggingface_hub import constants

    weights = "*.fp16.safetensors" if repo == SDXL_BASE else "*.safetensors"  # else all precisions: 40 GB
    included = " ".join(f"--include '{pattern}'" for pattern in (*files, weights))

    def unreachable(reason: str) -> str:
        return (
            f"{repo} is no folder here and not complete in the cache ({constants.HF_HUB_CACHE}), and {reason}. "
            f"On a machine with network run `hf download {repo} {included}` and copy its cache, or pass a folder "
            "instead."
        )

    absent = (
        f"There is no folder {repo} here and no public model {repo} on the hub; check the spelling, or log in "
        "with `hf auth login` if it is private."
    )
    with hub_errors(repo, ModelError, absent=absent, unreachable=unreachable):
        yield
