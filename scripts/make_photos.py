"""Write photos of one of the made-up subjects as an ordinary folder of JPEGs, to try the tool without own photos.

python scripts/make_photos.py --subject grey_sloth_plushie --output photos/
"""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    from coeffdiff.pocket.world.subjects import SUBJECTS, write_photos
    from coeffdiff.utils.paths import path_argument

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subject", choices=sorted(SUBJECTS), default="grey_sloth_plushie")
    parser.add_argument(
        "--output", type=path_argument, required=True, help="folder; files of other names are left alone"
    )
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resolution", type=int, default=256, help="pixels")
    chosen = parser.parse_args()
    subject = SUBJECTS[chosen.subject]
    files = write_photos(subject, chosen.output, chosen.count, chosen.seed, chosen.resolution)
    print(f"{len(files)} photos of {subject.name} ({subject.class_word}) in {chosen.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
