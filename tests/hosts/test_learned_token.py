"""A learned token: read where its word stands, nowhere else, pooled rightly, and gone without a trace."""

from __future__ import annotations

import copy
import gc
import weakref

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from safetensors.torch import load_file

from coeffdiff.errors import AdapterError, AdapterMismatch, ConfigError, InjectionError
from coeffdiff.hosts.token.learned_token import (
    ExtendedEmbedding,
    add_token,
    remove_token,
    switch_token,
    verify_token,
)
from coeffdiff.hosts.token.rows import initial_rows, pull_norms
from coeffdiff.hosts.token.vocabulary import _FIRST_PRIVATE, announce_tokens
from coeffdiff.method.adapter_file import save_rows
from coeffdiff.method.adapter_header import MOST_VECTORS
from coeffdiff.method.adapter_paths import EMBEDS_FILE

WIDTHS = {
    "clip_l": 20,
    "clip_g": 28,
}  # of the tiny model, whose vocabulary has 514 entries, the last ends a text
END = 513


@pytest.fixture
def pipe(micro_pipeline):
    return micro_pipeline


def drawn(vectors: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(vectors, width, generator=generator) for key, width in WIDTHS.items()}


def encoded(pipe, *texts: str) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(list(texts), do_classifier_free_guidance=False)
    return embeds, pooled


def ids_of(pipe, text: str) -> list[int]:
    return pipe.tokenizer(text, add_special_tokens=False).input_ids


def state_of(pipe):
    """All that a learned token may touch, to be compared by identity and value."""
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    return (
        [pipe.tokenizer, pipe.tokenizer_2, *(encoder.get_input_embeddings() for encoder in encoders)],
        [len(pipe.tokenizer), len(pipe.tokenizer_2)],
        [pipe.text_encoder.eos_token_id, pipe.text_encoder_2.text_model.eos_token_id],
        [{k: t.clone() for k, t in encoder.state_dict().items()} for encoder in encoders],
    )


def assert_untouched(pipe, before) -> None:
    parts, lengths, ends, weights = state_of(pipe)
    assert all(one is other for one, other in zip(parts, before[0], strict=True))
    assert lengths == [514, 514] and ends == [2, 2]
    for now, then in zip(weights, before[3], strict=True):
        assert now.keys() == then.keys() and all(torch.equal(now[key], then[key]) for key in then)


@pytest.mark.parametrize("vectors", [1, 3])
def test_the_rows_stand_where_the_word_stands(pipe, vectors):
    """The embeddings of "a sks b" are those of "a", the rows in their order, those of "b": in both encoders."""
    rows = drawn(vectors)
    plain = [encoder.get_input_embeddings().weight for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    a, b = ids_of(pipe, "a")[0], ids_of(pipe, "b")[0]
    add_token(pipe, "sks", rows)
    ids = pipe.tokenizer("a sks b").input_ids
    assert ids[1] == a and ids[-2:] == [b, END] and len(ids) == 4 + vectors
    assert ids == pipe.tokenizer_2("a sks b").input_ids
    for encoder, matrix, key in zip((pipe.text_encoder, pipe.text_encoder_2), plain, WIDTHS, strict=True):
        found = encoder.get_input_embeddings()(torch.tensor([ids]))[0]
        assert torch.equal(found[2:-2], rows[key])
        assert torch.equal(found[[0, 1, -2, -1]], matrix[[ids[0], a, b, END]])


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("sks", 1),
        ("SKS, Sks.", 2),
        ("a photo of sks's", 1),
        ("sksy", 0),
        ("asks", 0),
        ("sks_1", 0),
        ("(sks)-sks", 2),
    ],
)
def test_the_word_is_found_whole_and_in_any_case(pipe, text, times):
    add_token(pipe, "Sks", drawn(2))
    assert sum(number >= 514 for number in ids_of(pipe, text)) == 2 * times


@pytest.mark.parametrize("token", ["<my dog>", "C++ (v2)", "été", "[V]", "a.b*"])
def test_any_word_can_be_learned(pipe, token):
    """Blanks, accents and what regular expressions would read as their own."""
    add_token(pipe, token, drawn(1))
    assert [number for number in ids_of(pipe, f"one {token} two") if number >= 514] == [514]


