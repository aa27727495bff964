"""The forks that stand for processes of their own."""

from __future__ import annotations

import torch
from forking import fork_run

THREADS = """
import threading, torch
begin, ended = threading.Barrier(6), []
def work():
    begin.wait()
    ended.append(torch.ones(1 << 16).add(1).sum().item())
threads = [threading.Thread(target=work) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert ended == [2.0 * (1 << 16)] * 6, ended
"""


def test_the_first_threads_of_a_fork_may_compute_at_once():
    """As libraries do that load weights in several threads."""
    torch.set_num_threads(torch.get_num_threads())  # a pool that forks cannot use
    for _ in range(20):
        done = fork_run("-c", THREADS)
        assert done.returncode == 0, done.stderr
