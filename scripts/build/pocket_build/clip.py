"""pocket-clip: pictures and captions in one space."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
)

from coeffdiff.pocket import POCKET, POCKET_CLIP
from coeffdiff.pocket.judges import QUESTIONS, truth
from coeffdiff.pocket.sizes import text_configs
from coeffdiff.pocket.tokenizers import tokenizer_pair
from coeffdiff.pocket.world import caption, mentioned, vocabulary
from coeffdiff.utils.seeding import generator_for, stable_seed
from pocket_build.fitting import Losses, mixed
from pocket_build.pictures import ROUND_TRIPS, drawn_from, flipped, plain_or_seen, shifted, through_vae
from pocket_build.renders import RESOLUTION, as_float
from pocket_build.workshop import Workshop, load_float32, store, store_processor

CLIP_BATCH = 96


def build_clip(shop: Workshop) -> None:
    """pocket-clip: pictures and captions in one space, by CLIP's own loss, made aware of captions that fit twice.

    A place fills a picture and is learned at once; so every other batch is of two places only, where nothing but the
    object tells the pictures apart.
    """
    train, seen = shop.train, through_vae(shop, shop.train, min(ROUND_TRIPS["train"], len(shop.train)))
    scenes, (first, _) = list(train.scenes()), tokenizer_pair(vocabulary())
    places: dict[str, list[int]] = {}
    for row, scene in enumerate(scenes):
        places.setdefault(scene.setting, []).append(row)
    torch.manual_seed(stable_seed("clip"))
    text, _ = text_configs(POCKET)
    vision = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": RESOLUTION, "patch_size": 16, "projection_dim": 96,
    }  # fmt: skip
    network = CLIPModel(
        CLIPConfig(
            text_config=text.to_dict() | {"projection_dim": 96}, vision_config=vision, projection_dim=96
        )
    )

    def loss(step: int) -> Losses:
        lot = generator_for("clip", step)
        several = list(places)
        if step % 2:
            several = [several[i] for i in torch.randperm(len(places), generator=lot)[:2].tolist()]
        rows = drawn_from([row for place in several for row in places[place]], CLIP_BATCH, lot)
        images = flipped(shifted(plain_or_seen(train, seen, rows, lot), lot), lot)
        chosen = [scenes[row] for row in rows]
        said = [caption(scene, f"clip {step} {place}") for place, scene in enumerate(chosen)]
        facts = [mentioned(scene, text) for scene, text in zip(chosen, said, strict=True)]
        # A caption that says less fits several pictures of a batch: all of them are right.
        fits = torch.tensor(
            [[all(getattr(scene, k) == v for k, v in fact.items()) for fact in facts] for scene in chosen],
            dtype=torch.float32,
            device=shop.device,
        )
        ids = first(said, padding=True, return_tensors="pt").input_ids.to(shop.device)
        with mixed(shop.device, shop.dtype):
            out = network(input_ids=ids, pixel_values=as_float(images).to(shop.device))
        logits = out.logits_per_image.float()
        return {
            "images": 0.5 * F.cross_entropy(logits, fits / fits.sum(1, keepdim=True)),
            "texts": 0.5 * F.cross_entropy(logits.T, fits.T / fits.T.sum(1, keepdim=True)),
        }

    trained, took = shop.fit("clip", network, loss)
    folder = shop.weights / POCKET_CLIP
    store(trained, folder)
    tokenizer_pair(vocabulary())[0].save_pretrained(folder)  # a used one would keep its last padding
    square = {"height": RESOLUTION, "width": RESOLUTION}
    store_processor("CLIPImageProcessor", folder, size={"shortest_edge": RESOLUTION}, crop_size=square)
    shop.note("clip", **took, **measure_clip(shop))


@torch.no_grad()
def measure_clip(shop: Workshop, count: int = 480) -> dict[str, float]:
    """How often the right setting, and the right kind, is the nearest of all phrases, on held-out pictures."""
    network = load_float32(CLIPModel, shop.weights / POCKET_CLIP).to(shop.device)
    tokenizer, _ = tokenizer_pair(vocabulary())
    count = min(count, len(shop.heldout))
    images = as_float(shop.heldout.images(range(count))).to(shop.device)
    right = truth([shop.heldout.scene(i) for i in range(count)])
    seen = F.normalize(network.get_image_features(pixel_values=images).pooler_output, dim=-1)
    found = {}
    for name, phrases in (
        ("kind", [f"a photo of a {kind}" for kind in QUESTIONS["kind"]]),
        ("setting", [f"a photo taken {setting}" for setting in QUESTIONS["setting"]]),
    ):
        ids = tokenizer(phrases, padding=True, return_tensors="pt").input_ids.to(shop.device)
        texts = F.normalize(network.get_text_features(input_ids=ids).pooler_output, dim=-1)
        nearest = (seen @ texts.T).argmax(dim=-1).cpu()
        found[f"{name}_accuracy"] = round(float((nearest == right[name]).float().mean()), 4)
    return found
