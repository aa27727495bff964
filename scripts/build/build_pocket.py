"""Make the models of the package from nothing but their world: hours on two CPU cores, minutes on a GPU.

python scripts/build/build_pocket.py

Stopped at any time, it goes on from there when it is started again. --store-unfinished writes a stage's weights as far
as it has come; without its checkpoint the training then goes on from there.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path


def main() -> int:
    from coeffdiff.utils.threads import choose_waiting

    choose_waiting()
    import torch

    from coeffdiff.errors import CoeffDiffError
    from coeffdiff.pocket import WEIGHTS
    from coeffdiff.utils.paths import path_argument
    from pocket_build.fitting import faster_precision
    from pocket_build.stages import STAGES, STORE_UNFINISHED
    from pocket_build.workshop import PLANS, Workshop

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", action="append", choices=STAGES, help="repeatable; default: all of them")
    parser.add_argument(
        "--folder", type=path_argument, default=Path("build/pocket"), help="renders and checkpoints"
    )
    parser.add_argument("--weights", type=path_argument, default=WEIGHTS, help="where the models go")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that render")
    parser.add_argument(
        "--steps", action="append", default=[], metavar="STAGE=N", help="other steps than planned; repeatable"
    )
    parser.add_argument("--compile", action="store_true", help="the UNet's transformer blocks")
    parser.add_argument("--store-unfinished", choices=STORE_UNFINISHED, metavar="STAGE")
    chosen = parser.parse_args()
    dtype = {"auto": faster_precision(chosen.device), "fp32": torch.float32, "bf16": torch.bfloat16}
    plans = dict(PLANS)
    for given in chosen.steps:
        stage, _, steps = given.partition("=")
        if stage not in plans or not steps.isdigit():
            parser.error(f"--steps {given} is not of the form STAGE=N with a stage of {', '.join(plans)}")
        plans[stage] = replace(plans[stage], steps=int(steps))
    shop = Workshop(
        chosen.folder,
        chosen.weights,
        chosen.device,
        dtype[chosen.precision],
        chosen.workers,
        plans,
        compiled=chosen.compile,
    )
    try:
        if chosen.store_unfinished:
            steps = STORE_UNFINISHED[chosen.store_unfinished](shop)
            print(f"{chosen.store_unfinished} of {steps} steps is in {shop.weights}.")
            return 0
        for stage in [name for name in STAGES if name in (chosen.stage or STAGES)]:
            if shop.finished(stage):
                print(f"{stage}: finished before")
                continue
            shop.require(stage)
            with shop.alone(stage):
                STAGES[stage](shop)
            print(f"{stage}: {shop.record()[stage]}", flush=True)
    except CoeffDiffError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
