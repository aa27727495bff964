"""Tune one image-text model to several tasks together, and score its answers.

A step's questions are of all tasks in turn, so that each task has an equal share. Which questions a step has depends on
(seed, step) alone, so all arms of a seed see the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from coeffdiff.errors import NonFiniteLoss
from coeffdiff.tasks.image_text_data import Question
from coeffdiff.tasks.image_text_model import LONGEST, ImageText
from coeffdiff.utils.seeding import generator_for, stable_seed

WARM_UP = 0.1  # share of the steps
CLIP = 1.0  # norm of the gradient


class Turns:
    """Questions by turns of their tasks; within a task each once, in a new order, before any comes again."""

    def __init__(self, questions: Sequence[Question], seed: int) -> None:
        self.seed = seed
        self.tasks = sorted({question.task for question in questions})
        self.of = {task: [q for q in questions if q.task == task] for task in self.tasks}
        self._orders: dict[tuple[str, int], list[int]] = {}

    def __call__(self, number: int) -> Question:
        """The question that comes as number 0, 1, 2, ..."""
        turn, which = divmod(number, len(self.tasks))
        task = self.tasks[which]
        lap, place = divmod(turn, len(self.of[task]))
        if (task, lap) not in self._orders:
            lot = generator_for("turns", self.seed, task, lap)
            self._orders[task, lap] = torch.randperm(len(self.of[task]), generator=lot).tolist()
        return self.of[task][self._orders[task, lap][place]]


def few(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """The first `count` questions of each task in the seed's own order; 0: all."""
    turns = Turns(questions, stable_seed("few", seed))
    if not count:
        return list(questions)
    return [
        turns(turn * len(turns.tasks) + which)
        for which, task in enumerate(turns.tasks)
        for turn in range(min(count, len(turns.of[task])))
    ]


def tune(
    model: ImageText,
    groups: list[dict[str, Any]],
    features: Tensor,
    questions: Sequence[Question],
    *,
    steps: int,
    batch_size: int,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train what is in `groups` (of arms.put_arm, for AdamW) with a warm-up and a cosine down to nothing.

    Args:
        features: of all pictures, [N, T, D].  on_step: gets the steps done and the loss.
    Raises: NonFiniteLoss.
    """
    optimizer = torch.optim.AdamW(groups)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(WARM_UP * steps)), steps)
    parameters = [parameter for group in groups for parameter in group["params"]]
    turns = Turns(questions, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed("image-text", seed))  # dropout, alpha's too
        model.train()
        for step in range(steps):
            batch = [turns(step * batch_size + i) for i in range(batch_size)]
            loss = model(*_inputs(model, features, batch), [question.answer for question in batch])
            if not math.isfinite(value := loss.item()):
                raise NonFiniteLoss(f"The loss became {value} in step {step + 1}; lower the learning rates.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            schedule.step()
            if on_step:
                on_step(step + 1, value)
    model.eval()


@dataclass(frozen=True)
class Score:
    """accuracy: share of answers that are right word for word, case and final stops apart, f1: of their words
    (as in SQuAD), each of every task.  loss: mean over batches, weighted by their questions, of the mean over the
    tokens of a batch's answers.
    """

    accuracy: Mapping[str, float]
    f1: Mapping[str, float]
    counts: Mapping[str, int]
    loss: float

    @property
    def mean(self) -> float:
        """Mean accuracy of the tasks."""
        return sum(self.accuracy.values()) / len(self.accuracy)


@torch.no_grad()
def score(model: ImageText, features: Tensor, questions: Sequence[Question], batch_size: int = 64) -> Score:
    """Greedy answers to questions, beside the right ones."""
    right: dict[str, list[float]] = {}
    shared: dict[str, list[float]] = {}
    losses = 0.0
    longest = _longest_answer(model, questions)
    ordered = sorted(questions, key=lambda question: (len(question.pictures), question.task))
    for begin in range(0, len(ordered), batch_size):
        batch = ordered[begin : begin + batch_size]
        inputs = _inputs(model, features, batch)
        losses += float(model(*inputs, [question.answer for question in batch])) * len(batch)
        for question, answer in zip(batch, model.answer(*inputs, longest=longest), strict=True):
            said, wanted = _plain(answer), _plain(question.answer)
            right.setdefault(question.task, []).append(float(said == wanted))
            shared.setdefault(question.task, []).append(_f1(said.split(), wanted.split()))
    tasks = sorted(right)
    return Score(
        {task: sum(right[task]) / len(right[task]) for task in tasks},
        {task: sum(shared[task]) / len(shared[task]) for task in tasks},
        {task: len(right[task]) for task in tasks},
        losses / len(ordered),
    )


def _inputs(
    model: ImageText, features: Tensor, questions: Sequence[Question]
) -> tuple[Tensor, Tensor, list[str]]:
    """Features [B, P, T, D], which of them are shown [B, P], and the questions."""
    most = max(len(question.pictures) for question in questions)
    rows = torch.tensor([[*q.pictures, *[0] * (most - len(q.pictures))] for q in questions])
    shown = torch.tensor([[place < len(q.pictures) for place in range(most)] for q in questions])
    device = model.projection.linear.weight.device
    return features[rows].to(device), shown.to(device), [question.text for question in questions]


def _longest_answer(model: ImageText, questions: Sequence[Question]) -> int:
    """Tokens after which an answer is longer than every right one."""
    known = model.tokenizer([question.answer for question in questions], truncation=True, max_length=LONGEST)
    return max(len(tokens) for tokens in known.input_ids) + 1


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    common = sum(min(said.count(word), wanted.count(word)) for word in set(said))
    return 2 * common / (len(said) + len(wanted)) if common else 0.0
