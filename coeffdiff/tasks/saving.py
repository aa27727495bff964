"""A trained classifier in a folder, and back: its head, and alpha and LoRA in their libraries' own files.

head.safetensors             weight [classes, D] and bias
classifier.json              the classes in the head's order, and how features are pooled
coeff.safetensors            with alpha: as coeffdiff.save writes it
adapter_model.safetensors    with LoRA: as PEFT writes it, beside adapter_config.json
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from coeffdiff.errors import AdapterError, ConfigError, TrainingError
from coeffdiff.hosts.any_model.attach import attach_from, save
from coeffdiff.method.adapter_paths import COEFF_FILE
from coeffdiff.tasks.encoder import Encoder
from coeffdiff.tasks.few_shot import Trained
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.text import first_line

HEAD, FACTS, LORA = "head.safetensors", "classifier.json", "adapter_config.json"


def save_classifier(trained: Trained, classes: Sequence[str], encoder: Encoder, folder: Path) -> None:
    """Write a folder in one step. The encoder's own weights are not in it.

    Raises: TrainingError if the disk refuses.
    """
    try:
        _write(trained, classes, encoder, folder)
    except (OSError, SafetensorError, ConfigError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise TrainingError(
            f"The classifier {folder} cannot be written: {reason}. Its scores are kept; make room, then the same "
            "command goes on."
        ) from None


def _write(trained: Trained, classes: Sequence[str], encoder: Encoder, folder: Path) -> None:
    facts = {"classes": list(classes), "model": encoder.name, "pooling": encoder.pooling}
    with atomic_write(folder, durable=True) as unfinished:
        unfinished.mkdir()
        head = {name: value.contiguous().cpu() for name, value in trained.head.state_dict().items()}
        # By Python, whose errors say "No space left on device"
        (unfinished / HEAD).write_bytes(to_bytes(head))
        (unfinished / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if isinstance(trained.network, PeftModel):
            # Otherwise PEFT asks the hub whether the base model's vocabulary was of another size
            trained.network.save_pretrained(unfinished, save_embedding_layers=False)
        if trained.mean_abs_alpha is not None:
            save(trained.network, unfinished)


def load_classifier(folder: Path, encoder: Encoder) -> tuple[Any, nn.Linear, list[str]]:
    """What save_classifier wrote, on a copy of the encoder: the network, the head and the classes in its order.

    Raises: AdapterError if files are missing or damaged, AdapterMismatch for alphas of another model.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        state, classes = load_file(folder / HEAD), [str(name) for name in facts["classes"]]
        head = nn.Linear(state["weight"].shape[1], len(classes))
        head.load_state_dict(state)
    except Exception as error:  # safetensors raises its own kinds
        raise AdapterError(f"{folder} holds no classifier of coeffdiff: {first_line(error)}.") from error
    if head.in_features != encoder.width:
        raise AdapterError(
            f"{folder} classifies features {head.in_features} wide, and those of {encoder.name} are {encoder.width}: "
            f"it was trained on {facts.get('model')}."
        )
    network = copy.deepcopy(encoder.network)
    if (folder / LORA).is_file():
        try:
            network = PeftModel.from_pretrained(network, str(folder))
        except Exception as error:
            raise AdapterError(
                f"The LoRA in {folder} does not fit {encoder.name}: {first_line(error)}."
            ) from error
    if (folder / COEFF_FILE).is_file():
        attach_from(network, folder)
    network.requires_grad_(False).eval()
    return network, head.to(next(network.parameters()).device), classes
