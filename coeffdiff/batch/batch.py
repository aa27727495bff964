"""batch(): many subjects, each with a run of its own. What `coeffdiff batch` does."""

from __future__ import annotations

from typing import Any

from coeffdiff.batch.plan import BatchPlan
from coeffdiff.batch.results import gather, store_outcome, write_results
from coeffdiff.batch.subject_worker import SubjectBusy, SubjectWorker
from coeffdiff.errors import Interrupted, LaunchError
from coeffdiff.execution.rounds import run_round
from coeffdiff.execution.tasks import Executor, Task
from coeffdiff.utils.console import print_info
from coeffdiff.utils.launch_environment import read_launch
from coeffdiff.utils.output_folder import refuse_unwritable, write_errors


def batch(plan: BatchPlan, executor: Executor, part: tuple[int, int] = (1, 1)) -> dict[str, Any]:
    """Train (and score) what is missing of a batch, and write batch.json and batch.txt.

    A subject that is finished is left as it is, one that was stopped goes on, one that failed is tried again. One that
    fails does not stop the others.

    Args:
        part: (k, n): only every n-th subject, from the k-th on; other batches may work on the other parts meanwhile.
    Returns: what became of the subjects of this part; see results.py.
    Raises: Interrupted after Ctrl-C, with everything saved; LaunchError if there are no workers.
    """
    if read_launch().size > 1:
        raise LaunchError(
            "batch shares its work among workers of its own: start it once, with --executor ray --workers N, without "
            "accelerate launch."
        )
    refuse_unwritable(plan.output)
    with write_errors(str(plan.output)):
        plan.output.mkdir(parents=True, exist_ok=True)
    tasks = [Task(task.name, task, task.log) for task in plan.tasks(part)]
    busy = ended = done = 0
    interrupted = False
    try:
        with executor.open(SubjectWorker, plan.output) as pool:
            for outcome in run_round(pool, tasks, "subjects"):
                store_outcome(plan, outcome)
                busy += isinstance(outcome.error, SubjectBusy)
                interrupted = interrupted or outcome.state == "stopped"
                done += outcome.state == "done"
                ended += 1
    finally:
        write_results(plan)
    results = gather(plan, [task.name for task in tasks])
    if interrupted or ended < len(tasks):
        raise Interrupted(
            f"Stopped with {done} of {len(tasks)} subjects done; what was begun is saved. The same command goes on."
        )
    if busy:
        what = "1 subject was" if busy == 1 else f"{busy} subjects were"
        print_info(f"{what} left to another batch that is at work in {plan.output}.")
    return results
