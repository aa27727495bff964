"""The group of commands; a user's mistake becomes one sentence on stderr and an exit code."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from coeffdiff import __version__
from coeffdiff.errors import CachedAdapter, CoeffDiffError, KernelsUnused
from coeffdiff.utils.console import (
    be_lenient,
    hush_bitsandbytes,
    hush_torchao,
    is_main_process,
    print_error,
    print_info,
    print_text,
    visible,
)
from coeffdiff.utils.sentences import sentence_of
from coeffdiff.utils.threads import choose_waiting


class _Commands(TyperGroup):
    """A group whose usage errors are safe to print: they quote arguments, such as other people's file names."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _harmless_usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _harmless_usage_errors():
            return super().invoke(ctx)


@contextmanager
def _harmless_usage_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(getattr(error, "message", None), str):
            error.message = visible(error.message)  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Teach SDXL or Stable Diffusion 1.5 a subject from a few photos by recombining its attention maps across "
    "heads (Coeff-Tuning).",
)


def main() -> None:
    """Entry point of the console script and of `python -m coeffdiff`."""
    hush_bitsandbytes()
    hush_torchao()
    be_lenient()
    if "WORLD_SIZE" in os.environ:  # torch's C++ would print its stack beside our one sentence
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    for library in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(library, "error")
    if not sys.warnoptions:
        # Users see this package's warnings, not the deprecations of libraries
        warnings.simplefilter("ignore")
        for category in (KernelsUnused, CachedAdapter):
            warnings.filterwarnings("default", category=category)
        warnings.showwarning = lambda message, *_, **__: print_info(f"warning  {message}")
    app()


def answering(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a user's mistakes into one sentence on stderr and an exit code; defects keep their traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        choose_waiting()  # no command loads torch before it runs
        try:
            command(*args, **kwargs)
        except CoeffDiffError as error:
            complain(f"{type(error).__name__}: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print_info("Interrupted: stopped at once; what had been saved before is untouched.")
            raise typer.Exit(130) from None
        except Exception as error:
            sentence = sentence_of(error)
            if sentence is None:
                raise
            complain(sentence)
            raise typer.Exit(2) from None

    return run


def complain(sentence: str) -> None:
    """Print an error from any process: photos may be missing on the second machine alone."""
    print_error(sentence if is_main_process() else f"[rank {os.environ['RANK']}] {sentence}")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print_text(f"coeffdiff {__version__}")
        raise typer.Exit
