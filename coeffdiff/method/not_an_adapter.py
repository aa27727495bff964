"""What a path is that was taken for an adapter and is none: a LoRA of other tools, a model, a picture, and what to do.

Only names and the header of a safetensors file are looked at, never its tensors; pickles are not opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path

_LARGEST_HEADER = 100 * 2**20
_PLAIN_LORA = "pytorch_lora_weights.safetensors"  # diffusers' name
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif", ".heic")
_LYCORIS = re.compile(r"\.(hada_|lokr_|oft_|glora_|lora_mid)|\.diff$|\.on_input$")


def what_it_is(path: Path) -> str:
    """One sentence for AdapterError: what the existing `path` is, and what to do with it."""
    if path.is_file():
        return _of_file(path)
    files = sorted(file.name for file in path.iterdir() if file.is_file()) if path.is_dir() else []
    tensors = [name for name in files if name.endswith(".safetensors")]
    tensors = tensors or [name for name in files if name.endswith(PICKLES)]
    telling = [name for name in files if name != _PLAIN_LORA or not _is_other(path)]
    if named := by_names(str(path), telling):
        return named
    if len(tensors) == 1:
        return _of_file(path / tensors[0])
    if "config.json" in files:
        return f"{path} is a part of a model (it has a config.json) and no adapter. {_NAME_ONE}"
    return f"{path} is no adapter: it has no coeff.safetensors. {_NAME_ONE}{listed(files)}"


def by_names(where: str, files: Collection[str]) -> str | None:
    """What a folder or repository is by the names of its files alone; None if they do not say."""
    if "model_index.json" in files:
        return f"{where} is a base model in diffusers' layout and no adapter; name it with --model."
    if "adapter_config.json" in files:
        return f"{where} holds an adapter of PEFT's alone, without coeff.safetensors. {_BESIDE}"
    if _PLAIN_LORA in files:
        return (
            f"{where} holds a plain LoRA without coeff.safetensors; load it with diffusers' load_lora_weights, "
            "before or after coeffdiff's own adapters."
        )
    return None


def listed(files: Sequence[str]) -> str:
    """ " It holds a, b, c, d, e, ...", or nothing for no files."""
    return f" It holds {', '.join(files[:5])}{', ...' if len(files) > 5 else ''}." if files else ""


_NAME_ONE = "Name a run folder or its adapter folder."
_BESIDE = (
    "It is not coeffdiff's: load it with diffusers' pipe.load_lora_weights, before or after coeffdiff's own "
    "adapters."
)


def _is_other(folder: Path) -> bool:
    """Whether the file of diffusers' name holds something else than diffusers' LoRA."""
    names, _ = read_names(folder / _PLAIN_LORA)
    return not any(".lora_A." in name or ".lora.down." in name for name in names)


def _of_file(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in PICTURES:
        return f"{file} is a picture and no adapter. {_NAME_ONE}"
    if suffix in PICKLES:
        return f"{file} is a pickled file ({suffix}){_pickled(file)}"
    if other := no_tensors(file):
        return f"{file} is {other}"
    named = name_of_tensors(file)
    return f"{file} is {named}" if named else f"{file} is no adapter, and no file of one. {_NAME_ONE}"


def _pickled(file: Path) -> str:
    """The rest of a sentence about a pickle, by words in its first bytes: it is not unpickled."""
    closed = "A pickle may run code when it is opened, so it is not"
    if b"string_to_param" in _start(file, 2**20):
        return (
            f" that looks like a textual inversion of A1111 (embeddings of a word). {closed}; load it with diffusers' "
            "pipe.load_textual_inversion, if you trust it."
        )
    if file.suffix.lower() == ".ckpt":
        return f", as checkpoints of whole models are. {closed}; convert it to .safetensors and name it with --model."
    return f". {closed}; coeffdiff's adapters are folders with safetensors. {_NAME_ONE}"


def no_tensors(file: Path) -> str | None:
    """What lies in place of a safetensors file, and what to do; None for what may be one."""
    start = _start(file, 64)
    if start.startswith(b"version https://git-lfs"):
        return (
            "a git-lfs pointer and not the file itself; run `git lfs pull` in its folder, or download it with "
            "`hf download`."
        )
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page and not the file that it should be; download it again, for instance with `hf download`."
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "a zip file or a pickle, which is not opened, and no safetensors file."
    return None


def name_of_tensors(file: Path) -> str | None:
    """What a safetensors file is by the names of its tensors, and what to do; None for files that have none."""
    names, metadata = read_names(file)
    return _named(names, metadata) if names else None


def _start(file: Path, size: int) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(size)
    except OSError:
        return b""


def _named(names: list[str], metadata: dict[str, str]) -> str:
    """By the names of the tensors, which each tool has its own way of."""

    def any_(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    def begins(*parts: str) -> bool:
        return any(name.startswith(parts) for name in names)

    if "coeffdiff" in metadata:
        return (
            "the coeff.safetensors of an adapter under another name: give it that name, in a folder with the files "
            "that came with it, and name the folder."
        )
    if any(_LYCORIS.search(name) for name in names) and begins("lora_", "lycoris_"):
        return (
            "a LyCORIS adapter (LoHa, LoKr or the like) in kohya's layout, which coeffdiff does not read; convert it "
            "to a plain LoRA, and load that with diffusers' pipe.load_lora_weights beside coeffdiff's own adapters."
        )
    if begins("lora_unet_", "lora_te", "lora_prior_"):
        return f"a LoRA in kohya's layout. {_BESIDE}"
    if any_(
        ".lora_A.",
        ".lora_B.",
        ".lora.down.",
        ".lora.up.",
        ".lora_linear_layer.",
        ".lora_down.",
        ".processor.",
    ):
        return f"a LoRA in diffusers' layout, without coeff.safetensors. {_BESIDE}"
    words = all(name.startswith("<") and name.endswith(">") for name in names)  # as diffusers names them
    if {"clip_l", "clip_g", "emb_params", "string_to_param"} & set(names) or words:
        return (
            "a textual inversion (embeddings of a word). It is not coeffdiff's: load it with diffusers' "
            "pipe.load_textual_inversion, once for each text encoder."
        )
    if begins("model.diffusion_model.", "conditioner.", "cond_stage_model."):
        return "a checkpoint of a whole model and no adapter; name it with --model."
    if begins("controlnet_", "control_model.") or any_("controlnet_"):
        return f"a ControlNet and no adapter. {_NAME_ONE}"
    if begins("image_proj", "ip_adapter"):
        return "an IP-Adapter and not coeffdiff's; load it with diffusers' pipe.load_ip_adapter."
    if begins(
        "down_blocks.", "conv_in.", "input_blocks.", "text_model.", "encoder.", "decoder.", "first_stage_"
    ):
        return f"a part of a model (UNet, VAE or text encoder) and no adapter. {_NAME_ONE}"
    shown = "".join(c for c in names[0][:80] if c.isprintable())
    return f"a safetensors file of {len(names):,} tensors such as {shown!r}, none of them coeffdiff's. {_NAME_ONE}"


def read_names(file: Path) -> tuple[list[str], dict[str, str]]:
    """Of a safetensors file in a folder of any name: the tensors' names and the metadata; nothing for other files."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(_LARGEST_HEADER, file.stat().st_size):
                return [], {}
            header = json.loads(opened.read(length))
    except (OSError, ValueError, RecursionError):
        return [], {}
    if not isinstance(header, dict):
        return [], {}
    metadata = header.pop("__metadata__", {})
    return sorted(header), metadata if isinstance(metadata, dict) else {}
