"""A Hugging Face Hub on localhost: it answers the HTTP calls of huggingface_hub, for models, and keeps what is pushed."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_me": ("me", True), "hf_reader": ("me", False), "hf_other": ("other", True)}  # owner, may write
LICENCES = ("apache-2.0", "mit", "openrail++", "other")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    """commits: files by commit, in order. private, gated: who may read. kind: of another, the name alone is taken."""

    private: bool = False
    gated: bool = False
    kind: str = "model"
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], message: str = "files", branch: str = "main") -> str:
        sha = hashlib.sha1(repr((sorted(files), len(self.commits), message)).encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        self.messages.append(message)
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]] if "main" in self.refs else {}

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """The stand-in's state. asked: method and path of every call. cuts: how many downloads still break off midway;
    resumed: how many went on from where they had broken off.

    sizes: what it says of files in place of their sizes, by name. down: it answers nothing. delay: seconds before it
    answers."""

    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    cuts: int = 0
    resumed: int = 0
    down: bool = False
    delay: float = 0
    endpoint: str = ""

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for."""
        found = [re.search(r"/resolve/[^/]+/(.+)", path) for method, path in self.asked if method == "GET"]
        return [match[1] for match in found if match]


class Refused(Exception):  # noqa: N818
    def __init__(self, status: int, code: str = "", message: str = "", body: object = None) -> None:
        self.status, self.code, self.message, self.body = status, code, message, body


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def answer(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.asked.append((self.command, unquote(url.path)))
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(self.hub.delay)
        if self.hub.down:
            self.close_connection = True
            return
        path = unquote(url.path)
        calls = [
            (call, found.groupdict())
            for methods, pattern, call in ROUTES
            if self.command in methods and (found := re.fullmatch(pattern, path))
        ]
        try:
            if not calls:
                raise Refused(404)
            calls[0][0](self, **calls[0][1])
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self.send(refused.status, refused.body or {"error": refused.message}, headers)

    # --- who asks, and for what

    def owner(self) -> tuple[str, bool] | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in TOKENS:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return TOKENS.get(given)

    def found(self, repo: str, writing: bool = False) -> Repo:
        """As the Hub does: what one may not see is not found, 401 without a token and 404 with one."""
        owner, there = self.owner(), self.hub.repos.get(repo)
        mine = owner is not None and owner[0] == repo.split("/")[0]
        if there is None or there.kind != "model" or (there.private and not mine):
            raise Refused(404 if owner else 401, "RepoNotFound", "Repository not found")
        if writing and not (mine and owner[1]):
            raise Refused(403, message="you have no write access to it")
        return there

    # --- reading; of a gated repository everybody sees which files it has

    def info(self, repo: str, revision: str | None = None):
        there = self.found(repo)
        sha = there.resolve(revision or "main")
        if sha is None and (revision or there.commits):
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        files = [
            {"rfilename": name, **({"size": self.size(name, data)} if "blobs" in self.query else {})}
            for name, data in there.commits.get(sha, {}).items()
        ]
        self.send(200, {"id": repo, "sha": sha, "private": there.private, "siblings": files})

    def tree(self, repo: str, commit: str):
        files = self.found(repo).commits[commit]
        listed = [
            {
                "type": "file",
                "path": name,
                "size": self.size(name, data),
                "oid": hashlib.sha1(data).hexdigest(),
            }
            for name, data in files.items()
        ]
        self.send(200, listed)

    def size(self, name: str, data: bytes) -> int:
        return self.hub.sizes.get(name, len(data))

    def resolve(self, repo: str, revision: str, name: str):
        there = self.found(repo)
        sha = there.resolve(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        if there.gated and self.owner() is None:
            raise Refused(401, "GatedRepo", "Access to it is restricted")
        if name not in there.commits[sha]:
            raise Refused(404, "EntryNotFound", "Entry not found")
        data, digest = there.commits[sha][name], hashlib.sha256(there.commits[sha][name]).hexdigest()
        headers = {"X-Repo-Commit": sha, "ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"'}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.hub.resumed += bool(start)
        cut = self.command == "GET" and self.hub.cuts > 0
        self.hub.cuts -= cut
        self.send(206 if start else 200, data[start:], headers, only=len(data) // 3 if cut else None)

    # --- writing

    def create(self):
        asked, owner = json.loads(self.content), self.owner()
        repo = f"{asked['organization']}/{asked['name']}"
        if owner is None:
            raise Refused(401, message="Invalid username or password.")
        if owner != (asked["organization"], True):
            raise Refused(
                403, message=f"You don't have the rights to create a model under {asked['organization']}"
            )
        if repo in self.hub.repos:
            raise Refused(409, message="You already created this repo")
        self.hub.repos[repo] = Repo(private=asked["visibility"] == "private")
        self.send(200, {"url": f"{self.hub.endpoint}/{repo}"})

    def validate(self):
        """What the Hub is known to refuse: a base model that is no id, an unknown licence, a widget of another form."""
        text = json.loads(self.content)["content"]
        meta = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
        wrong = [] if isinstance(meta, dict) else ['"metadata" is missing']
        meta = meta or {}
        if "base_model" in meta and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(meta["base_model"])):
            wrong.append('"base_model" must be a valid model id')
        if "license" in meta and meta["license"] not in LICENCES:
            wrong.append(f'"license" must be one of [{", ".join(LICENCES)}]')
        if not all(
            set(one) == {"text", "output"} and "url" in one["output"] for one in meta.get("widget", [])
        ):
            wrong.append('"widget" has an entry of another form')
        if wrong:
            raise Refused(400, body={"errors": [{"message": one} for one in wrong], "warnings": []})
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str):
        self.found(repo, writing=True)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.content)["files"]
        ]
        self.send(200, {"files": files})

    def batch(self, repo: str):
        self.found(repo, writing=True)
        objects = [
            one | {"actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}}
            for one in json.loads(self.content)["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str):
        assert hashlib.sha256(self.content).hexdigest() == oid
        self.hub.blobs[oid] = self.content
        self.send(200, {})

    def write(self, repo: str, revision: str):
        there = self.found(repo, writing=True)
        files, message = dict(there.files), ""
        for line in map(json.loads, self.content.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = there.commit(files, message, revision)
        self.send(200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha})

    def send(self, status: int, body: object, headers: dict[str, str] | None = None, only: int | None = None):
        """only: bytes of the body after which the connection breaks off."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(BrokenPipeError, ConnectionResetError):
            if self.command != "HEAD":
                self.wfile.write(data[:only])

    def log_message(self, *_):
        pass


ROUTES = (
    (("GET",), rf"/api/models/{REPO}", Handler.info),
    (("GET",), rf"/api/models/{REPO}/revision/(?P<revision>.+)", Handler.info),
    (("GET",), rf"/api/models/{REPO}/tree/(?P<commit>[0-9a-f]+)", Handler.tree),
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve),
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate),
    (("POST",), rf"/api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.put),
    (("POST",), rf"/api/models/{REPO}/commit/(?P<revision>.+)", Handler.write),
)


@contextmanager
def serving(hub: Hub):
    """The hub, at its endpoint, while the block runs."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_at(patch, endpoint: str, cache: str) -> None:
    """Make huggingface_hub, which reads the environment when it is imported, use this endpoint and cache alone."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    patch.setattr(constants, "HF_HUB_CACHE", cache)
    patch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/no-token")
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
