"""An adapter's card as the Hub wants it: the adapter's own README.md, with where it lies, its licence and pictures."""

from __future__ import annotations

from collections.abc import Mapping

import yaml
from huggingface_hub import ModelCard

from coeffdiff.errors import AdapterError
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.method.families import SDXL
from coeffdiff.method.networks import encoders_in
from coeffdiff.pocket import POCKET
from coeffdiff.training.card import front_matter, gallery, usage
from coeffdiff.utils.hub import HUB_ID


def hub_card(
    card: str, header: AdapterHeader, repo: str, pictures: Mapping[str, str], licence: str | None = None
) -> str:
    """The card with all that the Hub shows; what its owner has written into it stays.

    Args:
        card: the text of the adapter's README.md.
        pictures: prompts by the names of the files that they made.
        licence: an identifier of the Hub, such as apache-2.0.
    Raises: AdapterError for front matter that cannot be read.
    """
    try:
        found = ModelCard(card, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise AdapterError(f"The front matter of the adapter's README.md cannot be read: {reason}.") from None
    _complete(found, header, pictures, licence)
    found.text = _body(found.text, header, repo, pictures)
    return str(found)


def _complete(
    card: ModelCard, header: AdapterHeader, pictures: Mapping[str, str], licence: str | None
) -> None:
    """Fill in the front matter: what is there stays, but for a base model that the Hub would refuse."""
    usual = front_matter(header)
    for name, value in usual.to_dict().items():
        if not card.data.get(name):
            card.data[name] = value
    card.data.tags = list(dict.fromkeys([*_as_list(card.data.tags), *_as_list(usual.tags)]))
    if not all(HUB_ID.fullmatch(str(base)) for base in _as_list(card.data.base_model)):
        card.data.base_model = usual.base_model
    if licence:
        card.data.license = licence
    if pictures:
        card.data.widget = [{"text": text, "output": {"url": name}} for name, text in pictures.items()]


def _body(text: str, header: AdapterHeader, repo: str, pictures: Mapping[str, str]) -> str:
    """The page: as it was, with the repository in place of the local folder."""
    here, there = usage(header), usage(header, repo)
    if here in text:
        text = text.replace(here, f"{there}\n\n{_elsewhere(header, repo)}")
    elif there not in text:
        text = f"{text.rstrip()}\n\n## How to load it\n\n{there}\n\n{_elsewhere(header, repo)}\n"
    text = text.replace('load_adapter(pipe, ".")', f'load_adapter(pipe, "{repo}")')  # of merged adapters
    missing = [name for name in pictures if f"]({name})" not in text]
    return f"{text.rstrip()}\n\n{gallery(missing)}" if missing else text


def _elsewhere(header: AdapterHeader, repo: str) -> str:
    """The pipeline of diffusers that `usage` loads into, and ComfyUI."""
    base = header.base_model if HUB_ID.fullmatch(header.base_model) else None
    opened = (
        f'`{header.base_family.pipelines}Pipeline.from_pretrained("{base}")`'
        if base
        else "a diffusers pipeline of the base model"
    )
    pipe = f"Here `pipe` is {opened}."
    if header.base_model == POCKET or header.base_family is not SDXL:  # which the node cannot load
        return pipe
    if encoders_in(header.heads):
        return f"{pipe} The ComfyUI node refuses alpha on text encoders."
    return (
        f"{pipe} In ComfyUI's folder, `hf download {repo} --local-dir models/coeffdiff/{_name(repo)}` puts the adapter "
        "where the node *Load coeffdiff adapter* lists it; `coeffdiff comfyui install PATH_OF_COMFYUI` adds the node."
    )


def _name(repo: str) -> str:
    return repo.rpartition("/")[2]


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]
