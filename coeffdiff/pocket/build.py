"""Makes the pocket models from nothing but the world, in stages; scripts/build_pocket.py runs them.

Every stage depends on its own seeds and on the stages before it alone, resumes where it was stopped, and writes
its weights (fp16), its curve and what it took under `weights`; STAGES has their order.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ViTConfig,
    ViTModel,
)

from coeffdiff.console import progress, quiet_libraries
from coeffdiff.errors import TrainingError
from coeffdiff.files import appearing, held
from coeffdiff.pocket import POCKET, POCKET_CLIP, POCKET_DINO, renders
from coeffdiff.pocket.fitting import Losses, Plan, fit, mixed, read_average
from coeffdiff.pocket.judges import QUESTIONS, Judges, judging_losses, load_judges, trusted_judges, truth
from coeffdiff.pocket.model import euler_scheduler, text_configs, tokenizer_pair, unet_config, vae_config
from coeffdiff.pocket.renders import RESOLUTION, VIEWS, Renders, as_float, draw, round_trip
from coeffdiff.pocket.world import Scene, caption, mentioned, sample_scene, vocabulary
from coeffdiff.seeding import generator_for, stable_seed

COUNTS = {"train": 19_200, "heldout": 1_920, "individuals": 9_600}
"""Pictures in each set."""

PLANS = {
    "vae": Plan(4800, 7e-4, cooldown=0.35, weight_decay=0.0, average=0.998),
    "decoder": Plan(3600, 5e-4, cooldown=0.5, weight_decay=0.0, average=0.998),
    "unet": Plan(9_500, 6e-4, warmup=300, cooldown=0.35),
    "clip": Plan(6000, 1e-3, cooldown=0.5, weight_decay=0.05, average=0.99),
    "dino": Plan(1800, 1e-3, cooldown=0.5, weight_decay=0.05, average=0.99),
    "judges": Plan(6000, 2e-3, cooldown=0.5, weight_decay=0.02, average=0.99),
}
TRAINED_ON = 9_600  # of the train set, by the VAE
BATCH = 32  # of the UNet
ROUND_TRIPS = {"train": 9_600, "individuals": 4_800}  # for those who look at pictures
CLIP_BATCH = 96
HELD_INDIVIDUALS = 100  # the last of all; pocket-dino is measured on them, and nothing trains on them
SCORED_TOGETHER = 20
DROPPED = 0.1  # share of captions that the UNet does not get, so that guidance has something to leave


@dataclass(frozen=True)
class Workshop:
    """Where the work is done, and from what.

    folder: renders, latents, checkpoints; a gigabyte or two, and nothing that cannot be made again.
    weights: what comes out, in the layout that the package ships.
    device, dtype: where and in what precision matrices are multiplied while training.
    workers: processes that render.
    plans: as PLANS, perhaps with other numbers of steps.
    counts: pictures in each set, rounded up to whole files.
    """

    folder: Path
    weights: Path
    device: str
    dtype: torch.dtype
    workers: int = 1
    plans: dict[str, Plan] = field(default_factory=lambda: dict(PLANS))
    counts: dict[str, int] = field(default_factory=lambda: dict(COUNTS))

    @functools.cached_property
    def train(self) -> Renders:
        return self._drawn("train")

    @functools.cached_property
    def heldout(self) -> Renders:
        return self._drawn("heldout")

    @functools.cached_property
    def individuals(self) -> Renders:
        return self._drawn("individuals")

    def _drawn(self, name: str) -> Renders:
        count, folder = self.counts[name], self.folder / "renders"
        with progress(f"rendering {name}", count) as bar:
            return draw(folder, name, count, device=self.device, workers=self.workers, told=bar)

    def vae(self) -> AutoencoderKL:
        return _float32(AutoencoderKL, self.weights / POCKET / "vae").to(self.device)

    @property
    def record_file(self) -> Path:
        return self.weights / "record.json"

    def record(self) -> dict[str, Any]:
        """What every stage took, by its name."""
        return json.loads(self.record_file.read_text()) if self.record_file.exists() else {}

    def note(self, stage: str, **facts: Any) -> None:
        """Put a stage into the record, and its curve beside it."""
        known = self.record() | {stage: facts}
        with appearing(self.record_file, durable=True) as unfinished:
            unfinished.write_text(json.dumps(known, indent=1) + "\n")
        curve = self.folder / f"{stage}.jsonl"
        if curve.exists():
            with appearing(self.weights / "curves" / curve.name) as unfinished:
                shutil.copy(curve, unfinished)

    def fit(
        self, stage: str, network: nn.Module, loss: Callable[[int], Losses], **start: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Train to the end of the stage's plan; what it took is to be noted when the weights are stored."""
        plan, curve = self.plans[stage], self.folder / f"{stage}.jsonl"
        before = self.weights / "curves" / curve.name
        if start and before.exists() and not curve.exists():  # the rest of it is to follow
            shutil.copy(before, curve)
        result, seconds = fit(stage, self.folder, network, loss, plan, device=self.device, **start)
        return result, {"steps": plan.steps, "seconds": round(seconds), "rate": plan.rate, **self.machine()}

    @contextmanager
    def alone(self, stage: str) -> Iterator[None]:
        """Hold a stage from its first step to its weights, so that no other process writes over it in this folder.

        Raises: TrainingError if another one is at it.
        """
        lock = _made(self.folder) / f"{stage}.lock"
        lock.touch()
        with held(lock) as mine:
            if mine is False:
                raise TrainingError(f"Another process is at the stage {stage} in {self.folder}.")
            yield

    def finished(self, stage: str) -> bool:
        """Whether a stage has all steps of its plan; for the score, whether it is of the weights that are there."""
        known = self.record().get(stage, {})
        if stage == "score":
            return "of" in known and known["of"] == fingerprint(self.unet_file)
        return known.get("steps", -1) >= self.plans[stage].steps

    def require(self, stage: str) -> None:
        """Raises: TrainingError if a stage that `stage` builds on is not finished."""
        for earlier in REQUIRED[stage]:
            if not (
                self.finished(earlier) or (stage == "score" and earlier == "unet" and self.unet_file.exists())
            ):
                raise TrainingError(f"The stage {stage} needs {earlier}, which is not finished.")

    @property
    def unet_file(self) -> Path:
        return self.weights / POCKET / "unet" / "diffusion_pytorch_model.safetensors"

    def machine(self) -> dict[str, str]:
        cuda = self.device.startswith("cuda")
        return {
            "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
            "precision": str(self.dtype).removeprefix("torch."),
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
            "date": datetime.date.today().isoformat(),
        }


