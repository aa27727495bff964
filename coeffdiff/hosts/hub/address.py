"""What names an adapter on the Hub: user/repo, user/repo@revision, hf://user/repo@revision/folder, a web address.

A path that exists wins over a repository, and what is plainly local is never asked for on the network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from coeffdiff.errors import AdapterError
from coeffdiff.method.adapter_paths import COEFF_FILE, EMBEDS_FILE, LORA_FILE
from coeffdiff.method.not_an_adapter import PICKLES, PICTURES
from coeffdiff.utils.hub import HUB_ID
from coeffdiff.utils.paths import exists

_URI = "hf://"
_PLAIN = re.compile(rf"(?P<repo>{HUB_ID.pattern})(?:@(?P<revision>[\w./-]+))?")
_STEP = re.compile(r"\d+|best|last")  # of a run: RUN@200
_FILE_ENDINGS = (".safetensors", ".yaml", ".json", ".jsonl", ".md", *PICKLES, *PICTURES)
_RUNS = "runs"  # where train puts runs: runs/ohwx is one of them, whether it is there or not
_CACHED = re.compile(
    r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?P<folder>/.+)?"
)


@dataclass(frozen=True)
class Address:
    """A folder in a repository. revision: a branch, tag or commit; None: the main branch. folder: "" is the root."""

    repo: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{_URI}{self.repo}{revision}/{self.folder}" if self.folder else f"{self.repo}{revision}"


def hub_address(path: str | Path) -> Address | None:
    """The repository that is meant; None for a path that exists, or that can only be meant as a local one.

    Raises: AdapterError for hf:// or a web address of anything but a model's repository.
    """
    if not isinstance(path, str):
        return None
    if is_uri(path):
        return _parsed(path)
    named = _PLAIN.fullmatch(path)
    if not named or exists(path) or _is_local(named["repo"], named["revision"]):
        return None
    try:
        return replace(_parsed(_URI + named["repo"]), revision=named["revision"])
    except AdapterError:  # what the Hub does not allow as a name may still be a path
        return None


def is_uri(path: str) -> bool:
    return path.startswith((_URI, "https://", "http://"))


def local_hint(path: str | Path) -> str:
    """For a path that is not there and could have been a repository: why the Hub was not asked for it."""
    named = _PLAIN.fullmatch(str(path))
    if not named or exists(path) or str(path).lower().endswith(_FILE_ENDINGS):
        return ""
    first = str(path).split("/")[0]
    if not (first == _RUNS or exists(first)):
        return ""
    here = f"{first} is a folder here" if exists(first) else f"{first} is where runs are"
    return f" The Hub was not asked, since {here}; {_URI}{path} would ask it."


def origin_of(folder: Path) -> str:
    """How a record names an adapter's folder: one in the Hub's cache as repository and commit, others by their path."""
    cached = _CACHED.search(folder.as_posix())
    if not cached:
        return str(folder)
    return str(
        Address(f"{cached['owner']}/{cached['name']}", cached["commit"], (cached["folder"] or "").strip("/"))
    )


def _is_local(repo: str, revision: str | None) -> bool:
    first = repo.split("/")[0]
    step = revision is not None and _STEP.fullmatch(revision)
    return bool(step) or first == _RUNS or exists(first) or repo.lower().endswith(_FILE_ENDINGS)


def _parsed(uri: str) -> Address:
    from huggingface_hub import constants, parse_hf_uri
    from huggingface_hub.errors import HfUriError

    try:
        found = parse_hf_uri(uri, constants.ENDPOINT)
    except HfUriError as error:
        raise AdapterError(
            f"{uri} is no address of an adapter on the Hub ({error.msg.rstrip(' .')}); write user/repo, "
            "user/repo@revision or hf://user/repo@revision/folder."
        ) from None
    if found.type != "model":
        raise AdapterError(
            f"{uri} is a {found.type} on the Hub; adapters are in repositories of models, user/repo."
        )
    folder = PurePosixPath(found.path_in_repo)
    if folder.name in (COEFF_FILE, LORA_FILE, EMBEDS_FILE):
        folder = folder.parent
    return Address(found.id, found.revision, checked_folder(str(folder)))


def checked_folder(folder: str) -> str:
    """The folder in a repository, without slashes around it. Raises: AdapterError if it leads out of it."""
    parts = PurePosixPath(folder.strip("/")).parts
    if ".." in parts or "\\" in folder:
        raise AdapterError(f"{folder!r} is no folder inside a repository.")
    return "/".join(parts)
