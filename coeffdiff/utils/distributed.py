"""The processes of one launch: collective calls; an error in one process ends all.

training/launch.py starts them and refuses launches that cannot work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from coeffdiff.errors import CoeffDiffError, LaunchError
from coeffdiff.utils.launch_environment import read_launch

T = TypeVar("T")


class DistributedContext:
    """This process and those that were launched with it.

    Every process must call gather and on_main equally often and in the same order. An error that one process raises
    inside `process_group` reaches the others at their next such call; they exit there and print nothing.

    Args:
        start: makes the process group and returns Accelerate's PartialState. Called at once where a launcher has
            started several processes, otherwise when the device is asked for, since it loads torch. None: one process
            that chooses its device itself.
    """

    def __init__(self, start: Callable[[], Any] | None = None) -> None:
        self._start, self._state = start, None
        self.rank, self.size = 0, 1
        self._broken = False
        if start and read_launch().size > 1:
            self._state = start()
            self.rank, self.size = self._state.process_index, self._state.num_processes

    @property
    def device(self) -> Any:
        """The torch.device of this process; None where nothing has assigned one."""
        if self._state is None and self._start is not None:
            self._state = self._start()
        return self._state.device if self._state is not None else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, item: T) -> list[T]:
        """Every process's item, by rank. Waits for all of them.

        Raises: SystemExit where another process has failed and reports it; LaunchError if one is gone.
        """
        entries = self._exchange((None, item))
        for exit_code, _ in entries:
            if exit_code is not None:
                raise SystemExit(exit_code)
        return [item for _, item in entries]

    def on_main(self, decide: Callable[[], T]) -> T:
        """The result of `decide`, which only the main process calls, on all processes."""
        decided: Any = decide() if self.is_main else None
        answer: T = self.gather(decided)[0]
        return answer

    def fail(self, error: Exception) -> None:
        """Tell the others about an error of this process.

        Raises: SystemExit if another process reports its own: the lowest rank that failed.
        """
        if self._broken:
            return
        try:
            entries = self._exchange((_exit_code(error), None))
        except LaunchError:
            return  # this process's own error says more
        speaker = next(rank for rank, (exit_code, _) in enumerate(entries) if exit_code is not None)
        if speaker != self.rank:
            raise SystemExit(_exit_code(error))

    def end(self) -> None:
        if self.size > 1:
            destroy_process_group()

    def _exchange(self, entry: tuple[int | None, Any]) -> list[tuple[int | None, Any]]:
        if self.size == 1:
            return [entry]
        from accelerate.utils import gather_object

        try:
            entries: list[tuple[int | None, Any]] = gather_object([entry])
        except RuntimeError:
            self._broken = True
            raise LaunchError(
                "Another process of this launch is gone (killed, or short of memory?), so this one ends as well. "
                "Pictures that are written are whole; start again for the others."
            ) from None
        return entries


ONE_PROCESS = DistributedContext()


@contextmanager
def process_group(start: Callable[[], Any]) -> Iterator[DistributedContext]:
    """The processes for the time of a command. An error inside ends all of them, and one reports it."""
    team = DistributedContext(start)
    try:
        yield team
    except Exception as error:  # Ctrl-C reaches each process by itself
        team.fail(error)
        raise
    team.end()


def destroy_process_group() -> None:
    """Destroy torch's process group, if there is one.

    A gloo group that is left to the interpreter's exit sometimes aborts its process ("terminate called without an
    active exception", torch 2.13: 7 of 30 pairs on a busy machine, none of 30 that had destroyed it), so that a
    launcher reports a finished run as failed. NCCL only warns, and may wait for a process that is gone: call this
    after success alone.
    """
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _exit_code(error: Exception) -> int:
    """The command line's exit code for an error; 1 for a defect, which keeps its traceback."""
    if isinstance(error, CoeffDiffError):
        return error.exit_code
    return 2 if type(error).__name__ == "OutOfMemoryError" else 1