def _float32(kind: Any, folder: Path) -> Any:
    """A network of ours from its fp16 file: frozen, in float32, whatever the library's own default."""
    with quiet_libraries():
        name = "dtype" if kind.__module__.startswith("transformers") else "torch_dtype"
        return kind.from_pretrained(folder, **{name: torch.float32}).requires_grad_(False).eval()


def store(network: Any, folder: Path) -> None:
    """In fp16, under a config that says float32: whoever loads it plainly computes in float32.

    The network itself is rounded too. Files are replaced one by one, so that there is a whole model at any time.
    """
    with tempfile.TemporaryDirectory(dir=_made(folder.parent)) as unfinished, quiet_libraries():
        nn.Module.to(network, torch.float16).save_pretrained(unfinished, safe_serialization=True)
        nn.Module.to(network, torch.float32)
        config = Path(unfinished) / "config.json"
        settings = json.loads(config.read_text())
        settings.pop("_name_or_path", None)
        for part in (settings, settings.get("text_config", {}), settings.get("vision_config", {})):
            if "dtype" in part:
                part["dtype"] = "float32"
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        for file in sorted(Path(unfinished).iterdir(), reverse=True):  # weights before config
            file.replace(_made(folder) / file.name)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fingerprint(weights: Mapping[str, Tensor] | Path) -> str:
    """Eight letters that change with the weights: names of caches, and of what something was made from."""
    if isinstance(weights, Path):
        return hashlib.blake2b(weights.read_bytes(), digest_size=4).hexdigest()
    content = hashlib.blake2b(digest_size=4)
    for name, value in sorted(weights.items()):
        content.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return content.hexdigest()


