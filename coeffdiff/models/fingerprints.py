"""Fingerprints of weights: of a base model's files from a sample of them, of a loaded network from all of it.

    fingerprints(base, dtype)     {"unet": "rounded/exact", ..., "scheduler": "beta_end=0.012, ..."}
    changed(before, now)          the networks that differ
    network_fingerprint(network)  of a network in memory

The files' take a second for SDXL's 7 GB, and nothing is loaded.

Of every tensor 64 values count, at four places, and tensors of up to 256 values wholly. Whatever trains or merges a
model changes nearly every value, so that is enough to tell two models apart; a file in which somebody has changed a
few bytes by hand is not noticed. Names and order do not count, so shards, folders and single files of the same model
are equal (but for the second text encoder, which single files lay out otherwise: it is then not compared).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from coeffdiff.models.architecture import config_of, scheduler_config
from coeffdiff.models.checking import header_of
from coeffdiff.models.files import weight_files
from coeffdiff.models.source import UNET, VAE, Backbone
from coeffdiff.utils.console import quiet_libraries
from coeffdiff.utils.hashing import hash_tensors

_RUNS, _RUN = 4, 16  # places in a tensor, values that are read at each
_SMALL = 256  # a tensor of up to so many values is read whole
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_OTHER_LAYOUT = "open_clip:"  # before the fingerprint of a network that cannot be compared with a folder's
# Of transformers' configs, which grow with its version, what decides what an encoder computes
_OF_ENCODERS = ("hidden_act", "num_attention_heads", "num_hidden_layers", "layer_norm_eps", "eos_token_id")
# Of a scheduler's config what the model was trained with; the rest is how pictures are made
_OF_SCHEDULERS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr"),
)
LABELS = {
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "first text encoder",
    "text_encoder_2": "second text encoder",
    "scheduler": "noise schedule",
}


def fingerprints(base: Backbone, dtype: torch.dtype) -> dict[str, str]:
    """Of each network as load_pipeline(dtype=dtype) would take it, and of the noise schedule.

    A network's has two parts, of its values rounded to float16, so that variants of one model agree, and of its exact
    values. Networks whose files would have to be downloaded first are left out.
    Raises: ModelError for files that are damaged.
    """
    result = {"scheduler": _schedule(scheduler_config(base))}
    for network in base.networks:
        rounded, exact = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
        files = weight_files(base, network, dtype)
        tensors = sorted(sample for file, prefix in files for sample in _samples(file, prefix))
        if not tensors:
            continue
        config = _decisive(network, config_of(base, network)).encode()
        for digest, place in ((rounded, 0), (exact, 1)):
            digest.update(config)
            for tensor in tensors:
                digest.update(tensor[place])
        layout = _OTHER_LAYOUT if network == "text_encoder_2" and files[0][1] else ""
        result[network] = f"{layout}{rounded.hexdigest()}/{exact.hexdigest()}"
    return result


def changed(before: Mapping[str, str], now: Mapping[str, str], *, exactly: bool = True) -> list[str]:
    """What both know and is not the same in both. exactly: not only up to float16's rounding."""

    def same(one: str, other: str) -> bool:
        if one.startswith(_OTHER_LAYOUT) != other.startswith(_OTHER_LAYOUT):
            return True
        return one == other if exactly else one.partition("/")[0] == other.partition("/")[0]

    return [name for name in LABELS if name in before and name in now and not same(before[name], now[name])]


def network_fingerprint(network: Any) -> str:
    """A hash of what decides what a network computes: its weights, their dtype and, of diffusers' networks, the config
    (that of transformers' grows with its version)."""
    digest = hashlib.blake2b(digest_size=16)
    config = network.config if isinstance(network.config, dict) else {}
    known = {k: v for k, v in config.items() if not k.startswith("_") and k != "quantization_config"}
    digest.update(repr(sorted(known.items())).encode())
    hash_tensors(digest, network.state_dict().items())
    return digest.hexdigest()


def _samples(file: Path, prefix: str) -> Iterator[tuple[bytes, bytes]]:
    """(rounded, exact) bytes of each tensor of numbers whose name has the prefix."""
    header = header_of(file)
    with file.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        for name, entry in header.items():
            if name == "__metadata__" or not name.startswith(prefix) or entry["dtype"] not in _DTYPES:
                continue
            dtype = _DTYPES[entry["dtype"]]
            first, end = entry["data_offsets"]
            count = (end - first) // dtype.itemsize
            runs = [(0, count)] if count <= _SMALL else _places(count)
            values = b""
            for place, length in runs:
                opened.seek(start + first + place * dtype.itemsize)
                values += opened.read(length * dtype.itemsize)
            size = f"{count}:".encode()
            half = torch.frombuffer(bytearray(values), dtype=dtype).half() if values else torch.zeros(0)
            yield size + half.numpy().tobytes(), f"{dtype}:".encode() + size + values


def _places(count: int) -> list[tuple[int, int]]:
    return [(i * (count - _RUN) // (_RUNS - 1), _RUN) for i in range(_RUNS)]


def _decisive(network: str, config: Mapping[str, Any]) -> str:
    """The part of a config that decides what a network computes, less what is at its default anyway: a newer library
    writes more of those."""
    with quiet_libraries():
        if network.startswith("text"):
            from transformers import CLIPTextConfig

            defaults = CLIPTextConfig().to_dict()
            known = {name: defaults.get(name) for name in _OF_ENCODERS}
        else:
            import diffusers

            kind = {"vae": VAE, "unet": UNET}[network].kind
            parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
            known = {name: parameter.default for name, parameter in parameters.items()}
            known.pop("sample_size", None)  # a size of pictures, not of the network
    known = json.loads(json.dumps(known, default=str))
    return json.dumps(
        {k: v for k, v in config.items() if k in known and v != known[k]}, sort_keys=True, default=str
    )


def _schedule(config: Mapping[str, Any]) -> str:
    """In words, so that a difference can be shown."""
    with quiet_libraries():
        from diffusers import DDPMScheduler

        parameters = inspect.signature(DDPMScheduler.__init__).parameters
    values = {name: config.get(name, parameters[name].default) for name in _OF_SCHEDULERS}
    if values["trained_betas"] is not None:
        betas = json.dumps(list(values["trained_betas"])).encode()
        values["trained_betas"] = hashlib.blake2b(betas, digest_size=8).hexdigest()
    return ", ".join(f"{name}={value}" for name, value in sorted(values.items()))[:900]
