"""Which examples are tested on, which rates are tuned on, and which are the shots of a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from coeffdiff.tasks.examples import Examples, enough_of_each
from coeffdiff.utils.seeding import stable_seed


@dataclass(frozen=True)
class Split:
    """Indices of examples, without overlap. pool: of each class those that shots are drawn from."""

    pool: tuple[tuple[int, ...], ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]

    def shots(self, count: int, seed: int | str) -> tuple[int, ...]:
        """`count` examples of each class, drawn by lot from the pool; fewer shots of a seed are among its more."""
        drawn: list[int] = []
        for label, indices in enumerate(self.pool):
            rng = random.Random(stable_seed("shots", seed, label))
            drawn += rng.sample(indices, len(indices))[:count]
        return tuple(drawn)


def split_examples(examples: Examples, shots: int, test: int, validation: int) -> Split:
    """The same split for the same examples, in whatever order they come.

    Args:
        shots: the most shots that will be drawn from a class.
        test, validation: of each class, if there are enough beside the shots; else a class is shared out, two thirds
            of what is left for the test. validation 0: nothing is tuned.
    Raises: ConfigError for a class that is too small: it needs its shots, one to test on, and one to tune on.
    """
    beside = 2 if validation else 1
    aim = f"{shots} shot{'s' * (shots != 1)} with one example to test on"
    enough_of_each(examples, shots + beside, aim + " and one to tune rates on" * bool(validation))
    pool: list[tuple[int, ...]] = []
    held: tuple[list[int], list[int]] = ([], [])
    for label in range(len(examples.classes)):
        own = sorted(
            examples.of_class(label), key=lambda index: stable_seed("split", examples.items[index].digest)
        )
        spare = len(own) - shots
        tests = min(test, spare if not validation else max(1, min(spare - 1, -(-2 * spare // 3))))
        tuned = min(validation, spare - tests)
        held[0].extend(own[:tests])
        held[1].extend(own[tests : tests + tuned])
        pool.append(tuple(own[tests + tuned :]))
    return Split(tuple(pool), tuple(held[1]), tuple(held[0]))
