"""An encoder-decoder of transformers that reads pictures: their features, projected, stand before the question.

As in VL-BART (Cho et al., ICML 2021): a linear layer and a layer norm carry each feature to the width of the language
model, an embedding says which picture it is of, and the encoder reads the features as if they were words.

Shape letters: B questions, P pictures of a question at most, T features of a picture, D their width, E the language
model's, W words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coeffdiff.errors import ModelError
from coeffdiff.models.finding import encoder_folder
from coeffdiff.models.hub_errors import loading_errors
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.console import quiet_libraries
from coeffdiff.utils.own_memory import own_memory
from coeffdiff.utils.seeding import stable_seed

MOST_PICTURES = 8  # of one question
PROJECTION, NOTES = "projection.safetensors", "image_text.json"  # beside the language model's own files
DEFAULT_TOWER, DEFAULT_GRID = "openai/clip-vit-base-patch32", 6
LONGEST = 128  # tokens of a question or an answer; the rest is cut


class Projection(nn.Module):
    """Features of pictures to embeddings of the language model."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, embedding)
        self.norm = nn.LayerNorm(embedding)
        self.which = nn.Embedding(MOST_PICTURES, embedding)  # N(0, 1), as large as what the norm gives

    def forward(self, features: Tensor) -> Tensor:
        """[B, P, T, D] -> [B, P * T, E]."""
        places = torch.arange(features.shape[1], device=features.device)
        return (self.norm(self.linear(features)) + self.which(places)[None, :, None]).flatten(1, 2)


class ImageText(nn.Module):
    """A language model with its projection. The tower is not part of it: its features come in."""

    def __init__(self, language: Any, projection: Projection, tokenizer: Any) -> None:
        super().__init__()
        self.language = language
        self.projection = projection
        self.tokenizer = tokenizer

    def forward(
        self, features: Tensor, shown: Tensor, questions: Sequence[str], answers: Sequence[str]
    ) -> Tensor:
        """The loss: mean cross entropy of the answers' tokens.

        Args:
            features: [B, P, T, D].  shown: [B, P] bool, False where a question has fewer pictures than P.
            questions, answers: B texts.
        """
        inputs = self._inputs(features, shown, questions)
        labels = self._tokens(answers)
        targets = labels.input_ids.masked_fill(labels.attention_mask == 0, -100)
        loss: Tensor = self.language(**inputs, labels=targets).loss
        return loss

    @torch.no_grad()
    def answer(
        self, features: Tensor, shown: Tensor, questions: Sequence[str], longest: int = LONGEST
    ) -> list[str]:
        """The likeliest next token at each place (greedy), as text; arguments as in forward."""
        inputs = self._inputs(features, shown, questions)
        encoded = self.language.get_encoder()(**inputs, return_dict=True)
        with quiet_libraries():
            tokens = self.language.generate(
                encoder_outputs=encoded,
                attention_mask=inputs["attention_mask"],
                max_new_tokens=longest,
                num_beams=1,
                do_sample=False,
            )
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return texts

    def _inputs(self, features: Tensor, shown: Tensor, questions: Sequence[str]) -> dict[str, Tensor]:
        text = self._tokens(questions)
        seen = self.projection(features)
        words = self.language.get_input_embeddings()(text.input_ids)
        visible = shown.repeat_interleave(features.shape[2], dim=1).to(text.attention_mask.dtype)
        joined, mask = torch.cat([seen, words], dim=1), torch.cat([visible, text.attention_mask], dim=1)
        # What is shown moves to the front, or a word's position would depend on how many pictures others have
        order = mask.argsort(dim=1, descending=True, stable=True)
        return {
            "inputs_embeds": joined.gather(1, order[..., None].expand_as(joined)),
            "attention_mask": mask.gather(1, order),
        }

    def _tokens(self, texts: Sequence[str]) -> Any:
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        return tokens.to(self.projection.linear.weight.device)

    def save(self, folder: Path, tower: str, grid: int) -> None:
        """Write the model in transformers' layout, the projection and the tower's name and grid beside it."""
        with quiet_libraries():
            self.language.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        with atomic_write(folder / PROJECTION) as unfinished:
            save_file(
                {name: value.contiguous() for name, value in self.projection.state_dict().items()}, unfinished
            )
        with atomic_write(folder / NOTES) as unfinished:
            unfinished.write_text(json.dumps({"tower": tower, "grid": grid}) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Notes:
    """What a folder of ImageText.save says of its tower."""

    tower: str = DEFAULT_TOWER
    grid: int = DEFAULT_GRID


def read_notes(name: str) -> Notes:
    """What stands beside the model, or the defaults. Raises: ModelError if it is damaged or there is no model."""
    file = encoder_folder(name) / NOTES
    if not file.exists():
        return Notes()
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return Notes(str(told["tower"]), int(told["grid"]))
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise ModelError(
            f"{file} is damaged ({error!r}); make the model again, or remove the file."
        ) from None


def load_image_text(name: str, width: int, *, seed: int = 0, device: str | torch.device = "cpu") -> ImageText:
    """An encoder-decoder by hub id or folder, with the projection beside it or else a random one.

    Args:
        width: of the tower's features.  seed: of a random projection.
    Raises: ModelError for a model that is no encoder-decoder of texts, that cannot be had, or that has a projection
        for another tower.
    """
    folder = encoder_folder(name)
    with quiet_libraries(), loading_errors(f"The model {name}"):
        from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

        config = AutoConfig.from_pretrained(folder)
        if type(config) not in AutoModelForSeq2SeqLM._model_mapping:
            raise ModelError(
                f"The model {name} is a {config.model_type}, not an encoder-decoder of texts such as "
                "facebook/bart-base or google-t5/t5-base."
            )
        language, report = AutoModelForSeq2SeqLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        if lacking := sorted(report["missing_keys"]):
            raise ModelError(f"The model {name} cannot be used: its weights lack {lacking[0]}.")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.pad_token is None:
            raise ModelError(f"The model {name} cannot be used: its tokenizer has no token for padding.")
    projection = _projection(folder, width, language.get_input_embeddings().embedding_dim, seed)
    return ImageText(own_memory(language), projection, tokenizer).eval().to(device)


def _projection(folder: Path, width: int, embedding: int, seed: int) -> Projection:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed("projection", seed))
        projection = Projection(width, embedding)
    file = folder / PROJECTION
    if file.exists():
        with loading_errors(f"The projection {file}"):
            tensors = load_file(file)
        weight = tensors.get("linear.weight")
        if weight is None or tuple(weight.shape) != (embedding, width):
            maps = "no numbers" if weight is None else f"{weight.shape[1]} numbers to {weight.shape[0]}"
            raise ModelError(
                f"{file} is for another tower or model: it maps {maps}, and here {width} become {embedding}. Pass the "
                "--tower that it was made with."
            )
        with loading_errors(f"The projection {file}"):
            projection.load_state_dict(tensors)
    return projection
