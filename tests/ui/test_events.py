"""What goes wrong in an event appears on the page as one sentence. Needs gradio."""

from __future__ import annotations

import pytest

gr = pytest.importorskip("gradio", reason="gradio is not installed; scripts/test_ui.sh fetches it")

from coeffdiff.errors import PhotoError  # noqa: E402
from coeffdiff.ui.app import build_page  # noqa: E402
from coeffdiff.ui.events import shown, speaking  # noqa: E402
from coeffdiff.utils.console import print_info, progress  # noqa: E402


def failing(error):
    @speaking
    def work():
        raise error

    with pytest.raises(gr.Error) as raised:
        work()
    return raised.value


def test_a_mistake_is_its_own_sentence():
    notice = failing(PhotoError("<b>a.png</b> is no photo."))
    assert (notice.title, notice.message) == ("PhotoError", "&lt;b&gt;a.png&lt;/b&gt; is no photo.")


def test_memory_and_the_disk_are_no_defects():
    assert "too little memory" in failing(MemoryError()).message
    assert "No space left" in failing(OSError(28, "No space left on device", "x.png")).message


def test_a_defect_shows_nothing_of_itself_on_the_page(capsys):
    notice = failing(KeyError("secret"))
    assert notice.title == "Defect" and "(KeyError)" in notice.message and "secret" not in notice.message
    assert "secret" in capsys.readouterr().err


def test_hints_and_progress_are_shown(monkeypatch):
    said, moved = [], []
    monkeypatch.setattr(gr, "Warning", lambda text, title, duration: said.append((title, text)))
    with shown(lambda share, desc: moved.append((share, desc))):
        print_info("hint     the class word is missing", "model    pocket on cpu")
        with progress("sampling", 4) as bar:
            bar(1)
    print_info("hint     nobody listens")
    assert said == [("Hint", "the class word is missing")]
    assert moved == [(0.25, "sampling 1.0 of 4")]


def test_the_page_can_be_built(tmp_path, monkeypatch):
    """No event is offered to programs: the command line is there for them."""
    monkeypatch.chdir(tmp_path)
    page = build_page(tmp_path)
    visible = {function.api_visibility for function in page.fns.values()}
    assert visible == {"private"}


def test_fields_that_were_never_opened_ask_for_nothing(tmp_path, monkeypatch):
    """Gradio gives None for a text in a closed accordion."""
    from coeffdiff.ui.form import Form
    from coeffdiff.ui.photos_tab import form_of

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    form = form_of([str(tmp_path / "a.png")], "ohwx", None, None, None, None, None, None, None, None)
    assert form == Form("runs/photos/ohwx", "ohwx")
