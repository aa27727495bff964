"""Pre-train a small BART on questions about pictures of pocket's world, before pocket-clip's frozen vision tower.

python scripts/evidence/image_text_world.py work/pretraining --questions pretraining --count 7200 --heldout 300
python scripts/evidence/pretrain_image_text.py work/pretraining work/model
coeffdiff image-text work/tasks --model work/model

The model is transformers' BartForConditionalGeneration with random weights to begin with, one token a word. It prints
how many held-out questions of each kind it answers rightly.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from image_text_world import words

TOWER, GRID = "pocket-clip", 3
LAYERS, HEADS, WIDTH = 2, 8, 128  # of encoder and decoder each
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as in BART


def small_bart(seed: int, layers: int = LAYERS, width: int = WIDTH) -> tuple[Any, Any]:
    """A BART with random weights, and its tokenizer of the world's words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate((*SPECIAL, *words()))}
    whole = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    whole.pre_tokenizer = WhitespaceSplit()
    whole.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = BartConfig(
        vocab_size=len(ids),
        max_position_embeddings=128,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        dropout=0.0,
        forced_eos_token_id=None,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    torch.manual_seed(seed)
    return BartForConditionalGeneration(config), tokenizer


def pretrain(
    data: Path, output: Path, *, steps: int, batch_size: int, rate: float, seed: int
) -> dict[str, Any]:
    """Train from random weights, save into `output`; returns what was measured."""
    import torch

    from coeffdiff.tasks.arms import put_arm
    from coeffdiff.tasks.image_text_data import read_questions
    from coeffdiff.tasks.image_text_model import ImageText, Projection
    from coeffdiff.tasks.image_text_pictures import load_tower, picture_features
    from coeffdiff.tasks.image_text_training import score, tune
    from coeffdiff.utils.console import progress

    tower = load_tower(TOWER, grid=GRID)
    known = read_questions(data, needed=("train", "test"))
    with progress("pictures", len(known.pictures)) as bar:
        features = picture_features(tower, known.pictures, on_progress=bar)
    language, tokenizer = small_bart(seed)
    model = ImageText(language, Projection(tower.width, WIDTH), tokenizer)
    _, groups = put_arm(language, "full", rates={"head": rate, "full": rate}, heads=[model.projection])
    begun = time.monotonic()
    with progress("training", steps) as bar:
        tune(
            model, groups, features, known.splits["train"], steps=steps, batch_size=batch_size, seed=seed,
            on_step=lambda done, loss: bar(done, f"loss {loss:.3f}"),
        )  # fmt: skip
    seconds = time.monotonic() - begun
    model.save(output, TOWER, GRID)
    found = score(model, features, known.splits["test"])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "pictures": len(known.pictures),
        "questions": len(known.splits["train"]),
        "steps": steps,
        "batch_size": batch_size,
        "rate": rate,
        "seed": seed,
        "seconds": round(seconds),
        "accuracy": {task: round(share, 4) for task, share in found.accuracy.items()},
        "loss": round(found.loss, 4),
        "torch": str(torch.__version__),
    }


def main() -> int:
    from coeffdiff.utils.threads import choose_waiting

    choose_waiting()
    from coeffdiff.errors import CoeffDiffError
    from coeffdiff.utils.paths import path_argument

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=path_argument, help="a folder of image_text_world.py")
    parser.add_argument("output", type=path_argument, help="folder of the model")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    try:
        measured = pretrain(
            chosen.data, chosen.output, steps=chosen.steps, batch_size=chosen.batch_size, rate=chosen.rate,
            seed=chosen.seed,
        )  # fmt: skip
    except CoeffDiffError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    (chosen.output / "pretraining.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
