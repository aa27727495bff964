"""How much of renders' fine detail pictures have, which pocket-dino's features hardly see."""

from __future__ import annotations

import torch
from torch import Tensor

from coeffdiff.pocket import POCKET
from coeffdiff.pocket.world import render
from coeffdiff.utils.console import progress
from pocket_build.drawn import TOGETHER, captioned_scene, drawn, measured_pipeline
from pocket_build.renders import RESOLUTION, round_trip
from pocket_build.workshop import Workshop, fingerprint

BANDS = ((8, 16), (16, 32), (32, 64))  # cycles across a picture
_BRIGHTNESS = (0.299, 0.587, 0.114)


@torch.no_grad()
def measure_detail(
    shop: Workshop, pictures: int = 200, steps: int = 25, guidance: float = 5.0
) -> dict[str, float]:
    """The power that brightness has in each band, of what it has in renders of equal captions: in pictures, and in the
    renders after a round trip through the VAE."""
    pipe = measured_pipeline(shop)
    real, seen, made = (torch.zeros(len(BANDS), dtype=torch.float64) for _ in range(3))
    with progress("detail of pictures", pictures) as bar:
        for begin in range(0, pictures, TOGETHER):
            own = range(begin, min(begin + TOGETHER, pictures))
            images, _ = render([captioned_scene("distances", index)[0] for index in own], RESOLUTION)
            real += power(images)
            seen += power(round_trip(pipe.vae, (images * 2.0 - 1.0).to(shop.device)).cpu())
            made += power(drawn(pipe, "distances", own, steps=steps, guidance=guidance).cpu() / 255.0)
            bar(own.stop)
    names = [f"{low}_to_{high}" for low, high in BANDS]
    found = {name: round(float(share), 3) for name, share in zip(names, made / real, strict=True)}
    found |= {f"{name}_vae": round(float(share), 3) for name, share in zip(names, seen / real, strict=True)}
    chosen = {"pictures": pictures, "sampling_steps": steps, "guidance": guidance}
    of = fingerprint(shop.weights / POCKET)
    shop.note("detail", **found, **chosen, of=of, **shop.machine() | {"precision": "float32"})
    return found


def power(images: Tensor) -> Tensor:
    """Of brightness in each of BANDS, summed over images [N, 3, R, R]; float64. A Hann window hides the edges."""
    side = images.shape[-1]
    grey = (images.double() * images.new_tensor(_BRIGHTNESS)[:, None, None]).sum(dim=1)
    window = torch.hann_window(side, dtype=torch.float64)
    grey = (grey - grey.mean((1, 2), keepdim=True)) * window[:, None] * window
    spectrum = torch.fft.fft2(grey).abs().square().sum(dim=0)
    cycles = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    radius = (cycles[:, None].square() + cycles.square()).sqrt()
    return torch.stack([spectrum[(radius >= low) & (radius < high)].sum() for low, high in BANDS])
