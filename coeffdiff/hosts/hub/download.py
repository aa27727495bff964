"""Adapters from the Hub: only their own files are fetched, checked for size before and for content after.

What is fetched lies in the Hub's cache, in a folder that is read and checked like any other.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coeffdiff.errors import AdapterError, CachedAdapter
from coeffdiff.hosts.hub.address import Address
from coeffdiff.method.adapter_file import files_of, read_attached, read_header, refuse_large
from coeffdiff.method.adapter_header import is_harmless
from coeffdiff.method.adapter_paths import COEFF_FILE, EMBEDS_FILE, LORA_FILE
from coeffdiff.method.not_an_adapter import by_names, listed
from coeffdiff.utils.hub import HUB_SECONDS, hub_errors, hub_sentence, trouble_of, within_seconds

_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch_adapter(
    address: Address,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    attached: bool = False,
) -> Path:
    """The adapter's folder in the Hub's cache, with all of its files. attached: alphas of coeffdiff.save are meant.

    Raises: AdapterError.
    """
    source = _Source(address, token, str(cache_dir) if cache_dir is not None else None, attached)
    if local_files_only or _COMMIT.fullmatch(address.revision or ""):
        if cached := _cached(source):
            return cached
        if local_files_only:
            raise AdapterError(_out_of_reach(address, "local_files_only is set"))
    try:
        remote = _look_up(address, token)
    except Exception as error:
        return _without_hub(source, error)
    return _fetch(source, remote)


def _without_hub(source: _Source, error: Exception) -> Path:
    """The cached copy if only the network is to blame, with a warning unless it was asked for. Raises: AdapterError."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    address = source.address
    cached = _cached(source) if trouble_of(error) == "unreachable" else None
    if cached is None:
        sentence = hub_sentence(
            error,
            address.repo,
            absent=_absent(address),
            unreachable=lambda reason: _out_of_reach(address, reason),
        )
        raise AdapterError(sentence) from error
    if not isinstance(error, OfflineModeIsEnabled):
        warnings.warn(
            f"The hub cannot be reached; {address} is taken from the cache, as of commit {_commit_of(cached)[:12]}.",
            CachedAdapter,
            stacklevel=4,
        )
    return cached


@dataclass(frozen=True)
class _Source:
    address: Address
    token: str | bool | None
    cache_dir: str | None
    attached: bool

    def files(self, folder: Path) -> tuple[str, ...]:
        """What the header there promises. Raises: AdapterError if it is damaged or of the other kind."""
        if self.attached:
            read_attached(folder)
            return (COEFF_FILE,)
        return files_of(read_header(folder))


@dataclass(frozen=True)
class _Remote:
    """What the Hub says of a repository. sizes: bytes by file, None where it does not say."""

    commit: str
    sizes: dict[str, int | None]


def _look_up(address: Address, token: str | bool | None) -> _Remote:
    """Raises: whatever huggingface_hub raises, within seconds."""
    from huggingface_hub import HfApi

    def ask() -> Any:
        return HfApi(token=token).model_info(
            address.repo, revision=address.revision, files_metadata=True, timeout=HUB_SECONDS / 2
        )

    info = within_seconds(HUB_SECONDS, ask)
    return _Remote(str(info.sha), {file.rfilename: file.size for file in info.siblings or ()})


def _fetch(source: _Source, remote: _Remote) -> Path:
    """Download the header's file, then what it promises, all of one commit. Raises: AdapterError."""
    place = next((p for p in _places(source.address) if p + COEFF_FILE in remote.sizes), None)
    if place is None:
        raise AdapterError(_what_it_holds(source.address, remote))
    _check_size(source.address, remote, place + COEFF_FILE)
    folder = _download(source, place + COEFF_FILE, source.address.revision)
    if _commit_of(folder) != remote.commit:
        raise AdapterError(f"{source.address} was changed while it was fetched; run the same command again.")
    try:
        promised = source.files(folder)
    except AdapterError as error:
        raise type(error)(f"{source.address} on the hub is no sound adapter: {error}") from None
    if not source.attached:  # which may lie beside anything
        _check_names(source.address, remote, place, promised)
    names = [place + name for name in promised[1:]]
    for name in names:
        _check_size(source.address, remote, name)
    for name in names:
        _download(source, name, remote.commit)
    return folder


