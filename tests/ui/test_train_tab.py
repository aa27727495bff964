"""The buttons of a training: what they announce. Needs gradio."""

from __future__ import annotations

import pytest

pytest.importorskip("gradio", reason="gradio is not installed; scripts/test_ui.sh fetches it")

from coeffdiff.training.run_folder import RunFolder
from coeffdiff.ui import train_tab
from coeffdiff.ui.training_process import Training


@pytest.mark.parametrize(
    ("begun", "says"), [(True, "then a checkpoint is saved"), (False, "there is nothing to save")]
)
def test_stop_announces_a_checkpoint_where_there_will_be_one(tmp_path, monkeypatch, begun, says):
    """Before its steps a training ends at once; only a log that is its own says that they have begun."""
    run = RunFolder(tmp_path / "ohwx")
    if begun:
        run.path.mkdir()
        run.log.touch()
    heard = []
    monkeypatch.setattr(train_tab.gr, "Info", heard.append)
    monkeypatch.setattr(Training, "running", property(lambda self: True))
    for stopping in (False, True):
        training = Training(str(run.path), 0, 0.0, stopping)
        monkeypatch.setattr(Training, "stop", lambda self: None)
        monkeypatch.setattr(train_tab, "last_training", lambda training=training: training)
        train_tab._stop()
    assert len(heard) == 2 and all(says in text for text in heard)