def test_texts_without_the_word_are_read_as_before(pipe):
    """Embeddings and pooled text bit for bit, and the encoder is still of its own dtype beside float32 rows."""
    pipe.text_encoder.bfloat16(), pipe.text_encoder_2.bfloat16()
    texts = ("a photo of a dog", "", "sksy and asks")
    before = encoded(pipe, *texts)
    add_token(pipe, "sks", drawn(2))
    assert pipe.text_encoder.dtype == pipe.text_encoder_2.dtype == torch.bfloat16
    assert pipe.text_encoder.get_input_embeddings().learned["default"].weight.dtype == torch.float32
    assert all(torch.equal(now, then) for now, then in zip(encoded(pipe, *texts), before, strict=True))
    assert encoded(pipe, "a sks")[0].isfinite().all()


@pytest.mark.parametrize("vectors", [1, 3])
def test_the_pooled_text_is_that_of_its_end(pipe, vectors):
    """By hand: the last hidden state where 513 stands first, projected. An id above it would be pooled instead."""
    add_token(pipe, "sks", drawn(vectors))
    ids = torch.tensor([pipe.tokenizer_2("a photo of sks", padding="max_length").input_ids])
    end = ids[0].tolist().index(END)
    with torch.no_grad():
        hidden = pipe.text_encoder_2.text_model(ids).last_hidden_state
        expected = pipe.text_encoder_2.text_projection(hidden[:, end])
        _, pooled = encoded(pipe, "a photo of sks")
        torch.testing.assert_close(pooled, expected, rtol=0, atol=0)
        wrong = pipe.text_encoder_2.text_projection(hidden[:, ids[0].argmax()])
    assert not torch.allclose(pooled, wrong, atol=0.01)


def test_removal_gives_everything_back(pipe):
    """The very tokenizers and matrices, their lengths, the pooling and every weight; several in any order."""
    before = state_of(pipe)
    for order in (("one", "two"), ("two", "one")):
        add_token(pipe, "sks", drawn(2), "one")
        add_token(pipe, "ohwx", drawn(1, seed=1), "two")
        assert len(ids_of(pipe, "sks ohwx")) == 3 and pipe.text_encoder.eos_token_id == END
        for name in order:
            remove_token(pipe, name)
        assert_untouched(pipe, before)


def test_several_tokens_keep_their_own_rows(pipe):
    """Also when the one before goes; and of two words the longer is read first, whoever came first."""
    alone, with_blank = drawn(2, seed=1), drawn(1, seed=2)
    reference = copy.deepcopy(pipe)
    add_token(reference, "my sks", with_blank)
    expected = encoded(reference, "a my sks")
    add_token(pipe, "ohwx", drawn(3), "first")
    add_token(pipe, "sks", alone, "second")
    add_token(pipe, "my sks", with_blank, "third")
    assert len(ids_of(pipe, "ohwx sks my sks")) == 3 + 2 + 1
    remove_token(pipe, "first")
    for now, then in zip(encoded(pipe, "a my sks"), expected, strict=True):
        assert torch.equal(now, then)
    ids = torch.tensor(ids_of(pipe, "sks"))
    assert torch.equal(pipe.text_encoder.get_input_embeddings()(ids), alone["clip_l"])
    for name in ("second", "third"):
        verify_token(pipe, name)


def test_a_token_that_is_off_is_an_ordinary_word(pipe):
    """And its rows are there when it is switched on again."""
    before, plain = state_of(pipe)[0][:2], encoded(pipe, "a sks")
    add_token(pipe, "sks", drawn(2))
    learned = encoded(pipe, "a sks")
    assert not torch.equal(learned[1], plain[1])
    switch_token(pipe, "default", on=False)
    assert [pipe.tokenizer, pipe.tokenizer_2] == before and pipe.text_encoder.eos_token_id == 2
    assert all(torch.equal(now, then) for now, then in zip(encoded(pipe, "a sks"), plain, strict=True))
    switch_token(pipe, "default", on=True)
    assert all(torch.equal(now, then) for now, then in zip(encoded(pipe, "a sks"), learned, strict=True))


@pytest.mark.parametrize("vectors", [1, 3])
def test_plain_diffusers_reads_the_file(pipe, tmp_path, vectors):
    """load_textual_inversion, key by key: the same embeddings, and with the end's id told the same pooled text."""
    rows, other = drawn(vectors), copy.deepcopy(pipe)
    save_rows(tmp_path, rows)
    add_token(pipe, "sks", rows)
    state = load_file(tmp_path / EMBEDS_FILE)
    parts = (
        ("clip_l", other.text_encoder, other.tokenizer),
        ("clip_g", other.text_encoder_2, other.tokenizer_2),
    )
    for key, encoder, tokenizer in parts:
        other.load_textual_inversion(state[key], token="sks", text_encoder=encoder, tokenizer=tokenizer)
    ours, theirs = encoded(pipe, "a photo of sks"), encoded(other, "a photo of sks")
    torch.testing.assert_close(theirs[0], ours[0])
    assert not torch.allclose(theirs[1], ours[1], atol=0.01)  # pooled at the new id
    for _, encoder, tokenizer in parts:  # as the model card says
        getattr(encoder, "text_model", encoder).eos_token_id = tokenizer.eos_token_id
    torch.testing.assert_close(encoded(other, "a photo of sks")[1], ours[1])


