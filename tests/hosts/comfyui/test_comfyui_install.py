"""`coeffdiff comfyui install`: what it writes works without pip's libraries, and what it refuses. No ComfyUI is needed."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest
from typer.testing import CliRunner

import coeffdiff
from coeffdiff.cli import app
from coeffdiff.errors import ConfigError
from coeffdiff.hosts.comfyui import install as installing
from coeffdiff.hosts.comfyui.install import install


@pytest.fixture
def comfyui(tmp_path):
    """The files by which ComfyUI's folder is known."""
    root = tmp_path / "ComfyUI"
    for name in ("comfy", "comfy_api/v0_0_2", "custom_nodes"):
        (root / name).mkdir(parents=True)
    (root / "comfy" / "sd.py").touch()
    return root


# The modules of ComfyUI are the only ones that are stood in for: all that is copied is imported as it is.
IMPORTS = """
import asyncio, importlib.util, sys
from pathlib import Path
from unittest.mock import MagicMock
for name in ("diffusers", "transformers", "peft", "accelerate", "typer", "rich", "PIL", "tokenizers", "yaml", "psutil"):
    sys.modules[name] = None  # an import of it fails
class Base: pass
for name in ("comfy", "comfy.lora", "comfy.model_base", "comfy.model_management", "comfy.patcher_extension", "comfy.utils",
             "comfy.weight_adapter", "comfy_api", "comfy_api.v0_0_2", "folder_paths"):
    sys.modules[name] = MagicMock()
sys.modules["folder_paths"].models_dir = sys.argv[2]
sys.modules["comfy.weight_adapter"].WeightAdapterBase = Base
api = sys.modules["comfy_api.v0_0_2"]
api.ComfyExtension = api.io.ComfyNode = Base
spec = importlib.util.spec_from_file_location("custom", Path(sys.argv[1], "__init__.py"))
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
(node,) = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
places = {m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "coeffdiff"}
assert all(place.startswith(sys.argv[1]) for place in places), places
print(node.__name__, len(places) > 20)
"""

LINKED = """
print([node.fingerprint_inputs(*given) for given in ((None,), ("none", None), (None, None))])
print([node.validate_inputs(*given) for given in ((None,), ("none", None), (None, None))])
try:
    node.fingerprint_inputs("none", "/nowhere")
except Exception as error:
    print(type(error).__name__)
"""


def test_the_copy_needs_nothing_that_comfyui_lacks(comfyui, tmp_path):
    """Its package is the copy's own, although another coeffdiff can be imported here."""
    folder, there = install(comfyui)
    assert (folder, there) == (comfyui / "custom_nodes" / "coeffdiff", False)
    command = [sys.executable, "-c", IMPORTS, str(folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LoadCoeffdiffAdapter", "True"]
    assert (tmp_path / "coeffdiff").is_dir()  # where adapters go


def test_an_input_that_another_node_gives_is_none_before_it_runs(comfyui, tmp_path):
    """Its fingerprint is constant, since ComfyUI itself knows what is connected; one that is typed is read."""
    command = [sys.executable, "-c", IMPORTS + LINKED, str(install(comfyui)[0]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["['', '', '']", "[True, True, True]", "AdapterError"]


def test_what_the_registry_reads(comfyui):
    """No dependency, the version of the package, and a name that does not claim to be ComfyUI's."""
    read = tomllib.loads((install(comfyui)[0] / "pyproject.toml").read_text())
    assert read["project"]["dependencies"] == [] and read["project"]["version"] == coeffdiff.__version__
    assert read["tool"]["comfy"].keys() == {"PublisherId", "DisplayName", "Icon"}
    assert "comfyui" not in read["tool"]["comfy"]["DisplayName"].lower()


def test_again_is_an_update(comfyui):
    """Files of an older version are gone; an update that fails leaves the old copy."""
    folder, _ = install(comfyui)
    (folder / "coeffdiff" / "old.py").touch()
    assert install(comfyui) == (folder, True)
    assert not (folder / "coeffdiff" / "old.py").exists()
    assert [place.name for place in folder.parent.iterdir()] == ["coeffdiff"]


def test_an_update_that_fails_changes_nothing(comfyui, monkeypatch):
    folder, _ = install(comfyui)
    monkeypatch.setattr(installing, "_PARTS", ("errors.py", "absent.py"))
    with pytest.raises(ConfigError, match="coeffdiff cannot be written: No such file"):
        install(comfyui)
    assert (folder / "coeffdiff" / "__init__.py").is_file()
    assert [place.name for place in folder.parent.iterdir()] == ["coeffdiff"]


def test_comfyui_desktop_has_a_base_folder(tmp_path):
    for name in ("custom_nodes", "models", "user"):
        (tmp_path / name).mkdir()
    assert install(tmp_path)[0] == tmp_path / "custom_nodes" / "coeffdiff"
    assert (tmp_path / "models" / "coeffdiff").is_dir()  # a copied run shall not take its place


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda root: root.parent, r"is no ComfyUI: it has no comfy/sd\.py.*Did you mean .*ComfyUI\?"),
        (lambda root: root / "custom_nodes", r"is no ComfyUI.*Did you mean .*ComfyUI\?"),
        (lambda root: root / "gone", "gone does not exist; name ComfyUI's folder"),
        (lambda root: root / "comfy" / "sd.py", "is a file; name ComfyUI's folder"),
        (
            lambda root: (root / "comfy_api" / "v0_0_2").rmdir() or root,
            r"cannot load this node.*0\.3\.64 or newer",
        ),
        (
            lambda root: (root / "custom_nodes" / "coeffdiff").mkdir() or root,
            "is not what this command writes",
        ),
        (lambda root: (root / "custom_nodes" / "coeffdiff").symlink_to(root) or root, "is a link to"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(comfyui, spoil, sentence):
    path = spoil(comfyui)
    before = sorted(comfyui.parent.rglob("*"))
    with pytest.raises(ConfigError, match=sentence):
        install(path)
    assert sorted(comfyui.parent.rglob("*")) == before


def test_the_command(comfyui):
    """The folder on standard output, what comes next beside it; a mistake is exit code 2."""
    result = CliRunner().invoke(app, ["comfyui", "install", str(comfyui)])
    assert result.exit_code == 0
    assert result.stdout.strip() == str(comfyui / "custom_nodes" / "coeffdiff")
    assert str(comfyui / "models" / "coeffdiff") in result.stderr
    assert CliRunner().invoke(app, ["comfyui", "install", str(comfyui / "gone")]).exit_code == 2
