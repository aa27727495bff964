"""The processes of one launch: collective calls, and an error in one of them ends all.

How they are started, and which launches are refused, is not decided here: see training/launch.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from coeffdiff.errors import CoeffDiffError, LaunchError
from coeffdiff.utils.launch_environment import read_launch

T = TypeVar("T")


class DistributedContext:
    """This process among those that were launched with it.

    Everybody must call gather and from_main equally often and in the same order. What one process raises inside
    `process_group` reaches the others at their next such call, and they end there without a word of their own.

    Args:
        start: makes the process group and returns Accelerate's PartialState. Called at once where a launcher has
            started several processes, otherwise not before somebody asks for the device: it loads torch.
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
        """The torch.device of this process."""
        if self._state is None:
            assert self._start is not None
            self._state = self._start()
        return self._state.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, item: T) -> list[T]:
        """Every process's item, in the order of their ranks. Waits for all of them.

        Raises: SystemExit where another process has failed and says why; LaunchError if one is gone.
        """
        entries = self._exchange((None, item))
        for exit_code, _ in entries:
            if exit_code is not None:
                raise SystemExit(exit_code)
        return [item for _, item in entries]

    def from_main(self, decide: Callable[[], T]) -> T:
        """What the main process decides, on all of them."""
        decided: Any = decide() if self.is_main else None
        answer: T = self.gather(decided)[0]
        return answer

    def fail(self, error: Exception) -> None:
        """Tell the others. Raises: SystemExit if another process speaks for all: the first of those that failed."""
        if self._broken:
            return
        try:
            entries = self._exchange((_exit_code(error), None))
        except LaunchError:
            return  # of the two sentences this process's own says more
        speaker = next(rank for rank, (exit_code, _) in enumerate(entries) if exit_code is not None)
        if speaker != self.rank:
            raise SystemExit(_exit_code(error))

    def end(self) -> None:
        if self.size > 1 and self._state is not None:
            self._state.destroy_process_group()

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


@contextmanager
def process_group(start: Callable[[], Any]) -> Iterator[DistributedContext]:
    """A team for the time of a command. An error inside ends every process, and one of them says it."""
    team = DistributedContext(start)
    try:
        yield team
    except Exception as error:  # Ctrl-C comes to each process by itself
        team.fail(error)
        raise
    team.end()


def _exit_code(error: Exception) -> int:
    """As the command line would end for it; 1 for a defect, which keeps its traceback."""
    if isinstance(error, CoeffDiffError):
        return error.exit_code
    return 2 if type(error).__name__ == "OutOfMemoryError" else 1
