"""What is said of a token before a run: how it is read, and what it already means."""

from __future__ import annotations

import pytest
from transformers import CLIPTokenizer

from coeffdiff.models.subject_token import KNOWN, PROPOSED, caption_findings, holds, token_findings
from coeffdiff.pocket.tokenizers import BEGIN, END, byte_symbols, tokenizer_pair

# Where CLIP's own vocabulary has these words, of 49,408.
CLIP_IDS = {
    "subject": 10_300,
    "dog": 1_929,
    "ohwx": 47_993,
    "sks": 48_136,
    "jekyll": 49_405,
    "my": 607,
    "wx": 3_561,
}


def merged(word: str) -> list[tuple[str, str]]:
    """Merges that make one token of a word, from its left."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    return [("".join(pieces[:i]), pieces[i]) for i in range(1, len(pieces))]


@pytest.fixture(scope="module")
def clip():
    """A tokenizer of CLIP's size that has the words above at their places, and nothing between them."""
    symbols = byte_symbols()
    known = {word: number for number, word in enumerate([*symbols, *(symbol + "</w>" for symbol in symbols)])}
    merges = []
    for word in CLIP_IDS:
        for pair in merged(word):
            merges.append(pair)
            known.setdefault("".join(pair), 512 + len(known))
    # A token that begins "mysubject1" and is no word of its own.
    merges.append(("m", "y"))
    known.setdefault("my", 1_152)
    for word, number in CLIP_IDS.items():
        known[f"{word}</w>"] = number
    taken = set(known.values())
    free = (number for number in range(49_406) if number not in taken)
    known |= {f"<filler {number}>": number for number in free}
    known |= {BEGIN: 49_406, END: 49_407}
    return CLIPTokenizer(vocab=known, merges=merges, pad_token=END, model_max_length=77)


@pytest.fixture(scope="module")
def own():
    """Tokenizers of a small world, as pocket has them."""
    return tokenizer_pair(["red", "mug", "dog", "photo"])


def test_sks_is_a_rifle(clip):
    """Our own example: said, with its place in the vocabulary and what would be better."""
    (line,) = token_findings([clip, clip], "sks", "stuffed animal")
    assert line == (
        "sks is read as one token, number 48,136 of 49,408 by frequency, and it already means a rifle to the model; "
        "ohwx or zwx would be better, or --learn-token"
    )
    (line,) = token_findings([clip, clip], "<SKS>")
    assert "< + sks + >" in line and "sks already means a rifle" in line


@pytest.mark.parametrize("token", PROPOSED)
def test_what_is_proposed_passes_the_check(clip, own, token):
    """In CLIP's vocabulary and in a small one; nothing that is proposed is known to mean something."""
    assert token not in KNOWN
    for tokenizers in ([clip, clip], own):
        (line,) = token_findings(tokenizers, token, "mug")
        assert "means" not in line and "better" not in line


@pytest.mark.parametrize("token", ["dog", "jekyll"])
def test_a_word_of_clip_means_something(clip, token):
    """A frequent one, and a rare one that is long enough to be a word."""
    (line,) = token_findings([clip], token)
    assert f"number {CLIP_IDS[token]:,} of 49,408" in line and "already means something" in line


def test_a_rare_short_token_is_fit(clip):
    assert token_findings([clip], "ohwx") == [
        "ohwx is read as one token, number 47,993 of 49,408 by frequency, not known to mean anything that is seen"
    ]


def test_pieces_are_named_and_words_among_them(clip, own):
    """mysubject1: "subject" is a word; in a small vocabulary it falls into letters, too many to be worth it."""
    (line,) = token_findings([clip], "mysubject1")
    assert "3 tokens, my + subject + 1, and subject means something already" in line
    (line,) = token_findings(own, "mysubject1")
    assert "10 tokens" in line and "of the 75 that a prompt has room for" in line
    (line,) = token_findings(own, "sks")
    assert line == "sks is read as 3 tokens, s + k + s, none of them a word that is known"


def test_a_word_that_a_small_world_knows_is_said(own):
    """And the class word itself, which would turn the whole class into the subject."""
    (line,) = token_findings(own, "red", "mug")
    assert "red is read as one token, and it already means something" in line
    lines = token_findings(own, "mug", "mug")
    assert len(lines) == 2 and 'mug is the class word: every "mug" would become the subject' in lines[1]
    assert "part of the class word" in token_findings(own, "dog", "big dog")[1]


def test_a_learned_token_needs_less(own, clip):
    """However it would be split, it is read as one; only that it shadows a word is worth saying."""
    assert token_findings(own, "mysubject1", "mug", learned=True) == [
        "mysubject1 is learned: it gets embeddings of its own, in both text encoders"
    ]
    lines = token_findings([clip], "dog", learned=True)
    assert len(lines) == 2 and "with the adapter loaded it means the subject in every prompt" in lines[1]


def test_tokenizers_that_differ_are_both_heard(clip, own):
    class Pipe:
        tokenizer, tokenizer_2 = clip, own[0]

    first, second = token_findings(Pipe(), "sks")
    assert first.startswith("sks is read by text encoder 1 as one token")
    assert second.startswith("sks is read by text encoder 2 as 3 tokens")


def test_photos_whose_captions_lack_the_token_are_named():
    captions = {"a.jpg": ("a photo of SKS dog",), "b.jpg": ("a dog",), "c.jpg": ("sks", "sksy")}
    assert caption_findings(captions, "sks") == [
        "b.jpg, c.jpg have captions without sks: what they show is not tied to it; write sks or <V> there"
    ]
    many = caption_findings({f"{i}.jpg": ("a dog",) for i in range(7)}, "sks")[0]
    assert "4.jpg and 2 more" in many
    assert caption_findings({"a.jpg": ("a photo of sks dog",)}, "sks") == []


@pytest.mark.parametrize(("text", "found"), [("SKS!", True), ("sksy", False), ("a [V] dog", False)])
def test_a_token_is_a_word_of_its_own(text, found):
    assert holds(text, "sks") == found
    assert holds("a [V] dog", "[V]")
