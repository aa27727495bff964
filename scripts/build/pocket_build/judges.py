"""The judges: what they are trained on, and how often they are right."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import Tensor

from coeffdiff.pocket.judges import QUESTIONS, Judges, judging_losses, load_judges, truth
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.seeding import generator_for, stable_seed
from pocket_build.fitting import Losses, mixed
from pocket_build.pictures import ROUND_TRIPS, flipped, plain_or_seen, shifted, through_vae
from pocket_build.renders import as_float
from pocket_build.workshop import Workshop

JUDGES_BATCH = 64


def build_judges(shop: Workshop) -> None:
    train, seen = shop.train, through_vae(shop, shop.train, min(ROUND_TRIPS["train"], len(shop.train)))
    right = truth(list(train.scenes()))
    torch.manual_seed(stable_seed("judges"))
    network = Judges().to(memory_format=torch.channels_last)

    def loss(step: int) -> Losses:
        lot = generator_for("judges", step)
        rows = torch.randint(len(train), (JUDGES_BATCH,), generator=lot)
        images = flipped(shifted(plain_or_seen(train, seen, rows.tolist(), lot), lot), lot)
        with mixed(shop.device, shop.dtype):
            guesses = network(as_float(images).to(shop.device, memory_format=torch.channels_last))
        return judging_losses(guesses, {name: answer[rows].to(shop.device) for name, answer in right.items()})

    trained, took = shop.fit("judges", network, loss)
    folder = shop.weights / "judges"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "model.safetensors") as unfinished:
        save_file({name: _half(value) for name, value in trained.state_dict().items()}, unfinished)
    shop.note("judges", **took, **measure_judges(shop))


def measure_judges(shop: Workshop) -> dict[str, float]:
    """Share of right answers on held-out pictures, plain and after a round trip."""
    judges, found = load_judges(shop.weights / "judges").to(shop.device), {}
    count = len(shop.heldout)
    right = truth([shop.heldout.scene(i) for i in range(count)])
    for name, source in (("plain", shop.heldout), ("vae", through_vae(shop, shop.heldout, count))):
        answers = judges.answers(as_float(source.images(range(count))).to(shop.device))
        for question in QUESTIONS:
            share = (answers[question].cpu() == right[question]).float().mean()
            found[f"{question}_{name}"] = round(float(share), 4)
    return found


def _half(value: Tensor) -> Tensor:
    return value.to(torch.float16 if value.is_floating_point() else value.dtype).contiguous()
