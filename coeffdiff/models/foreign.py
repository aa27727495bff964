"""Single files: which family they are of, and of those that are no base model what they are and what to do.

    family_of_file(header)  the family whose names its tensors have
    foreign_bytes(path)     formats that are not safetensors, whatever the name says
    foreign_model(header)   other models, parts of models, and models with another task

The last two answer with the rest of a sentence that begins with the file's name, or with None. All is told from the
file's first bytes or its header.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coeffdiff.method.families import FAMILIES, NAMED, SD15, SDXL, Family
from coeffdiff.models.source import UNET as UNET_NETWORK
from coeffdiff.models.source import VAE_SETTING, networks_of

UNET = UNET_NETWORK.prefix
CONTROL_KEYS = frozenset(("__metadata__", "v_pred", "ztsnr", "scaled_fp8"))  # beside a UNet's weights
PICKLE = (
    "is a pickle, which can run any code when it is opened, so it is not read; pass the .safetensors file of the same "
    "model, or convert it"
)
_THOSE = "pass --model with one of those or a fine-tune of it"
_BASE = f"pass --model with a base model ({NAMED}) or a fine-tune of it"
NEITHER = f"neither {' nor '.join(family.label for family in FAMILIES.values())}; {_THOSE}"
_FOLDER_OF = "in a folder with its config.json"

_CONDITIONED = r"label_emb\.|add_embedding\."  # pooled text and sizes, in SDXL's UNet
_STEM_OF_UNET = r"input_blocks\.|time_embedding\."
# Stable Diffusion 2 has matrices where 1.5 has convolutions
_PROJECTION = re.compile(r"(input_blocks|down_blocks)\..*\.proj_in\.weight$")

LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit

Names = list[str]
Signatures = tuple[tuple[Callable[[Names], bool], str], ...]


def _holds(pattern: str) -> Callable[[Names], bool]:
    """Whether some tensor's name begins like the pattern; a UNet's own names are without their prefix."""
    return lambda names: any(re.match(pattern, name) for name in names)


def _only(pattern: str) -> Callable[[Names], bool]:
    return lambda names: bool(names) and all(re.match(pattern, name) for name in names)


_OF_ANY: Signatures = (
    (
        _holds(r"(?i).*lora|.*\.(hada_w1|lokr_w1|oft_blocks|dora_scale)|lycoris_"),
        "is a LoRA, not a base model; pass --model with the model it was trained on",
    ),
    (
        _holds(r"edm_(mean|std|vpred)"),
        "was trained in the EDM formulation (Playground 2.5, CosXL), which is not supported; pass --model with a model "
        "that predicts epsilon or v",
    ),
)
# Not of a whole checkpoint: merging tools leave strays of other models in those, which are not read.
_OF_OTHERS: Signatures = (
    (
        _only(r".*\.alpha$"),
        "is an adapter, not a base model; pass --model with the model that it was trained on",
    ),
    (
        _holds(r"ip_adapter\.|image_proj\."),
        f"is an IP-Adapter, not a base model; {_BASE}",
    ),
    (
        _holds(r"control_model\.|controlnet_cond_embedding\.|input_hint_block\.|controlnet_down_blocks\."),
        f"is a ControlNet, not a base model; {_BASE}",
    ),
    (
        _only(r"(clip_l|clip_g|emb_params|string_to_param.*)$"),
        f"is a textual inversion embedding, not a base model; {_BASE}",
    ),
    (
        _only(
            r"first_stage_model\.|encoder\.(conv_in|down|mid|norm_out|conv_)|decoder\.|(post_)?quant_conv\."
        ),
        f"is a VAE alone; pass it as {VAE_SETTING}, {_FOLDER_OF}, and --model with a whole model",
    ),
    (
        _only(r"(text_model|text_projection|logit_scale|encoder\.layers|embeddings|final_layer_norm)\b"),
        "is a text encoder alone; pass --model with a whole model",
    ),
    (
        _holds(r"double_blocks\.\d+\.img_attn\.|single_transformer_blocks\."),
        f"is Flux or a model of its family, {NEITHER}",
    ),
    (
        _holds(r"joint_blocks\.\d+\.|transformer_blocks\.\d+\.attn\.add_k_proj\."),
        f"is Stable Diffusion 3, {NEITHER}",
    ),
    (
        _holds(r"adaln_single\.|y_embedder\.y_proj\."),
        f"is PixArt or a model of its family, {NEITHER}",
    ),
    (
        _holds(r"cond_stage_model\.model\."),
        f"is a Stable Diffusion 2 checkpoint, {NEITHER}",
    ),
    (
        _holds(r"conditioner\.embedders\.0\.model\."),
        f"is SDXL's refiner, not its base; {_BASE}",
    ),
)


def foreign_bytes(path: Path) -> str | None:
    """The rest of a sentence if a file is in another format. Raises: OSError."""
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(b"GGUF") or path.suffix.lower() == ".gguf":
        return (
            "is a GGUF file, whose quantized weights are not read; pass the .safetensors file of the same model in "
            "float16, bfloat16 or float32"
        )
    # A zip archive, as torch saves, or a bare pickle; a safetensors header may have a length that begins so.
    archive = start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
    return PICKLE if archive and int.from_bytes(start, "little") > LARGEST_HEADER else None


def family_of_file(header: Mapping[str, Any]) -> Family:
    """By the names of text encoders, or of what only SDXL's UNet has; SDXL for a file that has neither."""
    names = [name.removeprefix(UNET) for name in header if name not in CONTROL_KEYS]
    if any(re.match(rf"conditioner\.|{_CONDITIONED}", name) for name in names):
        return SDXL
    return SD15 if any(re.match(rf"cond_stage_model\.|{_STEM_OF_UNET}", name) for name in names) else SDXL


