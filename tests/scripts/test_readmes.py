"""The README and those of the folders: their links, paths and commands are true, and the first is short."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from coeffdiff.cli.root import app
from coeffdiff.config.schema import Settings

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "configs/README.md",
    "coeffdiff/pocket/README.md",
    "coeffdiff/ui/README.md",
    *(f"scripts/{folder}README.md" for folder in ("", "bench/", "build/", "evidence/")),
]
COMMANDS = typer.main.get_command(app).commands


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_lines(page: str) -> list[list[str]]:
    """Indented lines, continued ones joined, and those between backticks: words without their comments."""
    text = re.sub(r"\\\n\s*", "", read(page))
    lines = re.findall(r"^    ((?:coeffdiff|accelerate|python|bash) .*)", text, re.MULTILINE)
    lines += re.findall(r"`(coeffdiff\s[^`]+)`", text)
    return [shlex.split(line, comments=True) for line in lines]


def test_the_first_readme_is_short():
    """A newcomer reads it to its end: at most 200 lines."""
    assert len(read("README.md").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Each relative link is a file or a folder with a README; what follows # is a heading there."""
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", read(page)):
        name, _, anchor = link.partition("#")
        target = ROOT / page if not name else (ROOT / page).parent / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_their_options(page):
    """Each coeffdiff command exists and has every option named; each script and each recipe is there."""
    for words in command_lines(page):
        for word in words:
            if re.match(r"(scripts|configs)/[\w/]+\.\w+$", word):
                assert (ROOT / word).exists(), word
        begin = words.index("coeffdiff") + 1 if "coeffdiff" in words else None
        if begin is None or words[begin] == "COMMAND":
            continue
        command = COMMANDS[words[begin]]
        known = {option for parameter in command.params for option in parameter.opts}
        asked = {word for word in words[begin + 1 :] if re.match(r"--?[a-z]", word)}
        assert asked <= known | {"--help"}, (words, asked - known)


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist(page):
    """Each dotted name of a section is a setting of the tree; examples in Python have names of their own."""
    prose = re.sub(r"```python.*?```", "", read(page), flags=re.DOTALL)
    sections = "|".join(name for name, field in Settings.model_fields.items() if is_section(field))
    for name in re.findall(rf"(?<![\w/.-])(?:{sections})(?:\.[a-z_]+)+(?![\w(/])", prose):
        kind = Settings
        for part in name.split(".") if not name.endswith(".py") else ():
            assert part in kind.model_fields, name
            kind = kind.model_fields[part].annotation


def is_section(field) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def test_each_table_of_the_evidence_stands_once():
    """On the page that evidence_tables.py writes, and nowhere else."""
    places = [(page, name) for page in PAGES for name in re.findall(r"<!-- table: (\w+) -->", read(page))]
    assert {page for page, _ in places} == {"scripts/evidence/README.md"}
    assert len({name for _, name in places}) == len(places)