def test_only_the_rows_have_a_gradient(pipe):
    """Of a text with the word in both encoders; of one without it a gradient of zeros, and none anywhere else."""
    rows = add_token(pipe, "sks", drawn(2))
    for network in (pipe.text_encoder, pipe.text_encoder_2):
        network.requires_grad_(False)
    for parameter in rows.values():
        parameter.requires_grad_(True)
    for text, zero in (("a sks", False), ("a dog", True)):
        embeds, _, pooled, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
        (embeds.square().sum() + pooled.square().sum()).backward()
        for parameter in rows.values():
            assert (parameter.grad == 0).all() == zero
            parameter.grad = None
    every = [*pipe.text_encoder.parameters(), *pipe.text_encoder_2.parameters()]
    assert sum(parameter.requires_grad for parameter in every) == 2
    assert all(parameter.grad is None for parameter in every)


def test_a_token_begins_as_the_words_of_a_text(pipe):
    """ "ab c" is 3 tokens here: one vector is their mean with the mean of their norms, three are themselves."""
    ids = ids_of(pipe, "ab c")
    for key, encoder in (("clip_l", pipe.text_encoder), ("clip_g", pipe.text_encoder_2)):
        words = encoder.get_input_embeddings().weight[ids]
        torch.testing.assert_close(initial_rows(pipe, "ab c", 3)[key], words)
        (one,) = initial_rows(pipe, "ab c", 1)[key]
        torch.testing.assert_close(one / one.norm(), words.mean(0) / words.mean(0).norm())
        torch.testing.assert_close(one.norm(), words.norm(dim=1).mean())
        two = initial_rows(pipe, "ab c", 2)[key]
        torch.testing.assert_close(two[0], words[0])
        torch.testing.assert_close(two[1] / two[1].norm(), words[1:].mean(0) / words[1:].mean(0).norm())
        five = initial_rows(pipe, "ab c", 5)[key]
        torch.testing.assert_close(five, words[[0, 0, 1, 1, 2]])
    learned = initial_rows(pipe, "sks", 1)
    add_token(pipe, "sks", drawn(1))
    assert torch.equal(initial_rows(pipe, "sks", 1)["clip_l"], learned["clip_l"])  # of the plain word still
    with pytest.raises(ConfigError, match="holds no token"):
        initial_rows(pipe, " ", 1)


def test_lengths_are_drawn_back():
    """Length 4 that began as 1: by half on a logarithmic scale it is 2, wholly 1, not at all 4."""
    for strength, length in ((0.5, 2.0), (1.0, 1.0), (0.0, 4.0)):
        row = torch.tensor([[0.0, 4.0], [3.0, 0.0]])
        pull_norms([(row, torch.tensor([1.0, 3.0]))], strength)
        torch.testing.assert_close(row, torch.tensor([[0.0, length], [3.0, 0.0]]))


def test_a_token_survives_sequential_offload(pipe, monkeypatch):
    """Weights lie on the meta device between their uses; the rows are fetched like any other weight."""
    add_token(pipe, "sks", drawn(2))
    expected = encoded(pipe, "a sks")
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        accelerate.cpu_offload(encoder, torch.device("cpu"), offload_buffers=True)
    assert pipe.text_encoder.get_input_embeddings().learned["default"].weight.is_meta
    embeds, _, pooled, _ = pipe.encode_prompt(
        ["a sks"], device=torch.device("cpu"), do_classifier_free_guidance=False
    )
    assert torch.equal(embeds, expected[0]) and torch.equal(pooled, expected[1])
    remove_hook_from_module(pipe.text_encoder, recurse=True)


PARTS_OF_TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def put_away(pipe) -> dict:
    """As pipelines are kept small: the parts that read, which are None on the pipeline from now on."""
    away = {name: getattr(pipe, name) for name in PARTS_OF_TEXT}
    for name in away:
        setattr(pipe, name, None)
    return away


def put_back(pipe, away) -> None:
    for name, part in away.items():
        setattr(pipe, name, part)


