"""The command line: options in, one function call, one answer out. Heavy imports wait until a command runs.

A command is a file; `coeffdiff --help` lists them in the order in which they are imported here.
"""
# ruff: noqa: F401, I001

from __future__ import annotations

from coeffdiff.cli.root import app, main
from coeffdiff.cli import train
from coeffdiff.cli import check
from coeffdiff.cli import batch
from coeffdiff.cli import caption
from coeffdiff.cli import mask
from coeffdiff.cli import sample
from coeffdiff.cli import inspect
from coeffdiff.cli import merge
from coeffdiff.cli import export
from coeffdiff.cli import push
from coeffdiff.cli import demo
from coeffdiff.cli import evaluate
from coeffdiff.cli import compare
from coeffdiff.cli import toy
from coeffdiff.cli import classify
from coeffdiff.cli import image_text
from coeffdiff.cli import comfyui
from coeffdiff.cli import ui

__all__ = ["app", "main"]
