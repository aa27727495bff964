"""Where the pocket models are made, from what, and how their weights and their record are kept."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from coeffdiff.errors import TrainingError
from coeffdiff.pocket import POCKET
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.console import progress, quiet_libraries
from coeffdiff.utils.locks import try_lock
from pocket_build.fitting import Losses, Plan, fit
from pocket_build.renders import Renders, draw

COUNTS = {"train": 19_200, "heldout": 1_920, "individuals": 9_600}
"""Pictures in each set."""


PLANS = {
    "vae": Plan(4800, 7e-4, cooldown=0.35, weight_decay=0.0, average=0.998),
    "decoder": Plan(9_000, 5e-4, cooldown=0.5, weight_decay=0.0, average=0.998),
    "sharp": Plan(12_000, 2e-4, warmup=300, cooldown=0.5, weight_decay=0.0, average=0.998),
    "unet": Plan(9_500, 6e-4, warmup=300, cooldown=0.35),
    "deep": Plan(3_000, 4e-4, warmup=100, cooldown=0.7),
    "clip": Plan(6000, 1e-3, cooldown=0.5, weight_decay=0.05, average=0.99),
    "dino": Plan(1800, 1e-3, cooldown=0.5, weight_decay=0.05, average=0.99),
    "judges": Plan(6000, 2e-3, cooldown=0.5, weight_decay=0.02, average=0.99),
}


REQUIRED = {
    "vae": (),
    "decoder": ("vae",),
    "sharp": ("decoder",),
    "judges": ("decoder",),
    "unet": ("vae",),
    "deep": ("unet",),
    "clip": ("decoder",),
    "dino": ("decoder",),
    "score": ("judges", "deep"),
    "distances": ("dino", "deep"),
    "detail": ("deep",),
}
"""What must be finished before a stage. A UNet cut short may be measured."""
MEASUREMENTS = ("score", "distances", "detail")
LEADS_TO = {"unet": "deep"}
"""Stages whose weights are nothing but the beginning of another's: they stay in the work folder."""
_SHARD = "15MB"  # no file of the package has more than 16


