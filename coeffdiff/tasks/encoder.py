"""A pre-trained transformer as an encoder of pictures or texts: any of transformers, by hub id or folder.

Its last hidden states, pooled over the tokens and brought to unit root mean square, are the features that a linear head
classifies. Of models with two towers the picture's or the text's is taken, of encoder-decoders the encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from coeffdiff.errors import ConfigError, ModelError
from coeffdiff.hosts.any_model.attention_layers import select_layers
from coeffdiff.models.finding import encoder_folder
from coeffdiff.pocket import POCKET_CLIP, POCKET_DINO, shipped
from coeffdiff.tasks.examples import Example, Kind
from coeffdiff.utils.console import quiet_libraries
from coeffdiff.utils.hashing import hash_tensors
from coeffdiff.utils.own_memory import own_memory
from coeffdiff.utils.text import first_line

Inputs = dict[str, Tensor]
Pooling = Literal["first", "mean"]
LONGEST = 512  # tokens of a text
_FIRST_TOKENS = ("cls_token", "class_embedding")
_TROUBLES = (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class Encoder:
    """A frozen transformer in eval mode. processor: its image processor or tokenizer; width: of its features; digest:
    of its weights."""

    name: str
    kind: Kind
    network: Any
    processor: Any
    pooling: Pooling
    width: int
    digest: str

    def inputs(self, examples: Sequence[Example]) -> Inputs:
        """What the network takes, [N, ...] each; texts are cut at LONGEST tokens or what the network reads.

        Raises: ConfigError for a text of which the tokenizer makes no token, PhotoError for a file that has changed.
        """
        return _inputs(self.name, self.kind, self.processor, examples)


def _inputs(name: str, kind: Kind, processor: Any, examples: Sequence[Example]) -> Inputs:
    contents: Any = [example.content() for example in examples]
    if kind == "images":
        return {"pixel_values": processor(contents, return_tensors="pt")["pixel_values"]}
    found = dict(processor(contents, padding=True, truncation=True, return_tensors="pt"))
    empty = (found["attention_mask"].sum(dim=1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ConfigError(
            f"The tokenizer of {name} makes no token of the text {contents[empty[0]][:80]!r}: take it out."
        )
    return found


def _ends_one_of(name: str, names: tuple[str, ...]) -> bool:
    return any(one == name or one.endswith(f".{name}") for one in names)


def chosen(inputs: Inputs, rows: Tensor, device: torch.device) -> Inputs:
    """Some rows of inputs, without the columns that are padding in all of them."""
    some = {name: values[rows] for name, values in inputs.items()}
    if "attention_mask" in some:
        used = some["attention_mask"].any(dim=0)
        some = {name: values[:, used] for name, values in some.items()}
    return {name: values.to(device) for name, values in some.items()}


def features(network: Any, inputs: Inputs, pooling: Pooling) -> Tensor:
    """[B, D] float32 of unit root mean square: the first token's state, or the mean over those that are not padding."""
    states = network(**inputs).last_hidden_state
    if pooling == "first":
        pooled = states[:, 0]
    elif "attention_mask" in inputs:
        mask = inputs["attention_mask"][..., None].to(states.dtype)
        pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
    else:
        pooled = states.mean(dim=1)
    return F.normalize(pooled.float(), dim=-1) * pooled.shape[-1] ** 0.5


def load_encoder(name: str, like: Example, device: torch.device) -> Encoder:
    """An encoder by hub id or folder, or pocket-dino or pocket-clip; in float32.

    like: an example, which it is tried on.
    Raises: ModelError if there is none, it lacks weights, or it takes something else; InjectionError if it has no
        attention layers that alpha can reach.
    """
    kind: Kind = "images" if like.photo else "texts"
    folder = shipped(name) if name in (POCKET_DINO, POCKET_CLIP) else encoder_folder(name)
    with quiet_libraries():
        from transformers import AutoModel

        try:
            whole, report = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            network = own_memory(_tower(name, whole, kind))
            processor = _processor(folder, network, kind)
        except _TROUBLES as error:
            raise ModelError(f"The model {name} cannot be loaded: {first_line(error)}.") from error
    absent = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if absent:
        raise ModelError(
            f"The weights of {name} lack {absent[0]} and {len(absent) - 1} others, so it is not pre-trained."
        )
    network.requires_grad_(False).eval().to(device)
    select_layers(network, "all")  # now, not when the first alpha is to train
    digest = hashlib.sha256()
    # A pooler that the files lack is random in each process; no feature comes from it
    random = tuple(report["missing_keys"])
    held = [(key, one) for key, one in network.state_dict().items() if not _ends_one_of(key, random)]
    hash_tensors(digest, sorted(held))
    pooling = _pooling(network, kind)
    width = _width(name, network, _inputs(name, kind, processor, [like]), pooling)
    return Encoder(name, kind, network, processor, pooling, width, digest.hexdigest())


def _width(name: str, network: Any, inputs: Inputs, pooling: Pooling) -> int:
    """Of the features. Raises: ModelError if the network makes none of such inputs."""
    device = next(network.parameters()).device
    try:
        with torch.no_grad():
            found = features(network, chosen(inputs, torch.arange(1), device), pooling)
    except (*_TROUBLES, IndexError) as error:
        raise ModelError(
            f"The model {name} ({type(network).__name__}) makes no hidden states of one example: {first_line(error)}."
        ) from error
    if found.dim() != 2 or not found.isfinite().all():
        raise ModelError(
            f"The model {name} ({type(network).__name__}) makes no finite features [1, D] of one example, but "
            f"{list(found.shape)}."
        )
    return found.shape[1]


def _tower(name: str, whole: Any, kind: Kind) -> Any:
    """The part of a model that takes this kind of input. Raises: ModelError if there is none."""
    wanted = "pixel_values" if kind == "images" else "input_ids"
    tower = getattr(whole, "vision_model" if kind == "images" else "text_model", None)
    network = tower if tower is not None else whole
    if getattr(whole.config, "is_encoder_decoder", False):
        network = whole.get_encoder()
    if network.main_input_name != wanted:
        takes = {"pixel_values": "pictures", "input_ids": "texts"}.get(
            network.main_input_name, "something else"
        )
        raise ModelError(
            f"The model {name} ({type(whole).__name__}) takes {takes}, and the examples are "
            f"{'pictures' if kind == 'images' else 'texts'}: name a model for those."
        )
    if getattr(network, "use_head", False):
        # SigLIP's pooling over the last hidden states, which are what is read here; alpha could not reach it
        network.use_head = False
        del network.head
    return network


def _processor(folder: Any, network: Any, kind: Kind) -> Any:
    if kind == "images":
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(folder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    positions = getattr(network.config, "max_position_embeddings", LONGEST)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions, LONGEST)
    return tokenizer


def _pooling(network: Any, kind: Kind) -> Pooling:
    """The class token where pictures have one; of texts, and of pictures without one, the mean."""
    if kind == "images" and any(
        key.rpartition(".")[2] in _FIRST_TOKENS for key, _ in network.named_parameters()
    ):
        return "first"
    return "mean"
