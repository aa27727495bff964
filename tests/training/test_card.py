"""The model card: words of strangers are shown, never obeyed."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from coeffdiff.config.loading import load_settings
from coeffdiff.method.adapter_header import AdapterHeader, LoraHeader, format_for
from coeffdiff.method.coefficients import Mixes
from coeffdiff.training.card import model_card
from coeffdiff.utils.hub import HUB_ID

PRINTABLE = st.text(min_size=1, max_size=60).filter(lambda t: t.isprintable() and t.strip())
HOSTILE = "a`<script>alert(1)</script>![x](javascript:alert(1))[y](http://e.vil)|**b**&lt;i&gt;<b>``"


def card(token: str, word: str, model: str, mixes: Mixes = "maps", lora: LoraHeader | None = None) -> str:
    header = AdapterHeader(
        format_version=format_for(mixes),
        kind="coeff+lora" if lora else "coeff",
        base_model=model,
        token=token,
        class_word=word,
        mixes=mixes,
        heads={"layer": 2},
        lora=lora,
        trained_steps=1,
        resolution=64,
    )
    rates = {"method.coeff.learning_rate": 1e-2, "method.lora.learning_rate": 1e-3}
    run = load_settings(None, {"training.accumulate": 1, "training.batch_size": 1, **rates})
    return model_card(header, run, 0.5, ["001-sks.png"])


@settings(deadline=None)
@given(PRINTABLE, PRINTABLE, PRINTABLE)
@example(HOSTILE, HOSTILE, HOSTILE)
@example("{token}", "---", "`")
@example(" 0", "0 ", " ")
@example('"', "'", "\\")
@example("$(reboot)", "`reboot`", "x`` ` ```y")
@example("sks", "mug", "stabilityai/stable-diffusion-xl-base-1.0")
def test_any_words_give_the_same_page(token, word, model):
    """Rendered, the page has the tags of a harmless one, and shows the words letter by letter; so does its YAML.

    A base model that can be no id of the Hub, which would refuse the card for it, is on the page alone.
    """
    _, front, body = card(token, word, model).split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta.get("base_model") == (model if HUB_ID.fullmatch(model) else None)
    assert meta["instance_prompt"] == f"a photo of {token} {word}"

    def tags(text: str) -> list[str]:
        return re.findall(r"</?[a-z0-9]+", MarkdownIt().enable("table").render(text))

    assert tags(body) == tags(card("sks", "mug", "tiny").split("---\n", 2)[2])


@pytest.mark.parametrize("lora", [None, LoraHeader(rank=2, alpha=2)], ids=["alone", "with LoRA"])
def test_a_control_is_no_coeff_tuning(lora):
    """Mixed values could be merged into weights, so the card must not say what it says of mixed maps."""
    control, real = (card("sks", "mug", "tiny", mixes, lora) for mixes in ("values", "maps"))
    assert "Not Coeff-Tuning but a control" in control and ", mixing values)" in control
    assert "cannot be merged" not in control
    assert "Not Coeff-Tuning" not in real and "cannot be merged" in real
