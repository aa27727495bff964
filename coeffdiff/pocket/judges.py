"""The judges: small classifiers of what a picture shows. They take no part in any training.

They are trained on renders and on renders that went through the VAE, so that they judge the picture and not its
codec, and may judge only what they get right on renders they have never seen. Their accuracy after a round trip
measures what the codec keeps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from coeffdiff.errors import ModelError, TrainingError
from coeffdiff.pocket.world import COLOURS, KINDS, PATTERNS, SETTINGS
from coeffdiff.pocket.world.scene import Scene

# Question -> its possible answers
QUESTIONS: dict[str, tuple[str, ...]] = {
    "kind": tuple(KINDS),
    "setting": SETTINGS,
    "colour": tuple(COLOURS),
    "pattern": tuple(PATTERNS),
}
TRUSTED = 0.97  # share of held-out pictures that a judge must get right


class Judges(nn.Module):
    """A small ResNet, and one linear layer for each question."""

    def __init__(self) -> None:
        super().__init__()
        config = ResNetConfig(
            embedding_size=32, hidden_sizes=[32, 64, 96, 160], depths=[1, 1, 1, 1], layer_type="basic"
        )
        self.trunk = ResNetModel(config)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(160, len(answers)) for name, answers in QUESTIONS.items()}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Pictures [B, 3, 128, 128] in -1..1 -> for each question the logits [B, answers]."""
        seen = self.trunk(images).pooler_output.flatten(1)
        return {name: head(seen) for name, head in self.heads.items()}

    @torch.no_grad()
    def answers(self, images: Tensor) -> dict[str, Tensor]:
        """For each question the index of the likeliest answer, [B]."""
        parts = [self(part) for part in images.split(64)]
        return {name: torch.cat([part[name] for part in parts]).argmax(dim=-1) for name in QUESTIONS}

    def see(self, question: str, pictures: Sequence[Image.Image]) -> list[str]:
        """The likeliest answer to one question for each picture, of 128 x 128 pixels."""
        values = [torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) for picture in pictures]
        answers = self.answers(torch.stack(values).float() / 127.5 - 1.0)[question].tolist()
        return [QUESTIONS[question][index] for index in answers]


def truth(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """The right answers, [B] for each question."""
    return {
        name: torch.tensor([answers.index(getattr(scene, name)) for scene in scenes])
        for name, answers in QUESTIONS.items()
    }


def judging_losses(guesses: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cross entropy for each question."""
    return {name: F.cross_entropy(guesses[name].float(), right[name]) for name in QUESTIONS}


def load_judges(folder: Path) -> Judges:
    """The judges in a folder, from fp16 to float32."""
    judges = Judges()
    judges.load_state_dict(load_file(folder / "model.safetensors"))
    return judges.requires_grad_(False).eval()


def trusted_judges(weights: Path) -> Judges:
    """The judges of a weights folder, if the record beside them shows that they are accurate enough.

    Raises: ModelError if there are none; TrainingError if they are right on too few held-out pictures.
    """
    try:
        known = json.loads((weights / "record.json").read_text())["judges"]
    except (OSError, KeyError) as error:
        raise ModelError(
            f"There are no judges in {weights}; scripts/build/build_pocket.py makes them."
        ) from error
    doubtful = [name for name in QUESTIONS if known[f"{name}_plain"] < TRUSTED]
    if doubtful:
        raise TrainingError(
            f"The judges of {', '.join(doubtful)} are right on less than {TRUSTED:.0%} of held-out pictures, so they "
            "may not judge; train them longer."
        )
    return load_judges(weights / "judges")
