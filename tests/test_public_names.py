"""What `import coeffdiff` offers, and that it costs nothing before it is used."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import coeffdiff

PACKAGE = Path(coeffdiff.__file__).parent


@pytest.mark.parametrize("name", sorted(coeffdiff.__all__))
def test_every_public_name_is_there_and_documented(name):
    """A name of __all__ can be had, and says in its docstring what it is."""
    public = getattr(coeffdiff, name)
    assert isinstance(public, str) or public.__doc__


def test_the_public_names_are_these():
    """A name that is added or taken away is a decision, not an accident."""
    assert sorted(coeffdiff.__all__) == [
        "Adapter", "CoeffDiffError", "__version__", "attach", "attach_from", "detach", "load_adapter",
        "mixed_attention", "save", "train",
    ]  # fmt: skip
    assert set(coeffdiff.__all__) <= set(dir(coeffdiff))


def test_other_names_are_refused():
    """With the usual error, so that hasattr and editors work."""
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        coeffdiff.nothing  # noqa: B018


def test_importing_it_loads_nothing_heavy():
    """Neither torch nor diffusers, before a public name is used."""
    code = "import sys, coeffdiff; print({'torch', 'diffusers', 'transformers', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_version_is_the_installed_one():
    """pyproject.toml and the package say the same."""
    assert coeffdiff.__version__ == version("coeffdiff")


def test_its_types_are_for_others_too():
    """PEP 561: type checkers read the package's annotations."""
    assert (PACKAGE / "py.typed").is_file()
