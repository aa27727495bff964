"""Files of an adapter to the Hub, in one commit: all of them are there, or none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coeffdiff.errors import HubError
from coeffdiff.method.adapter_paths import COEFF_FILE, EMBEDS_FILE, LORA_FILE
from coeffdiff.method.not_an_adapter import listed
from coeffdiff.utils.hub import HUB_ID, HUB_SECONDS, hub_errors, trouble_of, within_seconds

_HARMLESS = (".gitattributes", "README.md", "LICENSE", ".gitignore")
_BAD_REQUEST, _CONFLICT = 400, 409


@dataclass(frozen=True)
class Uploaded:
    """url: of the repository. commit: the new one. created: whether the repository is new."""

    url: str
    commit: str
    private: bool
    created: bool


def check_repo_id(repo: str) -> str:
    """The repository's id. Raises: HubError for what the Hub would refuse as one."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    reason = ""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = f" ({str(error).splitlines()[0]})"
    if reason or not HUB_ID.fullmatch(repo):
        raise HubError(
            f"{repo!r} is no name of a repository on the Hub{reason}; write user/repo, such as me/mug."
        )
    return repo


def upload(
    repo: str, files: Mapping[str, Path | bytes], *, public: bool, message: str, token: str | None = None
) -> Uploaded:
    """Upload files by their names in the repository, which is created if need be.

    Args:
        files: README.md among them, which the Hub validates before anything is created.
        public: who may see a new repository; one that exists stays as it is.
    Raises: HubError without a login or the right to write, for a card that the Hub refuses, for a repository that holds
        something else or that anybody can see while `public` is False, and if the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    check_repo_id(repo)
    if not (token or get_token()):
        raise HubError(
            "You are not logged in to the Hub: run `hf auth login` with a token that may write, or set HF_TOKEN."
        )
    api = HfApi(token=token)
    with _push_errors(repo):
        _validate_card(api, files["README.md"])
        found = _look_up(api, repo)
        if found:
            _check_target(repo, found, public)
        else:
            _create(api, repo, public)
        commit = _commit(api, repo, files, _outdated(found, files), message)
    private = bool(found.private) if found else not public
    return Uploaded(f"{api.endpoint}/{repo}", commit, private, created=found is None)


def _push_errors(repo: str) -> Any:
    return hub_errors(
        repo,
        HubError,
        absent=(
            f"The Hub does not let this token write to {repo}: check the name, and that the token may write to "
            f"{repo.split('/')[0]}'s repositories (`hf auth login` stores another)."
        ),
        unreachable=lambda reason: (
            f"Nothing was uploaded to {repo}: {reason}. A push is one commit, so run it again as a whole."
        ),
    )


def _look_up(api: Any, repo: str) -> Any:
    """What the Hub says of the repository; None if there is none."""
    try:
        return within_seconds(HUB_SECONDS, lambda: api.model_info(repo, timeout=HUB_SECONDS / 2))
    except Exception as error:
        if trouble_of(error) == "absent":
            return None
        raise


def _check_target(repo: str, found: Any, public: bool) -> None:
    """Raises: HubError if adapter files would go among others, or be seen by everybody unasked."""
    names = [file.rfilename for file in found.siblings or ()]
    others = [name for name in names if name not in _HARMLESS]
    if others and COEFF_FILE not in others:
        raise HubError(
            f"{repo} exists on the Hub and is something else than an adapter.{listed(others)} Name a repository of its "
            "own. Nothing was changed."
        )
    if not found.private and not public:
        raise HubError(
            f"{repo} exists on the Hub and is public, so everybody would see the adapter; pass --public if that is "
            "meant, or name another repository. Nothing was changed."
        )


def _create(api: Any, repo: str, public: bool) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(repo, private=not public)
    except HfHubHTTPError as error:
        if error.response.status_code != _CONFLICT:
            raise
        raise HubError(
            f"The name {repo} is in use on the Hub, by a repository of another kind or one that this token may not "
            "see; name another."
        ) from error


def _outdated(found: Any, files: Mapping[str, Path | bytes]) -> list[str]:
    """Parts of the adapter that was there before and that the new one does not have; left, they would be foreign."""
    names = [file.rfilename for file in found.siblings or ()] if found else []
    return [name for name in (LORA_FILE, EMBEDS_FILE) if name in names and name not in files]


def _commit(api: Any, repo: str, files: Mapping[str, Path | bytes], outdated: list[str], message: str) -> str:
    """create_commit and not upload_folder, which may cut a large upload into several commits."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations = [
        *(
            CommitOperationAdd(name, what if isinstance(what, bytes) else str(what))
            for name, what in files.items()
        ),
        *(CommitOperationDelete(name) for name in outdated),
    ]
    return str(api.create_commit(repo, operations, commit_message=message).oid)


def _validate_card(api: Any, card: Path | bytes) -> None:
    """Raises: HubError with the Hub's own words if it does not accept the card's front matter.

    create_commit asks the same, but when the repository has been created; ModelCard.validate asks huggingface.co, in
    older versions whatever HF_ENDPOINT says.
    """
    from huggingface_hub.utils import get_session, hf_raise_for_status

    text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
    address, asked = f"{api.endpoint}/api/validate-yaml", {"content": text, "repoType": "model"}
    response = within_seconds(
        HUB_SECONDS, lambda: get_session().post(address, json=asked, timeout=HUB_SECONDS / 2)
    )
    if response.status_code == _BAD_REQUEST:
        raise HubError(f"The Hub does not accept the card: {_reasons(response.text)}. Nothing was uploaded.")
    hf_raise_for_status(response)


def _reasons(answer: str) -> str:
    """What the Hub objects to, out of its answer: JSON with a list of errors, or plain text."""
    try:
        messages = [str(one["message"]) for one in json.loads(answer)["errors"]]
    except (ValueError, KeyError, TypeError):
        messages = answer.splitlines()[:1]
    return "; ".join(" ".join(message.split()) for message in messages).rstrip(".") or "it does not say why"
