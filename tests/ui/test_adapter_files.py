"""An adapter is shown and taken along whole."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import pytest
from safetensors import safe_open

from coeffdiff.errors import AdapterError, ConfigError
from coeffdiff.ui.adapter_files import export_adapter, new_folder, table_of, zip_adapter


def test_the_zip_holds_the_adapter(small_adapter, tmp_path):
    made = zip_adapter(str(small_adapter), tmp_path)
    with zipfile.ZipFile(made.files[0]) as archive:
        archive.extractall(tmp_path / "out")
    again = tmp_path / "out" / "adapter"
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {
        file.name: file.read_bytes() for file in small_adapter.iterdir()
    }


def test_the_export_is_kohyas_and_says_what_it_leaves_out(small_adapter, tmp_path):
    made = export_adapter(str(small_adapter), tmp_path)
    with safe_open(made.files[0], "pt") as file:
        assert all(name.startswith("lora_") for name in file.keys())  # noqa: SIM118  # no mapping
    assert any("lpha" in note for note in made.notes)


def test_the_table_is_escaped(small_adapter):
    """It is put on the page as HTML."""
    table = table_of(str(small_adapter))
    assert table.startswith("<pre") and "ohwx" in table and "LoRA" in table


def test_no_adapter_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="Choose an adapter"):
        table_of("")
    with pytest.raises(AdapterError, match="There is no adapter"):
        zip_adapter(str(tmp_path / "none"), tmp_path)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("adapter", "ohwx"),
        ("adapters/step-000005", "ohwx-step-000005"),
        ("checkpoints/step-000005/adapter", "ohwx-step-000005"),
    ],
)
def test_files_are_called_as_the_run_and_its_step(small_adapter, tmp_path, monkeypatch, place, name):
    """The page knows runs by relative paths."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_adapter, Path("runs/ohwx", place))
    Path("runs/ohwx/config.yaml").write_text("")
    made = zip_adapter(f"runs/ohwx/{place}", tmp_path)
    assert made.files == [tmp_path / f"{name}.zip"]
    with zipfile.ZipFile(made.files[0]) as archive:
        assert f"{name}/coeff.safetensors" in archive.namelist()


def test_files_without_a_date_are_packed(small_adapter, tmp_path):
    shutil.copytree(small_adapter, tmp_path / "adapter")
    os.utime(tmp_path / "adapter" / "coeff.safetensors", (0, 0))
    assert zip_adapter(str(tmp_path / "adapter"), tmp_path).files[0].is_file()


def test_what_was_made_for_the_browser_does_not_pile_up(tmp_path):
    """Uploads lie beside it and stay."""
    (tmp_path / "upload").mkdir()
    old, fresh = new_folder(tmp_path), new_folder(tmp_path)
    for folder in (old, tmp_path / "upload"):
        os.utime(folder, (0, 0))
    newest = new_folder(tmp_path)
    assert set(tmp_path.iterdir()) == {tmp_path / "upload", fresh, newest}
