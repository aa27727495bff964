"""Which adapter is meant by a path here or by a name on the Hub, wherever a folder is taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from coeffdiff.errors import AdapterError
from coeffdiff.hosts.hub.address import Address, checked_folder, hub_address, local_hint
from coeffdiff.hosts.hub.download import fetch_adapter
from coeffdiff.method.adapter_paths import find_adapter
from coeffdiff.utils.paths import exists


def resolve_adapter(
    path: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    attached: bool = False,
) -> Path:
    """The adapter folder that is meant by a path here or by a repository of the Hub, which is fetched if need be.

    Args:
        path: as in find_adapter; or user/repo, user/repo@revision, hf://user/repo@revision/folder, a web address.
            A path that exists wins. runs/..., and what begins with the name of a folder here, is never looked up.
        revision: a branch, tag or commit of the repository.
        subfolder: of the folder or of the repository.
        token: for private repositories; by default the one that `hf auth login` stored, or HF_TOKEN.
        cache_dir: in place of the Hub's cache.
        local_files_only: take what the cache has, and do not use the network.
        attached: the alphas of one model are meant, which coeffdiff.save wrote.
    Raises: AdapterError if there is no such adapter, if it cannot be had, or if it is damaged or hostile.
    """
    address = hub_address(path)
    if address is None:
        if revision and exists(path):
            raise AdapterError(
                f"{path} is here and no repository of the Hub: it has no revision {revision!r}."
            )
        return _find_here(path, subfolder)
    address = _narrowed(address, revision, subfolder)
    return fetch_adapter(
        address, token=token, cache_dir=cache_dir, local_files_only=local_files_only, attached=attached
    )


def _find_here(path: str | Path, subfolder: str | None) -> Path:
    try:
        return find_adapter(Path(path) / checked_folder(subfolder) if subfolder else path)
    except AdapterError as error:
        raise type(error)(f"{error}{local_hint(path)}") from None


def _narrowed(address: Address, revision: str | None, subfolder: str | None) -> Address:
    """Raises: AdapterError for a revision or folder that the address names as well, and differently."""
    for given, own in ((revision, address.revision), (subfolder, address.folder)):
        if given and own and given != own:
            raise AdapterError(f"{address} already names {own!r}; leave {given!r} out.")
    folder = checked_folder(subfolder) if subfolder else address.folder
    return replace(address, revision=revision or address.revision, folder=folder)
