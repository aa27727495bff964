"""Write a CSV of Debian's one-line package descriptions with their sections, for `coeffdiff classify`.

python scripts/experiments/make_package_texts.py --output packages.csv

The texts come from this machine's package lists (`apt-cache dumpavail`; where they are empty, `apt-get update` fetches
them). Of each source package one binary package is taken, the first by name: the others' descriptions repeat it.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

SECTIONS = (
    "science", "net", "admin", "games", "sound", "text", "fonts", "graphics", "web", "math", "editors", "mail",
    "database", "video", "electronics", "hamradio",
)  # fmt: skip


def main() -> int:
    from coeffdiff.utils.atomic import atomic_write
    from coeffdiff.utils.paths import path_argument

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=path_argument, required=True, help="the CSV file")
    parser.add_argument("--sections", nargs="+", default=SECTIONS, help="the classes")
    chosen = parser.parse_args()
    try:
        listing = subprocess.run(
            ["apt-cache", "dumpavail"], capture_output=True, text=True, encoding="utf-8", check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        parser.error(
            f"apt-cache dumpavail cannot be run here ({error}): this needs Debian or a system like it."
        )
    rows = sorted(described(paragraphs(listing), set(chosen.sections)))
    if not rows:
        parser.error("this machine has no package lists with these sections: run apt-get update first.")
    with (
        atomic_write(chosen.output) as unfinished,
        unfinished.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        writer.writerows((text, section) for section, text in rows)
    print(f"{len(rows)} descriptions of {len({section for section, _ in rows})} sections in {chosen.output}")
    return 0


def paragraphs(listing: str) -> Iterator[dict[str, str]]:
    """The fields of each package, the first line of each."""
    for paragraph in listing.split("\n\n"):
        yield dict(re.findall(r"^([A-Z][\w-]*): (.*)$", paragraph, re.MULTILINE))


def described(packages: Iterable[dict[str, str]], sections: set[str]) -> list[tuple[str, str]]:
    """(section, description) of the first package by name of each source, where the section is one of these."""
    first: dict[str, dict[str, str]] = {}
    for package in sorted(packages, key=lambda fields: fields.get("Package", "")):
        if package.get("Section") in sections and package.get("Description"):
            source = package.get("Source", package["Package"]).split(" ")[0]
            first.setdefault(source, package)
    return [(package["Section"], package["Description"]) for package in first.values()]


if __name__ == "__main__":
    sys.exit(main())
