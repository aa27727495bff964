"""The learned word in prompts of a real ComfyUI, as diffusers reads it."""

from __future__ import annotations

import pytest
import torch
from comfyui_twins import relative

from coeffdiff.errors import AdapterError
from comfyui_host import comfyui_folder

pytestmark = pytest.mark.skipif(comfyui_folder() is None, reason="COMFYUI names no ComfyUI")


def encoded(clip, text):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


PROMPTS = (
    "a photo of ohwx  toy, OHWX; in the\nsnow",
    "ohwxy is another word",
    "ohwx",
    "",
    "caf\u00e9 ohwx \u732b " + "very " * 60,
)


def test_the_learned_word_works_in_a_prompt(small, texts, make_rows, tmp_path):
    """Both text embeddings and the pooled one, as diffusers has them: whole words only, in any case."""
    from coeffdiff.hosts.comfyui.loading import apply_adapter
    from coeffdiff.hosts.diffusers import load_adapter
    from narrow_sdxl import make_adapter

    clip, pipe = texts
    path = make_adapter(tmp_path / "a", small.unet, kind="coeff+token", rows=make_rows(3, seed=1))
    plain = [encoded(clip, text) for text in PROMPTS]
    _, changed = apply_adapter(small.model, clip, path)
    adapter = load_adapter(pipe, path)
    for text, (before, _) in zip(PROMPTS, plain, strict=True):
        with torch.no_grad():
            wanted, _, pooled, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
        made, made_pooled = encoded(changed, text)
        assert relative(made, wanted) < 1e-5 and relative(made_pooled, pooled) < 1e-5, text
        assert torch.equal(made, before) == ("ohwx" not in text.lower().replace("ohwxy", "")), text
        assert torch.equal(encoded(clip, text)[0], before)  # the CLIP that was given
    adapter.remove()


def test_weights_of_prompts_and_several_words(small, texts, make_rows, tmp_path):
    """(ohwx:1.3) weighs the vectors as ComfyUI does; two adapters' words stand side by side, the longer one first."""
    from coeffdiff.hosts.comfyui.token import add_token

    clip, _ = texts
    one, two = make_rows(2, seed=1), make_rows(1, seed=2)
    both = add_token(add_token(clip, "ohwx", one, "one"), "my ohwx", two, "two")
    read = both.tokenize("a (my ohwx:1.3) ohwx")["l"][0]
    assert [weight for _, weight in read[1:5]] == [1.0, 1.3, 1.0, 1.0]
    vectors = [token for token, _ in read if torch.is_tensor(token)]
    torch.testing.assert_close(torch.stack(vectors), torch.cat([two["clip_l"], one["clip_l"]]))
    with pytest.raises(
        AdapterError, match="learned token 'OHWX', which another adapter in this chain has as well"
    ):
        add_token(both, "OHWX", one, "three")
