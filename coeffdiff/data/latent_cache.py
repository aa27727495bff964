"""Latents kept on disk, found by the content they were made from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from coeffdiff.data.photos import Photo
from coeffdiff.data.views import View
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.hashing import hash_tensors

CACHE_VERSION = 2
DAY_SECONDS = 86_400.0  # a file that is still half-written after this long was left by a kill
_LARGEST_ENTRY = 64 * 2**20  # bytes; 4096 pixels square take 8 MiB


def cache_folder(cache: Path | str) -> Path:
    """The folder of photos.cache; "auto": coeffdiff/latents in the user's cache folder."""
    if cache != "auto":
        return Path(cache)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "coeffdiff" / "latents"


def cache_key(photo: Photo, view: View, fingerprint: str, device_type: str) -> str:
    """The name of an entry: of the photo and its mask, the VAE (its fingerprint), the device and the view.

    The view holds all that was decided about crop and size, so settings that change no pixel change no key.
    """
    what: tuple[object, ...] = (
        CACHE_VERSION,
        photo.digest,
        fingerprint,
        device_type,
        view.size,
        view.resized,
        view.crop_top_left,
    )
    if photo.mask:
        what += ("mask", photo.mask.path == photo.path, photo.mask.digest)
    return hashlib.sha256(repr((*what, view.flipped)).encode()).hexdigest()


def read_cache(file: Path, masked: bool) -> dict[str, Tensor] | None:
    """The tensors of an entry, or None if it is absent, damaged in any byte, or stored under another's name."""
    expected_names = {"mean", "std"} | ({"mask"} if masked else set())
    try:
        if file.stat().st_size > _LARGEST_ENTRY:
            return None
        with safe_open(file, framework="pt", device="cpu") as opened:
            if set(opened.keys()) != expected_names:
                return None
            stored = {name: opened.get_tensor(name) for name in expected_names}
            expected = (opened.metadata() or {}).get("digest")
        return stored if expected == _entry_digest(file.stem, stored) else None
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError):
        return None


def write_cache(file: Path, tensors: dict[str, Tensor]) -> None:
    """An atomic write. A full or read-only disk costs time at the next run, nothing else."""
    with suppress(OSError), atomic_write(file) as temporary:
        temporary.write_bytes(save(tensors, metadata={"digest": _entry_digest(file.stem, tensors)}))


def _entry_digest(key: str, tensors: Mapping[str, Tensor]) -> str:
    """Of an entry's name, shapes and numbers: safetensors itself notices no changed byte among the numbers."""
    digest = hashlib.blake2b(key.encode(), digest_size=16)
    hash_tensors(digest, sorted(tensors.items()))
    return digest.hexdigest()