def foreign_model(header: Mapping[str, Any]) -> str | None:
    """The rest of a sentence if a file is another model. header: of a safetensors file, as it stands there."""
    names = [name.removeprefix(UNET) for name in header if name not in CONTROL_KEYS]
    family = family_of_file(header)
    prefixes = [network.prefix for network in networks_of(family.name).values()]
    whole = all(any(name.startswith(prefix) for name in header) for prefix in prefixes)
    for fits, sentence in _OF_ANY if whole else _OF_ANY + _OF_OTHERS:
        if fits(names):
            return sentence
    unet = {
        name.removeprefix(UNET): entry["shape"] for name, entry in header.items() if name != "__metadata__"
    }
    first = unet.get("input_blocks.0.0.weight", unet.get("conv_in.weight"))
    if first is None or len(first) != 4:
        return None
    if family is SD15 and any(_PROJECTION.match(name) and len(unet[name]) == 2 for name in unet):
        return f"holds the UNet of Stable Diffusion 2, {NEITHER}"
    sizes = unet.get("label_emb.0.0.weight") or unet.get("add_embedding.linear_1.weight") or []
    if first[0] == 384 and sizes[1:] == [2560]:
        return f"holds the UNet of SDXL's refiner, not of its base; {_BASE}"
    last = unet.get("out.2.weight", unet.get("conv_out.weight")) or [4]
    return other_task(first[1], last[0], family)


def is_unet_alone(header: Mapping[str, Any]) -> bool:
    """Whether a file holds a UNet and no other network: under the names of either layout."""
    names = {name for name in header if name not in CONTROL_KEYS}
    if any(name.startswith(("first_stage_model.", "conditioner.", "cond_stage_model.")) for name in names):
        return False
    own = {name.removeprefix(UNET) for name in names}
    return {"input_blocks.0.0.weight", "time_embed.0.weight"} <= own or {
        "conv_in.weight",
        "time_embedding.linear_1.weight",
    } <= names


def other_task(taken: Any, given: Any, family: Family) -> str | None:
    """The task of a UNet with so many input and output channels; None for a base model's, which has 4 and 4."""
    if (taken, given) == (4, 4):
        return None
    kinds = {"9 to 4": "an inpainting model", "8 to 4": "an instruct-pix2pix model, which edits pictures"}
    kind = kinds.get(f"{taken} to {given}", "a model for another task")
    return f"is {kind}: its UNet maps {taken} channels to {given}, where {family.label}'s base maps 4 to 4; {_BASE}"
