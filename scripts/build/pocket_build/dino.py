"""pocket-dino: pictures of one individual close together, of others apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import (
    ViTConfig,
    ViTModel,
)

from coeffdiff.pocket import POCKET_DINO
from coeffdiff.utils.seeding import generator_for, stable_seed
from pocket_build import renders
from pocket_build.fitting import Losses, mixed
from pocket_build.pictures import ROUND_TRIPS, drawn_from, plain_or_seen, shifted, through_vae
from pocket_build.renders import RESOLUTION, VIEWS, as_float, known_individuals
from pocket_build.workshop import Workshop, load_float32, store, store_processor


def build_dino(shop: Workshop) -> None:
    """pocket-dino: pictures of one individual close together, of others, above all of its kind, apart.

    Supervised contrastive learning (arXiv 2004.11362) on the class token itself, which is what subject fidelity
    is measured on. Half of a batch is of few kinds, so that a kind alone does not tell.
    """
    plain = shop.individuals
    seen = through_vae(shop, plain, min(ROUND_TRIPS["individuals"], len(plain)))
    count = known_individuals(plain)
    kinds: dict[str, list[int]] = {}
    for number in range(count):
        kinds.setdefault(plain.scene(number * VIEWS).kind, []).append(number)
    torch.manual_seed(stable_seed("dino"))
    network = ViTModel(
        ViTConfig(
            hidden_size=192, num_hidden_layers=4, num_attention_heads=6, intermediate_size=768,
            image_size=RESOLUTION, patch_size=16,
        ),
        add_pooling_layer=False,
    )  # fmt: skip

    def loss(step: int) -> Losses:
        lot = generator_for("dino", step)
        chosen = torch.randint(count, (16,), generator=lot).tolist()
        names = sorted(kinds)
        for kind in torch.randint(len(names), (2,), generator=lot).tolist():
            own = kinds[names[kind]]
            chosen += drawn_from(own, 8, lot)
        chosen = sorted(set(chosen))
        views = [torch.randperm(VIEWS, generator=lot)[:3].tolist() for _ in chosen]
        rows = [number * VIEWS + view for number, some in zip(chosen, views, strict=True) for view in some]
        labels = torch.tensor([row // VIEWS for row in rows], device=shop.device)
        images = shifted(plain_or_seen(plain, seen, rows, lot), lot)
        with mixed(shop.device, shop.dtype):
            states = network(pixel_values=as_float(images).to(shop.device)).last_hidden_state[:, 0]
        near = F.normalize(states.float(), dim=-1)
        logits = near @ near.T / 0.1
        itself = torch.eye(len(rows), dtype=torch.bool, device=shop.device)
        logits = logits.masked_fill(itself, -1e4)
        same = (labels[:, None] == labels[None, :]) & ~itself
        per_pair = (logits - logits.logsumexp(dim=1, keepdim=True)) * same
        return {"contrast": -(per_pair.sum(1) / same.sum(1)).mean()}

    trained, took = shop.fit("dino", network, loss)
    folder = shop.weights / POCKET_DINO
    store(trained, folder)
    store_processor("ViTImageProcessor", folder, size={"height": RESOLUTION, "width": RESOLUTION})
    shop.note("dino", **took, **measure_dino(shop))


@torch.no_grad()
def measure_dino(shop: Workshop) -> dict[str, float]:
    """On individuals that it was not trained on: mean cosine of two pictures of the same one, and of two of the same
    kind, and how often a picture's nearest other one shows the same individual."""
    network = load_float32(ViTModel, shop.weights / POCKET_DINO).to(shop.device)
    first = known_individuals(shop.individuals)
    rows = range(first * VIEWS, (first + renders.HELD_INDIVIDUALS) * VIEWS)
    images = as_float(shop.individuals.images(rows)).to(shop.device)
    states = torch.cat([network(pixel_values=part).last_hidden_state[:, 0] for part in images.split(64)])
    near = F.normalize(states, dim=-1).cpu()
    cosine = near @ near.T
    who = torch.tensor([row // VIEWS for row in rows])
    kinds = [shop.individuals.scene(row).kind for row in rows]
    kind = torch.tensor([sorted(set(kinds)).index(name) for name in kinds])
    itself = torch.eye(len(rows), dtype=torch.bool)
    same = (who[:, None] == who[None]) & ~itself
    alike = (kind[:, None] == kind[None]) & (who[:, None] != who[None])
    nearest = cosine.masked_fill(itself, -2.0).argmax(dim=1)
    return {
        "same_individual_cosine": round(float(cosine[same].mean()), 4),
        "same_kind_cosine": round(float(cosine[alike].mean()), 4),
        "nearest_is_same_individual": round(float((who[nearest] == who).float().mean()), 4),
    }
