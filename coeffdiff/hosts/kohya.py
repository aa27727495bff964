"""Files for A1111, Forge, InvokeAI, SD.Next and ComfyUI's own loaders: the LoRA under kohya's names, and an embedding.

These tools add weight changes to a model, and read embeddings from files. Alpha is no weight change, and none of them
computes DoRA as PEFT does; left_out and refuse_kohya say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import save
from torch import Tensor

from coeffdiff.errors import AdapterError
from coeffdiff.hosts.hub.lookup import resolve_adapter
from coeffdiff.method.adapter_file import pack_rows, read_header, read_lora, read_rows, rows_of
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.method.adapter_paths import EMBEDS_FILE, LORA_FILE
from coeffdiff.method.families import SDXL
from coeffdiff.method.lora_layout import lora_pairs, peft_key
from coeffdiff.method.networks import encoders_in
from coeffdiff.utils.atomic import atomic_write
from coeffdiff.utils.output_folder import refuse_unwritable, write_errors


@dataclass(frozen=True)
class Exported:
    """What export_kohya wrote. embeddings: of learned tokens. left_out: what no file could carry."""

    header: AdapterHeader
    lora: Path
    embeddings: tuple[Path, ...]
    left_out: tuple[str, ...]


def export_kohya(adapter: str | Path, output: Path, facts: Mapping[str, str] | None = None) -> Exported:
    """Write the LoRA of an adapter as the file `output`, and a learned token as embeddings/TOKEN.safetensors beside it.

    An embedding that is there already, byte for byte, stays. New ones go again if the LoRA cannot be written.

    facts: further metadata of the training, under kohya's keys (ss_...).
    Raises: AdapterError for an adapter whose effect the file could not carry, or another file of such a name;
        ConfigError if the folder cannot be written.
    """
    folder = resolve_adapter(adapter)
    header = read_header(folder)
    refuse_kohya(header, folder)
    tensors = kohya_tensors(read_lora(folder, header), header, str(folder / LORA_FILE))
    rows = read_rows(folder, header)
    embeddings = {
        output.parent / "embeddings" / f"{_file_name(subject.token)}.safetensors": pack_rows(
            rows_of(rows, number)
        )
        for number, subject in enumerate(header.named if rows else ())
    }
    if rows and len(embeddings) < len(header.named):
        raise AdapterError(
            f"{folder} has learned tokens ({', '.join(header.tokens)}) of which two would have one file name, and "
            f"other tools call an embedding by that. {_where_else(header)}"
        )
    if output.exists():
        raise AdapterError(f"{output} exists already. Nothing was changed; name another --output.")
    new = _not_there(embeddings)
    refuse_unwritable(output.parent)
    metadata = {**(facts or {}), **kohya_metadata(header, output.stem), "format": "pt"}
    with write_errors(str(output)):
        _write_all({**new, output: save(tensors, metadata=metadata)})
    return Exported(header, output, tuple(embeddings), left_out(header))


def refuse_kohya(header: AdapterHeader, folder: Path) -> None:
    """Raises: AdapterError for an adapter without LoRA, and for a DoRA."""
    if not header.lora:
        held = "alpha, which is no change of weights" if header.heads else "a learned token"
        hint = (
            f" Its {EMBEDS_FILE} is an embedding file of other tools already; copy it into their embeddings folder as "
            f"{_file_name(header.token)}.safetensors."
        )
        raise AdapterError(
            f"{folder} has no LoRA ({header.kind}): it holds {held}. A kohya file can hold LoRA alone."
            f"{hint if header.vectors and not header.subjects else ''} {_where_else(header)}"
        )
    if header.lora.dora:
        raise AdapterError(
            f"{folder} is a DoRA. The tools that read kohya files scale a DoRA by other norms than PEFT, which trained "
            f"it, so their pictures would be of another adapter. {_where_else(header)}"
        )


def left_out(header: AdapterHeader) -> tuple[str, ...]:
    """Sentences about what the files cannot carry, and what that is likely to cost."""
    if not header.heads:
        return ()
    return (
        f"alpha of {len(header.heads)} layers is left out: it recombines attention {header.mixes}, which no LoRA file "
        "can hold. Other tools draw with the LoRA alone. In our comparisons on the small model pocket that scored no "
        f"worse; on full-size models it has not been measured. {_where_else(header)}",
    )


def _where_else(header: AdapterHeader) -> str:
    if header.base_family is not SDXL or encoders_in(header.heads):  # which the node refuses
        return "coeffdiff, and diffusers with load_adapter, run it whole."
    return "coeffdiff, diffusers and the ComfyUI node of coeffdiff run it whole."


def kohya_tensors(tensors: Mapping[str, Tensor], header: AdapterHeader, origin: str) -> dict[str, Tensor]:
    """lora_unet_X.{lora_down.weight, lora_up.weight, alpha} from the tensors of a LORA_FILE.

    Each module has its alpha: readers take the rank for one that is missing, another strength where the two differ.
    Raises: AdapterError for tensors that are no LoRA of the header's rank.
    """
    assert header.lora is not None
    pairs = lora_pairs(dict(tensors), origin)
    if odd := [module for module, (down, _) in pairs.items() if len(down) != header.lora.rank]:
        raise AdapterError(f"{origin}: {odd[0]} has not the rank {header.lora.rank} that its adapter names.")
    converted: dict[str, Tensor] = convert_state_dict_to_kohya({peft_key(k): t for k, t in tensors.items()})
    alpha = torch.tensor(float(header.lora.alpha))
    return {key: alpha.clone() if key.endswith(".alpha") else t.contiguous() for key, t in converted.items()}


def kohya_metadata(header: AdapterHeader, title: str) -> dict[str, str]:
    """What other tools show of a LoRA, under kohya's and the model specification's keys."""
    assert header.lora is not None
    trigger = ", ".join(header.calls)
    side = f"{header.resolution}x{header.resolution}"
    return {
        **header.base_family.kohya,
        "ss_sd_model_name": _model_name(header.base_model),
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(header.lora.rank),
        "ss_network_alpha": f"{header.lora.alpha:g}",
        "ss_steps": str(header.trained_steps),
        "ss_resolution": f"({header.resolution}, {header.resolution})",
        "ss_output_name": title,
        "ss_training_comment": f"LoRA of a coeffdiff adapter ({header.kind}); trigger: {trigger}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.resolution": side,
        "modelspec.trigger_phrase": trigger,
        "coeffdiff_versions": json.dumps(header.versions, ensure_ascii=False),
    }


def _model_name(base_model: str) -> str:
    """A hub id as it is; of a path its name alone, which is nobody's home folder."""
    path = Path(base_model)
    return path.name if path.is_absolute() else base_model


def _file_name(token: str) -> str:
    """The token as a file name; other tools call an embedding by that name."""
    return "".join(c if c.isalnum() or c in "-_. " else "_" for c in token)


def _not_there(embeddings: Mapping[Path, bytes]) -> dict[Path, bytes]:
    """The embeddings that are still to be written. Raises: AdapterError for another one of the same name."""
    new = {file: content for file, content in embeddings.items() if not file.exists()}
    for file in embeddings.keys() - new.keys():
        there = None
        with suppress(OSError):
            there = file.read_bytes()
        if there != embeddings[file]:
            raise AdapterError(
                f"{file} exists already and is another embedding. Nothing was changed; name an --output in another "
                "folder."
            )
    return new


def _write_all(files: Mapping[Path, bytes]) -> None:
    """All of them or none."""
    written = []
    try:
        for file, content in files.items():
            with atomic_write(file, durable=True) as temporary:
                temporary.write_bytes(content)
            written.append(file)
    except BaseException:
        for file in written:
            with suppress(OSError):
                file.unlink()
        raise
