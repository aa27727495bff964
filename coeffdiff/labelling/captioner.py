"""A network that describes photos: any image-to-text model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from coeffdiff.errors import ConfigError
from coeffdiff.labelling.defaults import CAPTIONER
from coeffdiff.labelling.networks import (
    Found,
    find_network,
    load_network,
    running_errors,
    shrunk,
    what_is_lacking,
)
from coeffdiff.utils.console import quiet_libraries

MOST_TOKENS = 60  # of a caption; with the subject it is to fit into SDXL's 75
_BEAMS = 3
_CHAT = "Describe this photo in one short sentence."
# What these want to be asked, by their model cards; BLIP, BLIP-2, GIT and others caption without a word
_PROMPTS = {
    "florence2": "<CAPTION>",
    "paligemma": "caption en",
    "instructblip": "Write a short description of the photo.",
}
_CONTINUES = ("blip", "git")  # their captions begin with the prompt
_WITHOUT_TEXT = "vision-encoder-decoder"


@dataclass(frozen=True)
class Captioner:
    """prompt: the text that goes in with a photo, or None. chat: whether as a question in a conversation."""

    found: Found
    network: Any
    processor: Any
    tokenizer: Any
    prompt: str | None
    chat: bool

    @property
    def device(self) -> str:
        """cpu, cuda or mps."""
        return str(self.network.device.type)

    @torch.no_grad()
    def captions(self, pictures: Sequence[Image.Image]) -> list[str]:
        """A caption for each RGB picture, on one line; equal pictures get equal captions. Empty: it said nothing.

        Raises: ModelError if this network cannot be asked so.
        """
        advice = "Some models want a --prompt of their own; --batch-size 1 takes photos one by one."
        with quiet_libraries(), running_errors(self.found.name, advice):
            inputs = self._inputs([shrunk(picture) for picture in pictures])
            inputs = inputs.to(device=self.network.device, dtype=self.network.dtype)
            # No sampling: the same photo has the same caption each time
            made = self.network.generate(
                **inputs, do_sample=False, num_beams=1 if self.chat else _BEAMS, max_new_tokens=MOST_TOKENS
            )
            texts = self.tokenizer.batch_decode(self._new_tokens(made, inputs), skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _inputs(self, pictures: list[Image.Image]) -> Any:
        if self.chat:
            asked = [
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": picture},
                            {"type": "text", "text": self.prompt},
                        ],
                    }
                ]
                for picture in pictures
            ]
            return self.processor.apply_chat_template(
                asked,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        if self.prompt is None:
            return self.processor(images=pictures, return_tensors="pt")
        return self.processor(
            images=pictures, text=[self.prompt] * len(pictures), padding=True, return_tensors="pt"
        )

    def _new_tokens(self, made: torch.Tensor, inputs: Any) -> torch.Tensor:
        """Without the prompt, where a network repeats it before its answer."""
        asked = inputs.get("input_ids")
        if asked is None or self.found.kind in _CONTINUES:
            return made
        length = asked.shape[1]
        return made[:, length:] if torch.equal(made[:, :length], asked) else made


def find_captioner(name: str) -> Found:
    """Raises: ModelError if there is no such model, or it is none that makes text of pictures."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return find_network(name, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "an image-to-text model", CAPTIONER)


def load_captioner(
    found: Found, device: torch.device, dtype: torch.dtype, prompt: str | None = None
) -> Captioner:
    """The network with its processor and tokenizer.

    Args:
        prompt: in place of the usual question; BLIP and GIT continue it.
    Raises: ModelError if something of it is missing or damaged; ConfigError for a prompt that it cannot take.
    """
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    if prompt is not None and found.kind == _WITHOUT_TEXT:
        raise ConfigError(f"{found.name} describes photos without being asked; leave --prompt out.")
    with quiet_libraries(), what_is_lacking(found.name):
        if found.kind == _WITHOUT_TEXT:
            processor = AutoImageProcessor.from_pretrained(found.folder, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(found.folder, trust_remote_code=False)
        else:
            processor = AutoProcessor.from_pretrained(found.folder, trust_remote_code=False)
            tokenizer = processor.tokenizer
            tokenizer.padding_side = "left"  # what is generated follows the last token of the prompt
    chat = getattr(processor, "chat_template", None) is not None
    if prompt is None:
        prompt = _CHAT if chat else _PROMPTS.get(found.kind)
    network = load_network(found, AutoModelForImageTextToText, device, dtype)
    return Captioner(found, network, processor, tokenizer, prompt, chat)
