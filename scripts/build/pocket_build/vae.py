"""The VAE, and its decoder once more."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from coeffdiff.pocket import POCKET
from coeffdiff.pocket.sizes import vae_config
from coeffdiff.utils.seeding import generator_for, stable_seed
from pocket_build.fitting import Losses, mixed
from pocket_build.pictures import flipped
from pocket_build.renders import RESOLUTION, VIEWS, as_float, known_individuals, round_trip
from pocket_build.workshop import Workshop, store

TRAINED_ON = 9_600  # of the train set, by the VAE
# Share of the steps in which the encoder imitates components and the decoder reads the true ones.
_IMITATING = 0.25
# From this share of the steps on: so many crops of so many pixels. Small crops of many pictures teach much faster
# than few large ones at the same cost; at the end it sees pictures as they are.
_CROPS = ((0.0, 32, 32), (0.6, 8, 64), (0.85, 2, RESOLUTION))
_IN_CROPS = (
    0.28  # share of the decoder's steps; at a crop's edges it lacks what lies beyond, most of the error there
)


def build_vae(shop: Workshop) -> None:
    """The VAE. Left to themselves both halves take thousands of steps to agree on how to pass on a colour, since
    brightness is most of what differs between pictures; so they first learn, apart, the four principal components
    of 8 x 8 pixels, and from there on what is best."""
    plan = shop.plans["vae"]
    pixels = shop.train.images(range(min(TRAINED_ON, len(shop.train))))
    kernel, bias = (part.to(shop.device) for part in _components(pixels[:1500]))
    torch.manual_seed(stable_seed("vae"))
    vae = AutoencoderKL(**vae_config(POCKET)).to(memory_format=torch.channels_last)
    with torch.no_grad():
        vae.quant_conv.bias[4:].fill_(-6.0)  # hardly any noise to begin with

    def loss(step: int) -> Losses:
        lot = generator_for("vae", step)
        count, side = next(crops for begin, *crops in reversed(_CROPS) if step >= begin * plan.steps)
        chosen = torch.randint(len(pixels), (count,), generator=lot)
        at = torch.randint(0, (RESOLUTION - side) // 8 + 1, (count, 2), generator=lot) * 8
        cut = [
            pixels[i, :, y : y + side, x : x + side]
            for i, (y, x) in zip(chosen.tolist(), at.tolist(), strict=True)
        ]
        images = flipped(torch.stack(cut), lot)
        noise = torch.randn(count, 4, side // 8, side // 8, generator=lot).to(shop.device)
        target = as_float(images).to(shop.device, memory_format=torch.channels_last)
        imitating = step < _IMITATING * plan.steps
        components = F.conv2d(target, kernel, bias, stride=8)
        with mixed(shop.device, shop.dtype):
            posterior = vae.encode(target).latent_dist
            latents = components if imitating else posterior.mean + posterior.std * noise
            decoded = vae.decode(latents).sample
        error = decoded.float() - target
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        losses = {
            "error": error.abs().mean(),
            "squares": 2.0 * error.square().mean(),
            "edges": 0.25 * edges(error),
            "kl": 2e-4 * divergence,
        }
        return losses | ({"imitation": (mean - components).square().mean()} if imitating else {})

    vae, took = shop.fit("vae", vae, loss)
    vae.register_to_config(scaling_factor=1.0 / _spread(vae, shop))
    store(vae, shop.weights / POCKET / "vae")
    shop.note("vae", **took, **measure_vae(shop))


def build_decoder(shop: Workshop) -> None:
    """The VAE's decoder once more, the encoder as it is, so that latents keep their meaning: now with individuals,
    whose marks and hues the world does not have, and with more weight on edges."""
    plan, sources = shop.plans["decoder"], (shop.train, shop.individuals)
    start = shop.so_far("decoder")
    vae = shop.vae().to(memory_format=torch.channels_last)
    network = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    network.requires_grad_(True)

    def loss(step: int) -> Losses:
        lot = generator_for("decoder", step)
        count, side = (8, 64) if step < _IN_CROPS * plan.steps else (2, RESOLUTION)
        source = sources[step % 2]
        known = len(source) if source is shop.train else VIEWS * known_individuals(source)
        rows = torch.randint(known, (count,), generator=lot).tolist()
        images = as_float(flipped(source.images(rows), lot)).to(
            shop.device, memory_format=torch.channels_last
        )
        y, x = (torch.randint(0, (RESOLUTION - side) // 8 + 1, (2,), generator=lot) * 8).tolist()
        target = images[..., y : y + side, x : x + side]
        with mixed(shop.device, shop.dtype):
            with torch.no_grad():
                posterior = vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=lot).to(shop.device)
            latents = posterior.mean + posterior.std * noise
            latents = latents[..., y // 8 : (y + side) // 8, x // 8 : (x + side) // 8]
            decoded = network["decoder"](network["post_quant_conv"](latents))
        error = decoded.float() - target
        return {"error": error.abs().mean(), "squares": error.square().mean(), "edges": 0.5 * edges(error)}

    trained, took = shop.fit("decoder", network, loss, **start)
    vae.decoder, vae.post_quant_conv = trained["decoder"], trained["post_quant_conv"]
    store(vae, shop.weights / POCKET / "vae")
    shop.note("decoder", **took, **measure_vae(shop))


@torch.no_grad()
def measure_vae(shop: Workshop, count: int = 480) -> dict[str, float]:
    """PSNR in dB of held-out pictures after a round trip through the stored weights: mean, and 5 % quantile."""
    vae, found = shop.vae(), []
    for part in as_float(shop.heldout.images(range(min(count, len(shop.heldout))))).split(32):
        seen = (round_trip(vae, part.to(shop.device)) * 255.0).round() / 255.0
        error = (seen.cpu() - (part + 1.0) / 2.0).square().mean((1, 2, 3))
        found.append(-10.0 * error.log10())
    values = torch.cat(found)
    return {
        "psnr_db": round(float(values.mean()), 2),
        "psnr_db_5_percent": round(float(values.quantile(0.05)), 2),
    }


def edges(error: Tensor) -> Tensor:
    """Mean absolute difference between neighbours, down and to the right."""
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    return across + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()


def _components(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The four principal components of 8 x 8 pixels as a convolution: kernel [4, 3, 8, 8] and bias [4], whose outputs
    have no mean and unit variance."""
    blocks = as_float(pixels).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(-1, 192)
    mean = blocks.mean(dim=0)
    blocks = blocks - mean
    variances, axes = torch.linalg.eigh(blocks.T @ blocks / len(blocks))
    # An axis has no sign of its own; its largest entry shall be positive, on every machine.
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    kernel = (axes * largest.sign())[:, -4:].div(variances[-4:].sqrt()).T
    return kernel.reshape(4, 3, 8, 8).contiguous(), -kernel @ mean


@torch.no_grad()
def _spread(vae: Any, shop: Workshop) -> float:
    """Standard deviation of the latents of 512 pictures."""
    parts = as_float(shop.train.images(range(min(512, len(shop.train))))).to(shop.device).split(32)
    return float(torch.cat([vae.encode(part).latent_dist.mode() for part in parts]).std())