def test_parts_that_the_pipeline_has_put_away_are_switched_and_restored(pipe):
    """None on the pipeline for a while, and back afterwards: they read as if they had been there."""
    before, plain = state_of(pipe), encoded(pipe, "a sks")
    add_token(pipe, "sks", drawn(2))
    learned = encoded(pipe, "a sks")
    for on, expected in ((False, plain), (True, learned)):
        away = put_away(pipe)
        switch_token(pipe, "default", on=on)
        put_back(pipe, away)
        assert all(torch.equal(now, then) for now, then in zip(encoded(pipe, "a sks"), expected, strict=True))
    away = put_away(pipe)
    remove_token(pipe)
    put_back(pipe, away)
    assert_untouched(pipe, before)
    assert all(torch.equal(now, then) for now, then in zip(encoded(pipe, "a sks"), plain, strict=True))


def test_removal_leaves_another_encoder_alone_and_restores_its_own(pipe):
    """In the place of the one that reads the token stands another by now."""
    before, another = state_of(pipe), copy.deepcopy(pipe.text_encoder)
    matrix = another.get_input_embeddings()
    add_token(pipe, "sks", drawn(2))
    pipe.text_encoder, own = another, pipe.text_encoder
    remove_token(pipe)
    assert another.get_input_embeddings() is matrix
    pipe.text_encoder = own
    assert_untouched(pipe, before)


def test_a_text_encoder_that_is_dropped_for_good_is_let_go(pipe):
    """Its memory is free again, and removal does without it."""
    add_token(pipe, "sks", drawn(2))
    gone = weakref.ref(pipe.text_encoder)
    pipe.text_encoder = None
    gc.collect()
    assert gone() is None
    remove_token(pipe)
    assert len(pipe.tokenizer) == len(pipe.tokenizer_2) == 514


def test_a_tokenizer_that_is_gone_is_named(pipe):
    add_token(pipe, "sks", drawn(1))
    pipe.tokenizer = None
    with pytest.raises(InjectionError, match="The learned token 'sks' is gone from this pipeline's"):
        verify_token(pipe)


def test_tokenizers_alone_can_count_a_token(pipe):
    """Before the text encoders are loaded: three vectors take three places."""
    pipe.text_encoder = pipe.text_encoder_2 = None
    announce_tokens(pipe, {"mysubject": 3})
    assert len(ids_of(pipe, "mysubject")) == 3


def test_what_replaces_the_token_is_noticed(pipe):
    """Another tokenizer, or an encoder with its own matrix: the word would be read as any other."""
    another = copy.deepcopy(pipe.tokenizer)
    add_token(pipe, "sks", drawn(1))
    verify_token(pipe)
    pipe.tokenizer, extended = another, pipe.tokenizer
    with pytest.raises(InjectionError, match="The learned token 'sks' is gone from this pipeline's"):
        verify_token(pipe)
    pipe.tokenizer = extended
    verify_token(pipe)
    pipe.text_encoder_2.set_input_embeddings(pipe.text_encoder_2.get_input_embeddings().base)
    with pytest.raises(InjectionError, match="A learned token is gone"):
        verify_token(pipe)


@pytest.mark.parametrize(
    ("token", "rows", "error", "sentence"),
    [
        (
            "sks",
            {"clip_l": torch.ones(1, 28), "clip_g": torch.ones(1, 28)},
            AdapterMismatch,
            "embeddings of width 20",
        ),
        (
            "sks",
            {"clip_l": torch.ones(20), "clip_g": torch.ones(1, 28)},
            AdapterMismatch,
            r"shape \(20,\) for clip_l",
        ),
        ("<|endoftext|>", drawn(1), AdapterError, "cannot read '<|endoftext|>' as one word"),
    ],
)
def test_what_cannot_be_a_token_is_refused(pipe, token, rows, error, sentence):
    """In one sentence, and the pipeline is as before."""
    before = state_of(pipe)
    with pytest.raises(error, match=sentence.replace("|", r"\|")):
        add_token(pipe, token, rows, origin="learned_embeds.safetensors")
    assert_untouched(pipe, before)


def test_a_pipeline_without_text_encoders_is_refused(pipe):
    pipe.text_encoder_2 = None
    with pytest.raises(AdapterError, match="this pipeline has not all of them"):
        add_token(pipe, "sks", drawn(1))
    assert not isinstance(pipe.text_encoder.get_input_embeddings(), ExtendedEmbedding)


def test_a_person_reads_no_private_characters_by_accident():
    """The characters that stand for vectors are in no text that a setting admits."""
    assert not chr(_FIRST_PRIVATE).isprintable()
    assert not chr(_FIRST_PRIVATE + MOST_VECTORS).isalnum()
