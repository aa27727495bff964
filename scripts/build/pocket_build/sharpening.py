"""The VAE's decoder against a critic: what 8 x 8 pixels lose on their way through four numbers is drawn anew."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from coeffdiff.pocket import POCKET
from coeffdiff.utils.seeding import generator_for, stable_seed
from pocket_build.fitting import Losses, mixed
from pocket_build.pictures import flipped
from pocket_build.renders import VIEWS, as_float, known_individuals
from pocket_build.vae import edges, measure_vae
from pocket_build.workshop import Workshop, store

_TOGETHER = 2  # pictures a step, whole ones: at a crop's edges a decoder learns frames
_WEIGHT = 0.05  # of the critic's word
_RISES_OVER = 300  # steps over which that weight begins, while the critic learns


class Critic(nn.Module):
    """Says of every patch of some 30 pixels whether it is of a render (above 0) or decoded (below).

    Source: the patch discriminator of pix2pix (arXiv 1611.07004), with group norms.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = (
            (3, width, 3, 1),
            (width, 2 * width, 4, 2),
            (2 * width, 4 * width, 4, 2),
            (4 * width,) * 2 + (3, 1),
        )
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, side, stride, padding=1),
                nn.GroupNorm(8, after) if before > 3 else nn.Identity(),
                nn.LeakyReLU(0.2),
            )
            for before, after, side, stride in sizes
        )
        self.says = nn.Conv2d(4 * width, 1, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[N, 3, R, R] in -1..1 -> its word on each patch, and what every layer saw."""
        seen: list[Tensor] = []
        for layer in self.layers:
            images = layer(images)
            seen.append(images)
        return self.says(images).float(), seen


def sharpen_decoder(shop: Workshop) -> None:
    """The decoder learns to pass for a render, the encoder as it is, so that latents keep their meaning.

    Trained on errors alone it paints the mean of all that four numbers could have been, which is a blur.
    """
    sources = (shop.train, shop.individuals)
    vae = shop.vae().to(memory_format=torch.channels_last)
    torch.manual_seed(stable_seed("critic"))
    critic = Critic().to(memory_format=torch.channels_last)
    network = nn.ModuleDict(
        {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv, "critic": critic}
    ).requires_grad_(True)

    def loss(step: int) -> Losses:
        lot = generator_for("sharp", step)
        source = sources[step % 2]
        known = len(source) if source is shop.train else VIEWS * known_individuals(source)
        rows = torch.randint(known, (_TOGETHER,), generator=lot).tolist()
        target = as_float(flipped(source.images(rows), lot)).to(
            shop.device, memory_format=torch.channels_last
        )
        noise = torch.randn(len(target), 4, target.shape[-2] // 8, target.shape[-1] // 8, generator=lot)
        with mixed(shop.device, shop.dtype):
            with torch.no_grad():
                posterior = vae.encode(target).latent_dist
            latents = posterior.mean + posterior.std * noise.to(shop.device)
            decoded = network["decoder"](network["post_quant_conv"](latents)).float()
            return against(critic, decoded, target, _WEIGHT * min(1.0, step / _RISES_OVER))

    trained, took = shop.fit("sharp", network, loss)
    vae.decoder, vae.post_quant_conv = trained["decoder"], trained["post_quant_conv"]
    store(vae, shop.weights / POCKET / "vae")
    shop.note("sharp", **took, **measure_vae(shop))


def against(critic: Critic, decoded: Tensor, target: Tensor, weight: float) -> Losses:
    """Losses of both: "critic" moves the critic alone, the others what has decoded alone. weight: of its word."""
    held = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    on_real, of_real = critic(target)
    on_made, _ = critic(decoded.detach())
    judged, of_made = functional_call(critic, held, (decoded,))
    error = decoded - target
    unlike = [(a.float() - b.detach().float()).abs().mean() for a, b in zip(of_made, of_real, strict=True)]
    return {
        "error": error.abs().mean(),
        "edges": 0.25 * edges(error),
        "unlike": 2.0 * weight * torch.stack(unlike).sum(),
        "judged": -weight * judged.mean(),
        "critic": F.relu(1.0 - on_real).mean() + F.relu(1.0 + on_made).mean(),
    }
