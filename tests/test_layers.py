"""Imports point one way: the order of the house, read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import coeffdiff

PACKAGE = Path(coeffdiff.__file__).parent
# From the ground up: a wing may import those on its left, and its own files.
ORDER = (
    *("errors", "utils", "execution", "method", "hosts", "config", "pocket", "models", "data", "sampling"),
    *("labelling", "metrics", "preflight", "training", "evaluation", "batch", "tasks", "demo", "ui", "cli"),
    "__main__",
)


def imported_modules(file: Path) -> set[str]:
    """Modules of coeffdiff that a file imports, at the top or inside functions, without the name of the package."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    inside = {name.removeprefix("coeffdiff.") for name in names if name.startswith("coeffdiff.")}
    return {name for name in inside if is_module(name)}


def is_module(name: str) -> bool:
    place = PACKAGE / name.replace(".", "/")
    return (place / "__init__.py").is_file() or place.with_suffix(".py").is_file()


def files() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


def wing_of(module: str) -> str:
    return module.split(".")[0]


def test_imports_point_one_way():
    """No file imports a wing on the right of its own."""
    wrong = []
    for file in files():
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        others = {wing_of(module) for module in imported_modules(file)} - {own}
        wrong += [
            f"{file.relative_to(PACKAGE)} imports {wing}"
            for wing in others
            if ORDER.index(wing) > ORDER.index(own)
        ]
    assert wrong == []


def test_no_files_import_each_other_in_a_circle():
    """Inside of a wing too there is an order."""
    graph = {}
    for file in files():
        module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        # A package is imported with each of its modules: only what it is asked for by name counts
        graph[module] = {name for name in imported_modules(file) if not name.startswith(f"{module}.")}
        graph[module] -= {name for name in graph[module] if module.startswith(f"{name}.") or is_package(name)}
    while graph:
        free = {module for module, needed in graph.items() if not needed & graph.keys() - {module}}
        assert free, f"these import each other: {sorted(graph)}"
        graph = {module: needed for module, needed in graph.items() if module not in free}


def is_package(name: str) -> bool:
    return (PACKAGE / name.replace(".", "/") / "__init__.py").is_file()


def test_every_wing_has_its_place():
    """ORDER names all of the package and nothing else."""
    parts = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix in ("", ".py")}
    assert parts - {"__init__", "__pycache__"} == set(ORDER)


def test_the_method_imports_no_host_and_no_settings():
    """`method` is tensors, modules and an adapter's files: of the package it knows errors and utils alone."""
    for file in (PACKAGE / "method").glob("*.py"):
        assert {wing_of(module) for module in imported_modules(file)} <= {"errors", "utils", "method"}, file


def test_the_node_for_comfyui_imports_no_other_host():
    """What runs inside ComfyUI knows errors, utils, method and itself; the command that copies it is not among that."""
    for file in (PACKAGE / "hosts" / "comfyui").glob("*.py"):
        others = {
            m
            for m in imported_modules(file)
            if not m.startswith(("hosts.comfyui", "errors", "utils", "method"))
        }
        assert others <= {"hosts"}, file


READER = """
import sys
for name in ("diffusers", "transformers", "peft", "accelerate", "typer", "rich", "PIL", "tokenizers"):
    sys.modules[name] = None  # an import of it fails
from pathlib import Path
from coeffdiff.method.adapter_file import read_coefficients, read_lora, read_rows
from coeffdiff.method.adapter_paths import find_adapter
folder = find_adapter(sys.argv[1])
header, alphas = read_coefficients(folder)
print(header.kind, len(alphas), len(read_lora(folder, header)), len(read_rows(folder, header)))
"""


@pytest.mark.parametrize("kind", ["coeff", "coeff+lora"])
def test_an_adapter_is_read_without_diffusers(tiny_pipeline, tmp_path, kind):
    """Its files need torch, safetensors and pydantic alone, so that other hosts can take them."""
    from coeffdiff.hosts.diffusers import save_adapter
    from coeffdiff.hosts.lora.layers import add_lora
    from coeffdiff.hosts.unet import inject
    from coeffdiff.method.adapter_header import AdapterHeader, LoraHeader

    layers = inject(tiny_pipeline.unet)
    if "lora" in kind:
        add_lora(tiny_pipeline.unet, rank=2, alpha=2.0, targets=["to_q"], dora=False, seed=0)
    header = AdapterHeader(
        format_version=1, kind=kind, base_model="tiny", token="ohwx", trained_steps=1, resolution=64,
        heads={name: c.heads for name, c in layers.items()},
        lora=LoraHeader(rank=2, alpha=2.0) if "lora" in kind else None,
    )  # fmt: skip
    save_adapter(tmp_path / "adapter", tiny_pipeline.unet, header)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loras = 2 * len(layers) if "lora" in kind else 0
    assert done.stdout.split() == [kind, str(len(layers)), str(loras), "0"]
