"""Write class folders of pictures of pocket's world, to try `coeffdiff classify` without own pictures.

python scripts/make_classes.py --task view --output view/
coeffdiff classify view/ --model pocket-dino

    view      from which side a thing is seen: front, right, back or left; things of eight kinds
    distance  how far the camera is: four distances of things of equal size
    mark      what is painted around a thing: nothing, a band, a zigzag, a spiral, or one half in another colour

pocket-dino and pocket-clip were trained for none of these: the first was taught to know an individual, of which a mark
is a part, in whatever view and place; the second to match captions, which name no view, distance or mark.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from typing import Any

VIEWS = {"front": 0.0, "right": 90.0, "back": 180.0, "left": -90.0}
ONE_SIDED = ("mug", "teapot", "boot", "robot", "duck", "car", "dog", "chair")  # kinds whose sides differ
DISTANCES = {"near": 2.5, "middle": 3.0, "far": 3.6, "farthest": 4.3}
MARKS = ("none", "band", "zigzag", "spiral", "half")
BATCH = 32  # pictures rendered at a time


def main() -> int:
    from coeffdiff.pocket.world import render
    from coeffdiff.pocket.world.subjects import picture_of
    from coeffdiff.utils.paths import path_argument
    from coeffdiff.utils.seeding import stable_seed

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument(
        "--output", type=path_argument, required=True, help="folder; files of other names are left alone"
    )
    parser.add_argument("--count", type=int, default=76, help="pictures of each class")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    names, scene = TASKS[asked.task]
    for name in names:
        folder = asked.output / name
        folder.mkdir(parents=True, exist_ok=True)
        for begin in range(0, asked.count, BATCH):
            numbers = range(begin, min(begin + BATCH, asked.count))
            seeds = [stable_seed("classes", asked.task, name, asked.seed, number) for number in numbers]
            images, _ = render([scene(name, seed) for seed in seeds])
            for number, image in zip(numbers, images, strict=True):
                picture_of(image).save(folder / f"{number:03d}.png")
    print(f"{len(names)} classes of {asked.count} pictures in {asked.output}: {', '.join(names)}")
    return 0


def seen_from(side: str, seed: int) -> Any:
    from coeffdiff.pocket.world import sample_scene

    rng = random.Random(seed)
    return sample_scene(seed, kind=rng.choice(ONE_SIDED), view=VIEWS[side] + rng.uniform(-25, 25))


def at_distance(name: str, seed: int) -> Any:
    from coeffdiff.pocket.world import sample_scene
    from coeffdiff.pocket.world.scene import Camera

    rng = random.Random(seed)
    distance = DISTANCES[name] * rng.uniform(0.96, 1.04)
    camera = Camera(rng.uniform(-22, 22), rng.uniform(12, 22), distance, rng.uniform(0.42, 0.60))
    return sample_scene(seed, camera=camera, size=0.86)


def marked(name: str, seed: int) -> Any:
    """A thing of the world with at most one mark, in a strong colour."""
    from dataclasses import replace

    from coeffdiff.pocket.world import sample_scene
    from coeffdiff.pocket.world.scene import Mark
    from coeffdiff.pocket.world.shapes import object_bounds
    from coeffdiff.pocket.world.subjects import UNNAMED

    rng = random.Random(seed)
    scene = sample_scene(seed, pattern="plain")
    top, colour = object_bounds(scene.kind, scene.shape).top, UNNAMED[rng.choice(sorted(UNNAMED))]
    level = top * rng.uniform(0.3, 0.7)
    marks = {
        "none": (),
        "band": (Mark("band", (0.0, level, 0.0), (1.0, 0.06), colour),),
        "zigzag": (Mark("zigzag", (0.0, level, 0.0), (1.0, 0.09), colour),),
        "spiral": (Mark("spiral", (0.0, 0.0, 0.0), (0.45, 0.12), colour),),
        "half": (Mark("half", (0.0, level, 0.0), (0.3, 0.3), colour, yaw=rng.choice((-90.0, 90.0))),),
    }
    return replace(scene, marks=marks[name])


Scene = Callable[[str, int], Any]
TASKS: dict[str, tuple[tuple[str, ...], Scene]] = {
    "view": (tuple(VIEWS), seen_from),
    "distance": (tuple(DISTANCES), at_distance),
    "mark": (MARKS, marked),
}


if __name__ == "__main__":
    sys.exit(main())