def _download(source: _Source, name: str, revision: str | None) -> Path:
    """Fetch one file, unless the cache has it. Returns: its folder. Raises: AdapterError."""
    from huggingface_hub import hf_hub_download

    address = source.address
    absent = f"{name} of {address} has just been taken off the hub."
    with hub_errors(
        address.repo,
        AdapterError,
        absent=absent,
        unreachable=lambda reason: (
            f"{name} of {address} did not arrive whole, and {reason}. Nothing that is half there is used; run the "
            "same command again."
        ),
    ):
        file = hf_hub_download(
            address.repo, name, revision=revision, token=source.token, cache_dir=source.cache_dir
        )
    return Path(file).parent


def _cached(source: _Source) -> Path | None:
    """The adapter's folder in the cache, if all that its header promises is there. Raises: AdapterError if damaged."""
    from huggingface_hub import try_to_load_from_cache

    address = source.address
    for place in _places(address):
        file = try_to_load_from_cache(
            address.repo, place + COEFF_FILE, cache_dir=source.cache_dir, revision=address.revision
        )
        if isinstance(file, str):
            folder = Path(file).parent
            if all((folder / name).is_file() for name in source.files(folder)):
                return folder
    return None


def _places(address: Address) -> tuple[str, ...]:
    """Where the adapter may lie, as prefixes of paths: in the folder, or as in a run's folder in adapter/."""
    folder = f"{address.folder}/" if address.folder else ""
    return folder, f"{folder}adapter/"


def _commit_of(folder: Path) -> str:
    return next((part for part in reversed(folder.parts) if _COMMIT.fullmatch(part)), "")


def _check_size(address: Address, remote: _Remote, name: str) -> None:
    size = remote.sizes[name]
    if size is None:
        raise AdapterError(f"The hub does not say how large {name} of {address} is, so it is not fetched.")
    refuse_large(f"{name} of {address}", name.rpartition("/")[2], size)


def _check_names(address: Address, remote: _Remote, place: str, names: tuple[str, ...]) -> None:
    """Raises: AdapterError unless the repository holds the files that the header promises, and no other part."""
    for name in (LORA_FILE, EMBEDS_FILE):
        promised, there = name in names, place + name in remote.sizes
        if promised and not there:
            raise AdapterError(f"{address} is incomplete: {name} is missing in the repository.")
        if there and not promised:
            raise AdapterError(
                f"{place}{name} of {address} does not belong there: {COEFF_FILE} says that the adapter has none."
            )


def _absent(address: Address) -> str:
    return (
        f"There is no adapter {address}: neither a folder of this name here nor a public repository {address.repo} on "
        "the hub. Check the spelling, or log in with `hf auth login` if it is private."
    )


def _out_of_reach(address: Address, reason: str) -> str:
    from huggingface_hub import constants

    revision = f" --revision {address.revision}" if address.revision else ""
    return (
        f"{address} is no folder here and not complete in the cache ({constants.HF_HUB_CACHE}), and {reason}. "
        f"On a machine with network run `hf download {address.repo}{revision} --local-dir FOLDER` and name that folder."
    )


def _what_it_holds(address: Address, remote: _Remote) -> str:
    """What a repository without an adapter in this place is, and where in it adapters are."""
    names = sorted(name for name in remote.sizes if is_harmless(name))
    suffix = f"/{COEFF_FILE}"
    folders = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
    where = f"{address} on the hub"
    if folders:
        one = Address(address.repo, address.revision, folders[0])
        return f"{where} holds its adapters in folders ({', '.join(folders[:5])}); name one, such as {one}."
    start = f"{address.folder}/" if address.folder else ""
    here = [name.removeprefix(start) for name in names if name.startswith(start)]
    if named := by_names(where, here):
        return named
    loras = [name for name in here if name.endswith(".safetensors")]
    hint = f" If {loras[0]} is a LoRA, load it with diffusers' pipe.load_lora_weights." if loras else ""
    return f"{where} is no adapter of coeffdiff: it has no {COEFF_FILE}.{listed(here)}{hint}"