@dataclass(frozen=True)
class Workshop:
    """Where the work is done, and from what.

    folder: renders, latents, checkpoints; a gigabyte or two, and nothing that cannot be made again.
    weights: what comes out, in the layout that the package ships.
    device, dtype: where and in what precision matrices are multiplied while training.
    workers: processes that render.
    plans: as PLANS, perhaps with other numbers of steps.
    counts: pictures in each set, rounded up to whole files.
    compiled: whether the transformer blocks of UNets are compiled, which wants a C++ compiler on CPUs.
    """

    folder: Path
    weights: Path
    device: str
    dtype: torch.dtype
    workers: int = 1
    plans: dict[str, Plan] = field(default_factory=lambda: dict(PLANS))
    counts: dict[str, int] = field(default_factory=lambda: dict(COUNTS))
    compiled: bool = False

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
        return load_float32(AutoencoderKL, self.weights / POCKET / "vae").to(self.device)

    def networks(self, stage: str) -> Path:
        """The folder of the UNet and the text encoders of one of the two UNet stages."""
        return self.folder / "networks" / stage if stage in LEADS_TO else self.weights / POCKET

    def record(self) -> dict[str, Any]:
        """What every stage took, by its name."""
        file = self.weights / "record.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def note(self, stage: str, **facts: Any) -> None:
        """Put a stage into the record, and its curve beside it."""
        known = self.record() | {stage: facts}
        with atomic_write(self.weights / "record.json", durable=True) as unfinished:
            unfinished.write_text(json.dumps(known, indent=1) + "\n")
        curve = self.folder / f"{stage}.jsonl"
        if curve.exists():
            with atomic_write(self.weights / "curves" / curve.name) as unfinished:
                shutil.copy(curve, unfinished)

    def fit(
        self, stage: str, network: nn.Module, loss: Callable[[int], Losses], **start: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Train to the end of the stage's plan; what it took is to be noted when the weights are stored."""
        plan, curve = self.plans[stage], self.folder / f"{stage}.jsonl"
        before = self.weights / "curves" / curve.name
        if start.get("start") and before.exists() and not curve.exists():  # the rest of it is to follow
            shutil.copy(before, curve)
        result, seconds = fit(stage, self.folder, network, loss, plan, device=self.device, **start)
        return result, {"steps": plan.steps, "seconds": round(seconds), "rate": plan.rate, **self.machine()}

    def so_far(self, stage: str) -> dict[str, Any]:
        """Steps and seconds of a stage that was cut short, averaged and stored; a checkpoint takes precedence."""
        known = {} if self._gone(stage) else self.record().get(stage, {})
        return {"start": known.get("steps", 0), "seconds": known.get("seconds", 0.0)}

    def require_progress(self, stage: str, steps: int) -> None:
        """Raises: TrainingError if more steps of a stage are stored than these of its checkpoint."""
        if steps < self.so_far(stage)["start"]:
            raise TrainingError(
                f"The checkpoint in {self.folder} has {steps} steps, and more are stored already."
            )

    def unfinished_facts(self, stage: str, steps: int, seconds: float) -> dict[str, Any]:
        """For the record of a stage that is under way."""
        return {"steps": steps, "of": self.plans[stage].steps, "seconds": round(seconds), **self.machine()}

    @contextmanager
    def alone(self, stage: str) -> Iterator[None]:
        """Hold a stage from its first step to its weights, so that no other process writes over it in this folder.

        Raises: TrainingError if another one is at it.
        """
        lock = _made(self.folder) / f"{stage}.lock"
        lock.touch()
        with try_lock(lock) as mine:
            if mine is False:
                raise TrainingError(f"Another process is at the stage {stage} in {self.folder}.")
            yield

    def finished(self, stage: str) -> bool:
        """Whether a stage has all steps of its plan; or whether a measurement is of the weights that are there.

        One that only leads to another is finished too once that one has begun or is finished, wherever it was made.
        """
        known = self.record().get(stage, {})
        if stage in MEASUREMENTS:
            return "of" in known and known["of"] == fingerprint(self.weights / POCKET)
        if known.get("steps", -1) < self.plans[stage].steps:
            return False
        return not self._gone(stage) or self._begun(LEADS_TO[stage]) or self.finished(LEADS_TO[stage])

    def _begun(self, stage: str) -> bool:
        return self.so_far(stage)["start"] > 0

    def _gone(self, stage: str) -> bool:
        """Whether the weights of a stage that leads to another were not kept."""
        return stage in LEADS_TO and not self.networks(stage).exists()

    def require(self, stage: str) -> None:
        """Raises: TrainingError if a stage that `stage` builds on is not finished."""
        for earlier in REQUIRED[stage]:
            measurable = stage in MEASUREMENTS and earlier == "deep" and self._begun(earlier)
            if not (self.finished(earlier) or measurable):
                raise TrainingError(f"The stage {stage} needs {earlier}, which is not finished.")

    def machine(self) -> dict[str, str]:
        cuda = self.device.startswith("cuda")
        return {
            "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
            "precision": str(self.dtype).removeprefix("torch."),
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
            "date": datetime.date.today().isoformat(),
        }


def load_float32(kind: Any, folder: Path) -> Any:
    """A network of ours from its fp16 file: frozen, in float32, whatever the library's own default."""
    with quiet_libraries():
        name = "dtype" if kind.__module__.startswith("transformers") else "torch_dtype"
        return kind.from_pretrained(folder, **{name: torch.float32}).requires_grad_(False).eval()


def store(network: Any, folder: Path) -> None:
    """In fp16, under a config that says float32: whoever loads it plainly computes in float32.

    The network itself is rounded too. Files are replaced one by one, the config last, and others of the network go.
    """
    with tempfile.TemporaryDirectory(dir=_made(folder.parent)) as unfinished, quiet_libraries():
        nn.Module.to(network, torch.float16).save_pretrained(
            unfinished, safe_serialization=True, max_shard_size=_SHARD
        )
        nn.Module.to(network, torch.float32)
        config = Path(unfinished) / "config.json"
        settings = json.loads(config.read_text())
        settings.pop("_name_or_path", None)
        for part in (settings, settings.get("text_config", {}), settings.get("vision_config", {})):
            if "dtype" in part:
                part["dtype"] = "float32"
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        new = sorted(Path(unfinished).iterdir(), reverse=True)  # weights before config
        for file in new:
            file.replace(_made(folder) / file.name)
    for file in folder.glob("*.safetensors*"):  # one file where there are shards now, or fewer shards
        if file.name not in {kept.name for kept in new}:
            file.unlink()


def store_processor(name: str, folder: Path, **sizes: Any) -> None:
    """How the network wants its pictures, -1..1, under the name that the big namesake's processor has."""
    with quiet_libraries():
        import transformers

        # With Pillow alone: the other kind wants torchvision.
        kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
        kind(**sizes, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | {"image_processor_type": name}
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fingerprint(weights: Mapping[str, Tensor] | Path) -> str:
    """Eight letters that change with the weights, in memory or in a folder's files: names of caches, and of what
    something was made from."""
    content = hashlib.blake2b(digest_size=4)
    if isinstance(weights, Path):
        for file in sorted(weights.rglob("*.safetensors")):
            content.update(file.relative_to(weights).as_posix().encode() + file.read_bytes())
    else:
        for name, value in sorted(weights.items()):
            content.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return content.hexdigest()