# --- the VAE ----------------------------------------------------------------------------------------

# Share of the steps in which the encoder imitates components and the decoder reads the true ones.
_IMITATING = 0.25
# From this share of the steps on: so many crops of so many pixels. Small crops of many pictures teach much faster
# than few large ones at the same cost; at the end it sees pictures as they are.
_CROPS = ((0.0, 32, 32), (0.6, 8, 64), (0.85, 2, RESOLUTION))


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
        images = _flipped(torch.stack(cut), lot)
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
            "edges": 0.25 * _edges(error),
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
    vae = shop.vae().to(memory_format=torch.channels_last)
    network = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    network.requires_grad_(True)

    def loss(step: int) -> Losses:
        lot = generator_for("decoder", step)
        count, side = (8, 64) if step < 0.7 * plan.steps else (2, RESOLUTION)
        source = sources[step % 2]
        known = len(source) if source is shop.train else VIEWS * known_individuals(source)
        rows = torch.randint(known, (count,), generator=lot).tolist()
        images = as_float(_flipped(source.images(rows), lot)).to(
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
        return {"error": error.abs().mean(), "squares": error.square().mean(), "edges": 0.5 * _edges(error)}

    trained, took = shop.fit("decoder", network, loss)
    vae.decoder, vae.post_quant_conv = trained["decoder"], trained["post_quant_conv"]
    store(vae, shop.weights / POCKET / "vae")
    shop.note("decoder", **took, **measure_vae(shop))


def known_individuals(individuals: Renders) -> int:
    """How many of them, from the first on, may be trained on."""
    return len(individuals) // VIEWS - HELD_INDIVIDUALS


def _edges(error: Tensor) -> Tensor:
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


def _flipped(images: Tensor, lot: torch.Generator) -> Tensor:
    """Half of them mirrored, by lot."""
    flip = torch.rand(len(images), generator=lot) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


@torch.no_grad()
def _spread(vae: Any, shop: Workshop) -> float:
    """Standard deviation of the latents of 512 pictures."""
    parts = as_float(shop.train.images(range(min(512, len(shop.train))))).to(shop.device).split(32)
    return float(torch.cat([vae.encode(part).latent_dist.mode() for part in parts]).std())


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


# --- latents ----------------------------------------------------------------------------------------

VARIANTS = 2  # of each picture: as it is, and mirrored or cut out of an enlargement
_ENLARGED = (136, 160)


def build_latents(shop: Workshop) -> tuple[Tensor, Tensor]:
    """What the UNet learns from: latents as mean and deviation, and SDXL's time ids.

    Returns: [2 N, 8, 16, 16] float16 scaled by the VAE's factor, and [2 N, 6]; picture i has rows 2 i and 2 i + 1.
    """
    vae, files = shop.vae(), []
    # The decoder may still change; latents are of this encoder.
    own = fingerprint({k: v for k, v in vae.state_dict().items() if k.startswith(("encoder", "quant"))})
    vae, shards = vae.to(memory_format=torch.channels_last), len(shop.train.files)
    with progress("latents", shards) as bar:
        for shard in range(shards):
            file = shop.folder / "latents" / own / f"{shard:04d}.npz"
            if not file.exists():
                _encode_shard(shop, vae, shard, file)
            files.append(file)
            bar(shard + 1)
    parts = [np.load(file) for file in files]
    latents = torch.cat([torch.from_numpy(part["latents"]) for part in parts])
    return latents, torch.cat([torch.from_numpy(part["time_ids"]) for part in parts])


@torch.no_grad()
def _encode_shard(shop: Workshop, vae: Any, shard: int, file: Path) -> None:
    latents, time_ids = [], []
    for begin in range(shard * renders.SHARD, (shard + 1) * renders.SHARD, 16):
        images, ids = [], []
        for index, image in enumerate(shop.train.images(range(begin, begin + 16)), start=begin):
            for variant in range(VARIANTS):
                seen, own = varied(image, generator_for("latents", index, variant), variant)
                images.append(seen)
                ids.append(own)
        batch = as_float(torch.stack(images)).to(shop.device)
        with mixed(shop.device, shop.dtype):
            posterior = vae.encode(batch).latent_dist
        both = torch.cat([posterior.mean, posterior.std], dim=1).float() * vae.config.scaling_factor
        latents.append(both.to(torch.float16).cpu())
        time_ids.append(torch.tensor(ids))
    with appearing(file) as unfinished, unfinished.open("wb") as handle:
        np.savez(handle, latents=torch.cat(latents).numpy(), time_ids=torch.cat(time_ids).numpy())


def varied(image: Tensor, lot: torch.Generator, variant: int) -> tuple[Tensor, list[float]]:
    """A picture [3, R, R] as bytes, and its SDXL time ids (original height and width, crop top and left, target).

    Variant 0 is the picture itself; half of these say that they were larger once, as photos were. Variant 1 is
    mirrored, or, every other time, a square out of an enlargement, with what was cut off in the ids.
    """
    chance = torch.rand(4, generator=lot).tolist()
    original, top, left = RESOLUTION, 0, 0
    if variant and chance[0] < 0.5:
        original = _ENLARGED[0] + int(chance[1] * (_ENLARGED[1] - _ENLARGED[0] + 1))
        top, left = (int(part * (original - RESOLUTION + 1)) for part in chance[2:])
        big = F.interpolate(image[None].float(), original, mode="bicubic", antialias=True)[0]
        image = big[:, top : top + RESOLUTION, left : left + RESOLUTION].round().clamp(0, 255).to(torch.uint8)
    else:
        image = image.flip(-1) if variant else image
        if chance[1] < 0.5:
            original = round(RESOLUTION * 2 ** (5 * chance[2]))
    return image, [float(n) for n in (original, original, top, left, RESOLUTION, RESOLUTION)]


# --- the UNet and its text encoders ------------------------------------------------------------------


class Conditioned(nn.Module):
    """UNet and both text encoders, trained together."""

    def __init__(self) -> None:
        super().__init__()
        text, text_2 = text_configs(POCKET)
        self.unet = UNet2DConditionModel(**unet_config(POCKET))
        self.text_encoder = CLIPTextModel(text)
        self.text_encoder_2 = CLIPTextModelWithProjection(text_2)

    def words(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, 77] -> embeddings [B, 77, C] and pooled [B, P], as SDXL's pipeline makes them."""
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids_2, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def spoken(text: str, scene: Scene, lot: torch.Generator) -> str:
    """A caption as people write them to a model: one in four names the thing with a word that means nothing before it,
    "a photo of xqv mug" or "a photo of a xqv red mug", so that the networks learn to pass over such words until
    someone gives them a meaning."""
    chance, article = torch.rand(2, generator=lot).tolist()
    count = int(torch.randint(2, 6, (), generator=lot))
    word = "".join(chr(letter) for letter in torch.randint(97, 123, (count,), generator=lot).tolist())
    if chance >= 0.25:
        return text
    thing = re.compile(rf"\ban? ((?:(?:{scene.colour}|{scene.pattern}) )*{scene.kind})\b")
    return thing.sub(rf"{word} \1" if article < 0.6 else rf"a {word} \1", text, count=1)


def build_unet(shop: Workshop) -> None:
    latents, time_ids = build_latents(shop)
    scenes = list(shop.train.scenes())
    first, second = tokenizer_pair(vocabulary())
    if len(first) > text_configs(POCKET)[0].vocab_size:
        raise TrainingError(
            f"The tokenizers have {len(first)} tokens, more than the text encoders' embeddings."
        )
    scheduler = DDPMScheduler.from_config(euler_scheduler().config)
    torch.manual_seed(stable_seed("unet"))
    networks, start = Conditioned(), _unet_so_far(shop)
    if start["start"]:
        for name, network in networks.named_children():
            network.load_state_dict(_float32(type(network), shop.weights / POCKET / name).state_dict())
    networks.unet.to(memory_format=torch.channels_last)
    if shop.device == "cpu":
        # The backward of fused attention on CPUs takes half of a step; written out, it takes a tenth.
        networks.unet.set_attn_processor(AttnProcessor())
        for encoder in (networks.text_encoder, networks.text_encoder_2):
            encoder.set_attn_implementation("eager")

    def loss(step: int) -> Losses:
        lot = generator_for("unet", step)
        rows = torch.randint(len(latents), (BATCH,), generator=lot)
        said = [
            spoken(caption(scenes[row // VARIANTS], f"{step} {place}"), scenes[row // VARIANTS], lot)
            for place, row in enumerate(rows.tolist())
        ]
        kept = (torch.rand(BATCH, generator=lot) >= DROPPED).to(shop.device)
        steps = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=lot)
        mean, deviation = latents[rows].float().chunk(2, dim=1)
        clean = mean + deviation * torch.randn(mean.shape, generator=lot)
        noise = torch.randn(mean.shape, generator=lot)
        clean, noise, steps = clean.to(shop.device), noise.to(shop.device), steps.to(shop.device)
        noisy = scheduler.add_noise(clean, noise, steps).to(memory_format=torch.channels_last)
        ids, ids_2 = (
            tokenizer(said, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(
                shop.device
            )
            for tokenizer in (first, second)
        )
        with mixed(shop.device, shop.dtype):
            words, pooled = networks.words(ids, ids_2)
            # Zeros are what SDXL's pipeline takes where there is no negative prompt.
            words, pooled = words * kept[:, None, None], pooled * kept[:, None]
            added = {"text_embeds": pooled, "time_ids": time_ids[rows].to(shop.device)}
            guess = networks.unet(noisy, steps, words, added_cond_kwargs=added, return_dict=False)[0]
        error = (guess.float() - noise).square().mean(dim=(1, 2, 3))
        snr = compute_snr(scheduler, steps)
        weight = snr.clamp(max=5.0) / snr  # min-SNR, arXiv 2303.09556
        return {"loss": (weight * error).mean()}

    trained, took = shop.fit("unet", networks, loss, **start)
    store_pocket(shop, trained)
    shop.note("unet", **took)


def _unet_so_far(shop: Workshop) -> dict[str, Any]:
    """Steps and seconds of a UNet that was cut short, averaged and stored; a checkpoint takes precedence."""
    known = shop.record().get("unet", {})
    return {"start": known.get("steps", 0), "seconds": known.get("seconds", 0.0)}


def store_unfinished(shop: Workshop) -> int:
    """Store the averaged weights of a UNet still in training, as if it were done, and return its steps.

    Raises: TrainingError if there is no checkpoint, or one that is behind what is stored.
    """
    networks = Conditioned()
    steps, seconds = read_average("unet", shop.folder, networks)
    if steps < _unet_so_far(shop)["start"]:
        raise TrainingError(
            f"The checkpoint in {shop.folder} has {steps} steps, and more are stored already."
        )
    store_pocket(shop, networks)
    shop.note("unet", steps=steps, of=shop.plans["unet"].steps, seconds=round(seconds), **shop.machine())
    return steps


def store_pocket(shop: Workshop, networks: Conditioned) -> None:
    """All that from_pretrained wants beside the VAE."""
    for name, network in networks.named_children():
        store(network, shop.weights / POCKET / name)
    first, second = tokenizer_pair(vocabulary())
    with quiet_libraries():
        first.save_pretrained(shop.weights / POCKET / "tokenizer")
        second.save_pretrained(shop.weights / POCKET / "tokenizer_2")
        euler_scheduler().save_pretrained(shop.weights / POCKET / "scheduler")
        pipe = StableDiffusionXLPipeline(
            vae=shop.vae(),
            text_encoder=networks.text_encoder,
            text_encoder_2=networks.text_encoder_2,
            tokenizer=first,
            tokenizer_2=second,
            unet=networks.unet,
            scheduler=euler_scheduler(),
            add_watermarker=False,
        )
        pipe.save_config(shop.weights / POCKET)


# --- what looks at pictures: pocket-clip, pocket-dino, the judges -------------------------------------


def _processor(name: str, folder: Path, **sizes: Any) -> None:
    """How the network wants its pictures, -1..1, under the name that the big namesake's processor has."""
    with quiet_libraries():
        import transformers

        # With Pillow alone: the other kind wants torchvision.
        kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
        kind(**sizes, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | {"image_processor_type": name}
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def through_vae(shop: Workshop, source: Renders, pictures: int) -> Renders:
    """The first pictures of a set after a round trip, kept as files of their own for each VAE."""
    vae, files = shop.vae(), []
    own = fingerprint(shop.weights / POCKET / "vae" / "diffusion_pytorch_model.safetensors")
    with progress(f"{source.name} through the VAE", pictures) as bar:
        for shard in range(pictures // renders.SHARD):
            file = shop.folder / f"renders-vae-{own}" / f"{source.name}-{shard:04d}.npy"
            if not file.exists():
                values = []
                for begin in range(shard * renders.SHARD, (shard + 1) * renders.SHARD, 32):
                    images = as_float(source.images(range(begin, begin + 32))).to(shop.device)
                    with torch.no_grad(), mixed(shop.device, shop.dtype):
                        seen = round_trip(vae, images)
                    values.append(seen.mul(255.0).add(0.5).to(torch.uint8).cpu())
                with appearing(file) as unfinished, unfinished.open("wb") as handle:
                    np.save(handle, torch.cat(values).numpy())
            files.append(file)
            bar((shard + 1) * renders.SHARD)
    return Renders(source.name, tuple(files))


def _shifted(images: Tensor, lot: torch.Generator, reach: int = 8) -> Tensor:
    """Pictures moved by up to `reach` pixels, all of a batch alike, edges continued."""
    y, x = torch.randint(0, 2 * reach + 1, (2,), generator=lot).tolist()
    side = images.shape[-1]
    wide = F.pad(images.float(), (reach,) * 4, mode="replicate")
    return wide[..., y : y + side, x : x + side].to(images.dtype)


def _either(plain: Renders, seen: Renders, indices: Sequence[int], lot: torch.Generator) -> Tensor:
    """Each picture plain or, where there is one, by lot its round trip."""
    coin = torch.rand(len(indices), generator=lot) < 0.5
    return torch.cat(
        [
            (seen if index < len(seen) and chance else plain).images([index])
            for index, chance in zip(indices, coin.tolist(), strict=True)
        ]
    )


def _some(rows: Sequence[int], count: int, lot: torch.Generator) -> list[int]:
    return [rows[i] for i in torch.randint(len(rows), (count,), generator=lot).tolist()]


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
        rows = _some([row for place in several for row in places[place]], CLIP_BATCH, lot)
        images = _flipped(_shifted(_either(train, seen, rows, lot), lot), lot)
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
    _processor("CLIPImageProcessor", folder, size={"shortest_edge": RESOLUTION}, crop_size=square)
    shop.note("clip", **took, **measure_clip(shop))


@torch.no_grad()
def measure_clip(shop: Workshop, count: int = 480) -> dict[str, float]:
    """How often the right setting, and the right kind, is the nearest of all phrases, on held-out pictures."""
    network = _float32(CLIPModel, shop.weights / POCKET_CLIP).to(shop.device)
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
            chosen += _some(own, 8, lot)
        chosen = sorted(set(chosen))
        views = [torch.randperm(VIEWS, generator=lot)[:3].tolist() for _ in chosen]
        rows = [number * VIEWS + view for number, some in zip(chosen, views, strict=True) for view in some]
        labels = torch.tensor([row // VIEWS for row in rows], device=shop.device)
        images = _shifted(_either(plain, seen, rows, lot), lot)
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
    _processor("ViTImageProcessor", folder, size={"height": RESOLUTION, "width": RESOLUTION})
    shop.note("dino", **took, **measure_dino(shop))


@torch.no_grad()
def measure_dino(shop: Workshop) -> dict[str, float]:
    """On individuals that it was not trained on: mean cosine of two pictures of the same one, and of two of the same
    kind, and how often a picture's nearest other one shows the same individual."""
    network = _float32(ViTModel, shop.weights / POCKET_DINO).to(shop.device)
    first = known_individuals(shop.individuals)
    rows = range(first * VIEWS, (first + HELD_INDIVIDUALS) * VIEWS)
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


def build_judges(shop: Workshop) -> None:
    train, seen = shop.train, through_vae(shop, shop.train, min(ROUND_TRIPS["train"], len(shop.train)))
    right = truth(list(train.scenes()))
    torch.manual_seed(stable_seed("judges"))
    network = Judges().to(memory_format=torch.channels_last)

    def loss(step: int) -> Losses:
        lot = generator_for("judges", step)
        rows = torch.randint(len(train), (64,), generator=lot)
        images = _flipped(_shifted(_either(train, seen, rows.tolist(), lot), lot), lot)
        with mixed(shop.device, shop.dtype):
            guesses = network(as_float(images).to(shop.device, memory_format=torch.channels_last))
        return judging_losses(guesses, {name: answer[rows].to(shop.device) for name, answer in right.items()})

    trained, took = shop.fit("judges", network, loss)
    folder = shop.weights / "judges"
    folder.mkdir(parents=True, exist_ok=True)
    with appearing(folder / "model.safetensors") as unfinished:
        save_file({name: _half(value) for name, value in trained.state_dict().items()}, unfinished)
    shop.note("judges", **took, **measure_judges(shop))


def _half(value: Tensor) -> Tensor:
    return value.to(torch.float16 if value.is_floating_point() else value.dtype).contiguous()


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


# --- the score ---------------------------------------------------------------------------------------


def score(shop: Workshop, captions: int = 500, steps: int = 25, guidance: float = 5.0) -> dict[str, float]:
    """What the judges see in pictures of random captions: of what each caption names, the share that is there.

    Raises: TrainingError if a judge is not to be trusted.
    """
    judges = trusted_judges(shop.weights).to(shop.device)
    with quiet_libraries():
        pipe = StableDiffusionXLPipeline.from_pretrained(shop.weights / POCKET).to(shop.device)
        pipe.set_progress_bar_config(disable=True)
    scenes = [sample_scene(stable_seed("score", i)) for i in range(captions)]
    said = [caption(scene, f"score {i}") for i, scene in enumerate(scenes)]
    right = truth(scenes)
    hits = {name: [0, 0] for name in QUESTIONS}
    with progress("pictures to judge", captions) as bar:
        for begin in range(0, captions, SCORED_TOGETHER):
            own = range(begin, min(begin + SCORED_TOGETHER, captions))
            images = pipe(
                [said[i] for i in own],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[generator_for("score", i) for i in own],
                output_type="pt",
            ).images
            # As a file would hold them.
            images = (images * 255.0).round() / 127.5 - 1.0
            answers = judges.answers(images)
            for place, i in enumerate(own):
                for name in mentioned(scenes[i], said[i]):
                    hits[name][0] += int(answers[name][place].cpu() == right[name][i])
                    hits[name][1] += 1
            bar(own.stop, "  ".join(f"{name} {a / max(b, 1):.3f}" for name, (a, b) in hits.items()))
    found = {name: round(a / b, 4) for name, (a, b) in hits.items() if b}
    shop.note(
        "score",
        **found,
        captions=captions,
        named={name: b for name, (_, b) in hits.items()},
        sampling_steps=steps,
        guidance=guidance,
        unet_steps=shop.record()["unet"]["steps"],
        of=fingerprint(shop.unet_file),
        **shop.machine() | {"precision": "float32"},  # the pipeline's, whatever the stages are trained in
    )
    return found


REQUIRED = {
    "vae": (),
    "decoder": ("vae",),
    "judges": ("decoder",),
    "unet": ("vae",),
    "clip": ("decoder",),
    "dino": ("decoder",),
    "score": ("judges", "unet"),
}
"""What must be finished before a stage. A UNet cut short may be scored."""

STAGES: dict[str, Callable[[Workshop], Any]] = {
    "vae": build_vae,
    "decoder": build_decoder,
    "judges": build_judges,
    "unet": build_unet,
    "clip": build_clip,
    "dino": build_dino,
    "score": score,
}
"""In the order in which they can be made."""
