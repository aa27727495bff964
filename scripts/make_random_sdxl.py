"""Write a complete SDXL or Stable Diffusion 1.5 pipeline folder with random weights, without any download.

python scripts/make_random_sdxl.py --size tiny --output models/tiny
python scripts/make_random_sdxl.py --size sdxl --dtype float16 --output models/random-sdxl
python scripts/make_random_sdxl.py --size sd15-micro --output models/sd15-micro
"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    from coeffdiff.utils.paths import path_argument

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size",
        choices=["tiny", "sdxl", "sd15-micro", "sd15"],
        required=True,
        help="tiny: 3 MB, sd15-micro: 1 MB, for tests",
    )
    parser.add_argument("--output", type=path_argument, required=True, help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--prediction-type", choices=["epsilon", "v_prediction"], default="epsilon")
    chosen = parser.parse_args(arguments)

    import torch  # after the arguments, so that --help and typing mistakes answer at once

    from coeffdiff.errors import CoeffDiffError
    from coeffdiff.pocket.model import parameter_count, refuse_existing, save_random
    from coeffdiff.pocket.sizes import size_named

    dtype = getattr(torch, chosen.dtype)
    numbers = parameter_count(chosen.size)
    try:
        refuse_existing(chosen.output)
        print(
            f"Writing {chosen.output}: {size_named(chosen.size).family.label}'s architecture in size {chosen.size}, "
            f"{numbers:,} random numbers in {chosen.dtype}, {numbers * dtype.itemsize / 1e6:,.0f} MB."
        )
        save_random(
            chosen.size,
            chosen.output,
            seed=chosen.seed,
            dtype=dtype,
            prediction_type=chosen.prediction_type,
            variant="fp16" if dtype == torch.float16 else None,  # the names that SDXL's half files have
        )
    except CoeffDiffError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("Done. Its pictures are noise: nothing was trained.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
