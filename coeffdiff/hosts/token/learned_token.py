"""A learned token on a pipeline: new rows behind its text encoders' embedding matrices, read by its tokenizers.

The encoders' own matrices are never written to, nor what the pipeline's tokenizers read with (which cannot un-add a
token): the rows live in a module around the matrix, the word in a copy of the tokenizer's backend, and removal puts the
originals back. Encoders and tokenizers stay the same objects, so that all pipelines that share them read alike.
Letters: N vectors of the token, D width of an encoder.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coeffdiff.errors import AdapterError, AdapterMismatch, InjectionError
from coeffdiff.hosts.guard import gate, ungate, unwrapped
from coeffdiff.hosts.token.vocabulary import original, read_with, refuse_saving
from coeffdiff.method.adapter_header import PARTS
from coeffdiff.method.families import family_of

_POOLS_AT_HIGHEST = 2  # as eos_token_id: "the highest id of a text is its end", which an added id would be


class ExtendedEmbedding(nn.Module):
    """An encoder's token embedding with the rows of learned tokens behind it.

    The matrix comes first among the parameters, so that the encoder's dtype and device stay those of the matrix;
    the rows may be float32 beside a matrix in half precision.
    """

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base = base
        self.learned = nn.ModuleDict()  # name of an adapter -> its rows, an nn.Embedding
        self.tokens: dict[str, str] = {}
        self.off: set[str] = set()  # kept, but no text leads to them
        self.first: dict[str, int] = {}  # id of each token's first row
        self.pooled_at: int | None = None  # the encoder's eos_token_id as it was
        self.tokenizer: Any = None  # which leads to these rows
        self.reader: Any = None  # its backend, as long as nothing else has changed it

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D] in the matrix's dtype."""
        embedded = self.base(ids.masked_fill(ids >= min(self.first.values(), default=2**31), 0))
        for name, first in self.first.items():
            rows = self.learned[name]
            own = (ids >= first) & (ids < first + rows.num_embeddings)
            learned = rows((ids - first).clamp(0, rows.num_embeddings - 1)).to(embedded.dtype)
            embedded = torch.where(own[..., None], learned, embedded)
        return embedded

    def __getattr__(self, name: str) -> Any:
        # diffusers' load_textual_inversion and transformers' resize_token_embeddings ask for it, to replace it
        if name == "weight":
            raise EmbeddingInUse(
                "This text encoder holds a learned token, so its embeddings cannot be resized or written to, as "
                "load_textual_inversion does. Load textual inversions first and the adapter after them."
            )
        return super().__getattr__(name)


class EmbeddingInUse(InjectionError, AttributeError):  # noqa: N818
    """An AttributeError as well, so that hasattr answers no."""


