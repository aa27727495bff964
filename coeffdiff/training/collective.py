"""What the processes of a training run decide together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from coeffdiff.errors import CoeffDiffError, ResumeError


def on_main(state: PartialState, decide: Callable[[], Any], share: bool = True) -> Any:
    """What the main process decides, on all processes; its error is raised on all as well.

    share: False for what only the main process needs, and what cannot be sent; the others get None.
    """
    own: Any = None
    answer: list[Any] = [None]
    if state.is_main_process:
        try:
            own = decide()
            answer = [own if share else None]
        except CoeffDiffError as error:
            answer = [error]
    if state.num_processes > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], CoeffDiffError):
        raise answer[0]
    return answer[0] if share else own


def check_same_step(step: int, state: PartialState) -> None:
    """All machines must read the same checkpoint. Raises: ResumeError on all of them if one does not."""
    steps = gather_object([step]) if state.num_processes > 1 else [step]
    if len(set(steps)) > 1:
        raise ResumeError(
            f"The processes would continue after different steps ({steps}). Every machine needs the newest "
            "checkpoint: copy the run folder to all of them, or keep it on a shared disk."
        )