class _Extended:
    """A text encoder that a token was added to, with its tokenizer, wherever the pipeline has put them since.

    The encoder is held weakly, since pipelines drop theirs to free memory. A deep copy means its copy, or none.
    """

    def __init__(self, encoder: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.encoder: Any = None if encoder is None else weakref.ref(encoder)

    def __call__(self) -> Any:
        return self.encoder and self.encoder()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Extended:
        return _Extended(memo.get(id(self())), copy.deepcopy(self.tokenizer, memo))

    def __reduce__(self) -> Any:
        return _Extended, (self(), self.tokenizer)


class TokenPart:
    """A learned token for the guard: whether the pipeline that it was loaded on still reads it."""

    on = False  # a token has no scale

    def __init__(self, pipe: Any, name: str, label: str) -> None:
        self.pipe, self.name, self.label = pipe, name, label

    def problem(self) -> str:
        if torch.compiler.is_compiling():  # a pipeline's call has looked already
            return ""
        for key, encoder, tokenizer in _parts(self.pipe):
            if encoder is None:  # its work is done
                continue
            embedding = encoder.get_input_embeddings()
            held = isinstance(embedding, ExtendedEmbedding) and self.name in embedding.tokens
            if not held or getattr(tokenizer, "_tokenizer", None) is not embedding.reader:
                part = PARTS[key][1 if held else 0]
                return (
                    f"The learned token of {self.label} is gone: this pipeline's {part} has been replaced since. Put "
                    "the other back, or load the adapter again."
                )
        return ""


def add_token(
    pipe: Any, token: str, rows: Mapping[str, Tensor], name: str = "default", *, origin: str = "the token"
) -> dict[str, nn.Parameter]:
    """Let `token` mean `rows` in every text that this pipeline reads; in training, the parameters to train.

    The word is found as a whole word in any case ("sks" in "SKS, seen", not in "sksx"), and stands for N tokens.

    Args:
        pipe: a pipeline with tokenizers and text encoders.
        rows: {"clip_l": [N, D], "clip_g": [N, D]}, of every encoder that its family has; copied as float32 to the
            encoders' device.
        origin: where the rows come from, for the messages.
    Returns: the new parameters by the same keys.
    Raises: AdapterError if the pipeline has no text encoders or the word cannot be made a token;
        AdapterMismatch if the rows are of another width. The pipeline is then as before.
    """
    for key, encoder, tokenizer in _parts(pipe):
        if encoder is None or not hasattr(tokenizer, "backend_tokenizer"):
            raise AdapterError(
                f"{origin} has a learned token, which lives in the text encoders, and this pipeline has not all "
                "of them with their tokenizers; load the adapter on a whole pipeline."
            )
        width = encoder.config.hidden_size
        if rows[key].ndim != 2 or rows[key].shape[1] != width:
            raise AdapterMismatch(
                f"{origin} has a learned token of shape {tuple(rows[key].shape)} for {key}, but this model's "
                f"{PARTS[key][0]} has embeddings of width {width}. It belongs to another model."
            )
    parameters = {}
    added = _registry(pipe)[name] = []
    for key, encoder, tokenizer in _parts(pipe):
        embedding = encoder.get_input_embeddings()
        if not isinstance(embedding, ExtendedEmbedding):
            embedding = ExtendedEmbedding(embedding)
            encoder.set_input_embeddings(embedding)
        embedding.tokenizer = tokenizer
        added.append(_Extended(unwrapped(encoder), tokenizer))
        values = rows[key].detach().to(embedding.base.weight.device, torch.float32, copy=True)
        embedding.learned[name] = nn.Embedding.from_pretrained(values, freeze=True)
        embedding.tokens[name] = token
        parameters[key] = embedding.learned[name].weight
    try:
        for encoder in encoders_with(pipe, name):
            _update(encoder)
        verify_token(pipe, name)
    except InjectionError:
        remove_token(pipe, name)
        raise AdapterError(
            f"{origin}: the tokenizers cannot read {token!r} as one word; train with another --token."
        ) from None
    return parameters


def token_name(adapter: str, number: int) -> str:
    """The name of one of an adapter's learned tokens, counted from 0."""
    return f"{adapter}_{number}" if number else adapter


def remove_token(pipe: Any, name: str = "default") -> None:
    """Take one learned token off; after the last one encoders and tokenizers are as they were.

    Also those that the pipeline has put away since: they are what it was added to, wherever they are now.
    """
    for encoder in encoders_with(pipe, name):
        embedding = encoder.get_input_embeddings()
        del embedding.learned[name], embedding.tokens[name]
        embedding.off.discard(name)
        _update(encoder)
    for extended in _registry(pipe).pop(name, ()):
        if extended() is None:  # its rows went with it
            read_with(extended.tokenizer, ())
    if not _registry(pipe):
        del pipe._coeffdiff_extended


def switch_token(pipe: Any, name: str, on: bool) -> None:
    """Switch a token on or off. Off, texts are read as if it had never been learned; its rows are kept."""
    for encoder in encoders_with(pipe, name):
        embedding = encoder.get_input_embeddings()
        if (name in embedding.off) == on:
            (embedding.off.discard if on else embedding.off.add)(name)
            _update(encoder)


def encoders_with(pipe: Any, name: str) -> list[Any]:
    """The text encoders that hold a token which was added to this pipeline, on it or put away, outside of wrappers."""
    found = [encoder for extended in _registry(pipe).get(name, ()) if (encoder := extended()) is not None]
    return [encoder for encoder in found if name in _tokens_of(encoder)]


def names_on(pipe: Any) -> set[str]:
    """The names of all tokens on this pipeline's text encoders, whichever pipeline they were added to."""
    return {name for _, encoder, _ in _parts(pipe) if encoder is not None for name in _tokens_of(encoder)}


def verify_token(pipe: Any, name: str = "default") -> None:
    """Raise InjectionError unless the token's word leads to its rows in each text encoder that the pipeline has."""
    for _, encoder, tokenizer in _parts(pipe):
        if encoder is None:  # its work is done: prompts were encoded before
            continue
        embedding = encoder.get_input_embeddings()
        token, wanted = "", []
        if isinstance(embedding, ExtendedEmbedding) and name in embedding.first:
            token, first = embedding.tokens[name], embedding.first[name]
            wanted = list(range(first, first + embedding.learned[name].num_embeddings))
        if not token or tokenizer is None or tokenizer(token, add_special_tokens=False).input_ids != wanted:
            what = f"The learned token {token!r}" if token else "A learned token"
            raise InjectionError(
                f"{what} is gone from this pipeline's text encoders or tokenizers: something replaced them. Load the "
                "adapter again, on the pipeline that encodes the prompts."
            )


def _parts(pipe: Any) -> list[tuple[str, Any, Any]]:
    """Key, text encoder and tokenizer of each that the family has, None where the pipeline lacks one."""
    encoders = family_of(pipe).encoders
    return [(e.key, getattr(pipe, e.network, None), getattr(pipe, e.tokenizer, None)) for e in encoders]


def _tokens_of(encoder: Any) -> dict[str, str]:
    embedding = encoder.get_input_embeddings()
    return embedding.tokens if isinstance(embedding, ExtendedEmbedding) else {}


def _registry(pipe: Any) -> dict[str, list[_Extended]]:
    """What each token was added to, by the token's name; kept on the pipeline."""
    if not hasattr(pipe, "_coeffdiff_extended"):
        pipe._coeffdiff_extended = {}
    registry: dict[str, list[_Extended]] = pipe._coeffdiff_extended
    return registry


def _update(encoder: Any) -> None:
    """Set tokenizer, ids and pooling for the tokens that are loaded and on; the originals where there are none."""
    embedding = encoder.get_input_embeddings()
    tokenizer = embedding.tokenizer
    on = {name: len(embedding.learned[name].weight) for name in embedding.tokens if name not in embedding.off}
    start = len(original(tokenizer))
    embedding.first = {}
    for name, vectors in on.items():
        embedding.first[name], start = start, start + vectors
    read_with(tokenizer, [(embedding.tokens[name], vectors) for name, vectors in on.items()])
    embedding.reader = tokenizer._tokenizer
    pooling = next(module for module in encoder.modules() if "eos_token_id" in vars(module))
    if on and pooling.eos_token_id == _POOLS_AT_HIGHEST:
        embedding.pooled_at, pooling.eos_token_id = pooling.eos_token_id, tokenizer.eos_token_id
    elif not on and embedding.pooled_at is not None:
        pooling.eos_token_id, embedding.pooled_at = embedding.pooled_at, None
    if embedding.tokens:
        gate(encoder, "save_pretrained", refuse_saving)
    else:
        encoder.set_input_embeddings(embedding.base)
        ungate(encoder, "save_pretrained")
