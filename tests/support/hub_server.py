"""A hub in this process: repositories in memory, the hub's HTTP API on a local port, and faults on request.

    with HubServer() as hub:
        hub.add("owner/name", {"config.json": b"{}"})
        ... huggingface_hub with HF_ENDPOINT=hub.endpoint, HF_HUB_DISABLE_XET=1 and HF_TOKEN=hub.token ...

Files of LFS_BYTES or more (and .safetensors) are LFS objects, stored at hub.storage, which is another origin, as on the
real hub; what a client sends there is recorded in hub.seen like every other request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import yaml

LFS_BYTES = 64 * 1024
PIECE = 16 * 1024
PAGE = 50
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Blob:
    """The content of one file, and whether it is an LFS object."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """What git calls it: of an LFS object, the hash of its pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        data = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


Tree = dict[str, Blob]


@dataclass
class Repo:
    """One repository: who may read it, what its branches point at, and every commit's files and message."""

    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Tree] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    pull_requests: int = 0

    def commit(self, branch: str, tree: Tree, message: str) -> str:
        """Puts a commit of `tree` on top of `branch`; its 40 digits."""
        told = [message, branch, str(len(self.commits)), *(f"{name} {blob.oid}" for name, blob in sorted(tree.items()))]
        commit = hashlib.sha1("\n".join(told).encode()).hexdigest()
        self.commits[commit], self.refs[branch] = tree, commit
        self.messages.append(message)
        return commit

    def at(self, revision: str) -> str | None:
        """The commit that a branch, a pull request or a commit's digits name."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> bytes at a revision."""
        commit = self.at(revision)
        assert commit is not None, revision
        return {path: blob.data for path, blob in self.commits[commit].items()}


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD /path" matches: an answer with `status`, or (status None) a cut
    connection after `after` bytes of the request's body, or of the answer's where the request has none. It ends with a
    reset, or quietly where part of an answer was sent (a reset would make the client forget that part).
    """

    match: str
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""
    after: int = 0
    times: int = 10**9
    skip: int = 0
    """How many matching requests go well first."""

    def strikes(self, request: str) -> bool:
        """Whether it hits this request; counts down `skip` and `times`."""
        if not self.times or not re.search(self.match, request):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


@dataclass(frozen=True)
class Seen:
    """One request as it arrived: "METHOD /path?query", headers by lower-case name, how many bytes of body were read."""

    request: str
    headers: Mapping[str, str]
    received: int


class HubServer:
    """The hub; start and stop it with a `with` block."""

    def __init__(self, token: str = "hf_secretSECRETsecretSECRETsecretSECRET", user: str = "tester") -> None:
        self.token, self.user = token, user
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.stored: list[str] = []
        """Object ids in the order in which their upload was completed; an object sent twice is here twice."""
        self.on_bytes: Callable[[int], None] = lambda count: None
        """Called with the number of bytes just received in the body of any request."""
        self.lock = threading.RLock()
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.hub = self
        port = self.server.server_address[1]
        self.endpoint, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}/storage"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo_id: str, files: Mapping[str, bytes], branch: str = "main", **about: bool) -> str:
        """Commits `files`, and nothing else, to a repository that is made if need be; the commit."""
        with self.lock:
            tree = {path: Blob(data, is_lfs(path, len(data))) for path, data in files.items()}
            self.lfs |= {blob.sha256: blob.data for blob in tree.values() if blob.lfs}
            repo = self.repos.setdefault(repo_id, Repo())
            for name, value in about.items():
                setattr(repo, name, value)
            return repo.commit(branch, tree, "files")

    def environment(self, home: str) -> dict[str, str]:
        """What makes huggingface_hub use this hub, keeping its cache and token file below `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": home,
            "HF_TOKEN": self.token,
        }

    def requests(self, pattern: str) -> list[Seen]:
        """The requests so far whose "METHOD /path?query" matches."""
        return [each for each in self.seen if re.search(pattern, each.request)]


def is_lfs(path: str, size: int) -> bool:
    """Whether the hub would keep a file as an LFS object."""
    return size > 0 and (size >= LFS_BYTES or path.endswith((".safetensors", ".onnx", ".onnx_data", ".png")))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that were cut, by a fault or by a client that was killed, are no news."""


class _Stop(Exception):  # noqa: N818
    """The connection was cut."""


class _Failed(Exception):  # noqa: N818
    """An answer that is an error, in the hub's own terms."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


Route = Callable[..., None]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
REPO = r"(?P<repo>[^/]+/[^/]+?)"


def route(methods: str, pattern: str) -> Callable[[Route], Route]:
    """Registers the handler of a path; the pattern's named groups, unquoted, become its arguments."""

    def add(handler: Route) -> Route:
        ROUTES.extend((method, re.compile(pattern), handler) for method in methods.split())
        return handler

    return add


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    hub: HubServer
    body: bytes

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _serve(self) -> None:
        self.hub, self.cut_after = self.server.hub, None
        parts = urlsplit(self.path)
        request = f"{self.command} {unquote(parts.path)}"
        with self.hub.lock:
            fault = next((each for each in self.hub.faults if each.strikes(request)), None)
        try:
            self._receive(fault)
            if fault and fault.status is not None:
                self.reply(fault.status, fault.body or "a fault", fault.headers)
                return
            if fault:
                if not self.body:
                    self.cut_after = fault.after
                else:
                    raise _Stop
            self._dispatch(parts.path)
        except _Failed as failed:
            code = {"X-Error-Code": failed.code} if failed.code else {}
            self.reply(
                failed.status, json.dumps({"error": failed.message}), {"X-Error-Message": failed.message, **code}
            )
        except (_Stop, ConnectionError):
            self._cut()

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _dispatch(self, path: str) -> None:
        for method, pattern, handler in ROUTES:
            if method == self.command and (found := pattern.fullmatch(path)):
                handler(self, **{name: unquote(value) for name, value in found.groupdict().items()})
                return
        raise _Failed(404, f"no such route: {self.command} {path}")

    def _receive(self, fault: Fault | None) -> None:
        received = bytearray()
        try:
            for piece in self._pieces():
                received += piece
                self.hub.on_bytes(len(piece))
                if fault and fault.status is None and len(received) > fault.after:
                    raise _Stop
        finally:
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.hub.seen.append(Seen(f"{self.command} {unquote(self.path)}", headers, len(received)))
        self.body = bytes(received)

    def _pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline() or b"0", 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        missing = int(self.headers.get("Content-Length") or 0)
        while missing:
            piece = self.rfile.read(min(PIECE, missing))
            if not piece:
                raise _Stop
            missing -= len(piece)
            yield piece

    def _cut(self) -> None:
        self.close_connection = True
        if not self.cut_after:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def reply(self, status: int, body: Any = b"", headers: Mapping[str, str] | None = None) -> None:
        """Sends an answer: bytes and text as they are, anything else as JSON."""
        data = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        named = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        for name, value in named.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut_after is not None:
            self.wfile.write(data[: self.cut_after])
            self.wfile.flush()
            raise _Stop
        self.wfile.write(data)

    def bearer(self) -> str | None:
        """The token that was sent, if any."""
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def authorised(self) -> None:
        """401 unless the right token was sent. The message repeats what was sent, as careless servers do."""
        if self.bearer() != self.hub.token:
            raise _Failed(401, f"Invalid credentials in Authorization header: {self.bearer()}")

    def readable(self, repo: str) -> Repo:
        """The repository, if this client may know of it."""
        found = self.hub.repos.get(repo)
        if found is None or (found.private and self.bearer() != self.hub.token):
            raise _Failed(404 if self.bearer() == self.hub.token else 401, "Repository not found", "RepoNotFound")
        return found

    def writable(self, repo: str) -> Repo:
        """The repository, if this client may write to it."""
        self.authorised()
        found = self.readable(repo)
        if repo.partition("/")[0] != self.hub.user:
            raise _Failed(403, "You do not have write access to this repository")
        return found

    def commit_of(self, repo: Repo, revision: str) -> str:
        """The commit that `revision` names; 404 otherwise."""
        commit = repo.at(revision)
        if commit is None:
            raise _Failed(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def json(self) -> Any:
        """The body of the request."""
        return json.loads(self.body)

    def send_ranged(self, data: bytes, headers: Mapping[str, str]) -> None:
        """Answers with the bytes that a Range header asks for, or with all."""
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        if not asked:
            self.reply(200, data, headers)
            return
        first, last = asked.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        end = min(int(last), len(data) - 1) if first and last else len(data) - 1
        if start > end:
            self.reply(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
            return
        self.reply(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})


@route("GET", "/api/whoami-v2")
def _whoami(self: _Handler) -> None:
    self.authorised()
    self.reply(200, {"type": "user", "name": self.hub.user, "auth": {"accessToken": {"role": "write"}}, "orgs": []})


@route("POST", "/api/validate-yaml")
def _validate(self: _Handler) -> None:
    found = re.match(r"---\n(.*?)\n---", self.json()["content"], re.DOTALL)
    errors, warnings = card_problems(yaml.safe_load(found[1]) if found else {})
    told = {"errors": [{"message": each} for each in errors], "warnings": [{"message": each} for each in warnings]}
    self.reply(400 if errors else 200, told)


def card_problems(data: Any) -> tuple[list[str], list[str]]:
    """(errors, warnings) about a card's metadata, by the hub's rules for the keys that guardfold writes."""
    if not isinstance(data, dict) or not data:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    texts = {"license": r"[a-z0-9.\-]+", "pipeline_tag": r"[a-z\-]+", "library_name": r"[\w\-.]+"}
    for name, pattern in texts.items():
        if name in data and not (isinstance(data[name], str) and re.fullmatch(pattern, data[name])):
            errors.append(f'"{name}" must be one of the known values')
    models = data.get("base_model", [])
    for model in models if isinstance(models, list) else [models]:
        if not (isinstance(model, str) and re.fullmatch(r"[\w.\-]+/[\w.\-]+", model)):
            errors.append('"base_model" must be a model id')
    if data.get("base_model_relation", "finetune") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be an array of text')
    if data.get("license") == "other" and "license_name" not in data:
        errors.append('"license_name" is required with license: other')
    return errors, []


@route("POST", "/api/repos/create")
def _create(self: _Handler) -> None:
    self.authorised()
    asked = self.json()
    owner = asked.get("organization") or self.hub.user
    repo_id = f"{owner}/{asked['name']}"
    if owner != self.hub.user:
        raise _Failed(403, f"You don't have the rights to create a model under the namespace {owner}")
    url = f"{self.hub.endpoint}/{repo_id}"
    with self.hub.lock:
        if repo_id in self.hub.repos:
            self.reply(409, {"error": "You already created this model repo", "url": url})
            return
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.add(
            repo_id, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, private=private
        )
    self.reply(200, {"url": url, "name": repo_id})


@route("GET", f"/api/models/{REPO}")
@route("GET", f"/api/models/{REPO}/revision/(?P<revision>[^/]+)")
def _info(self: _Handler, repo: str, revision: str = "main") -> None:
    found = self.readable(repo)
    commit = self.commit_of(found, revision)
    siblings = [{"rfilename": path} for path in sorted(found.commits[commit])]
    about = {"id": repo, "modelId": repo, "sha": commit, "private": found.private, "gated": found.gated}
    self.reply(200, {**about, "tags": [], "siblings": siblings})


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}
    return entry


@route("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)")
def _tree(self: _Handler, repo: str, revision: str) -> None:
    found = self.readable(repo)
    entries = [_entry(*each) for each in sorted(found.commits[self.commit_of(found, revision)].items())]
    query = urlsplit(self.path).query
    start = int(match[1]) if (match := re.search(r"cursor=(\d+)", query)) else 0
    headers = {}
    if start + PAGE < len(entries):
        path = urlsplit(self.path).path
        headers["Link"] = f'<{self.hub.endpoint}{path}?recursive=true&cursor={start + PAGE}>; rel="next"'
    self.reply(200, entries[start : start + PAGE], headers)


@route("POST", f"/api/models/{REPO}/paths-info/(?P<revision>[^/]+)")
def _paths(self: _Handler, repo: str, revision: str) -> None:
    found = self.readable(repo)
    tree = found.commits[self.commit_of(found, revision)]
    asked = [unquote(each.partition("=")[2].replace("+", " ")) for each in self.body.decode().split("&")]
    self.reply(200, [_entry(path, tree[path]) for path in asked if path in tree])


@route("GET", f"/api/models/{REPO}/refs")
def _refs(self: _Handler, repo: str) -> None:
    found = self.readable(repo)
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
        for name, commit in found.refs.items()
        if not name.startswith("refs/")
    ]
    self.reply(200, {"branches": branches, "tags": [], "converts": []})


@route("POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)")
def _branch(self: _Handler, repo: str, branch: str) -> None:
    found = self.writable(repo)
    if branch in found.refs:
        raise _Failed(409, f"Reference already exists: refs/heads/{branch}")
    found.refs[branch] = found.refs["main"]
    self.reply(200, {})


@route("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)")
def _preupload(self: _Handler, repo: str, revision: str) -> None:
    found = self.writable(repo) if "create_pr" not in self.path else self.readable(repo)
    tree = found.commits[self.commit_of(found, revision)]
    files = [
        {
            "path": each["path"],
            "uploadMode": "lfs" if is_lfs(each["path"], each["size"]) else "regular",
            "shouldIgnore": False,
            "oid": tree[each["path"]].etag if each["path"] in tree else None,
        }
        for each in self.json()["files"]
    ]
    self.reply(200, {"files": files, "commitOid": found.at(revision)})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def _batch(self: _Handler, repo: str) -> None:
    self.authorised()
    self.readable(repo)
    objects = []
    for each in self.json()["objects"]:
        answer = {"oid": each["oid"], "size": each["size"]}
        if each["oid"] not in self.hub.lfs:
            verify = f"{self.hub.endpoint}/{repo}.git/info/lfs/objects/verify"
            answer["actions"] = {
                "upload": {"href": f"{self.hub.storage}/{each['oid']}"},
                "verify": {"href": verify},
            }
        objects.append(answer)
    self.reply(200, {"transfer": "basic", "objects": objects})


@route("PUT", "/storage/(?P<oid>[0-9a-f]{64})")
def _store(self: _Handler, oid: str) -> None:
    if hashlib.sha256(self.body).hexdigest() != oid:
        raise _Failed(400, "the object's bytes are not what its id says")
    with self.hub.lock:
        self.hub.lfs[oid] = self.body
        self.hub.stored.append(oid)
    self.reply(200)


@route("POST", rf"/{REPO}\.git/info/lfs/objects/verify")
def _verify(self: _Handler, repo: str) -> None:
    self.authorised()
    asked = self.json()
    if len(self.hub.lfs.get(asked["oid"], b"")) != asked["size"]:
        raise _Failed(404, "no such object")
    self.reply(200, {})


@route("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)")
def _commit(self: _Handler, repo: str, revision: str) -> None:
    proposed = "create_pr" in self.path
    if proposed:
        self.authorised()
    found = self.readable(repo) if proposed else self.writable(repo)
    with self.hub.lock:
        tree, message = dict(found.commits[self.commit_of(found, revision)]), ""
        for line in self.body.splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "header":
                message = value["summary"]
            elif step["key"] == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif step["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise _Failed(400, f"LFS object {value['oid']} was never uploaded")
                tree[value["path"]] = Blob(self.hub.lfs[value["oid"]], True)
            else:
                for path in [path for path in tree if path == value["path"] or path.startswith(value["path"] + "/")]:
                    del tree[path]
        branch = revision
        if proposed:
            found.pull_requests += 1
            branch = f"refs/pr/{found.pull_requests}"
        commit = found.commit(branch, tree, message)
    answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit}"}
    if proposed:
        answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{found.pull_requests}"
    self.reply(200, answer)


@route("GET HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def _resolve(self: _Handler, repo: str, revision: str, path: str) -> None:
    found = self.readable(repo)
    if found.gated and self.bearer() != self.hub.token:
        raise _Failed(401 if self.bearer() is None else 403, f"Access to model {repo} is restricted", "GatedRepo")
    commit = self.commit_of(found, revision)
    blob = found.commits[commit].get(path)
    if blob is None:
        self.reply(404, b"Entry not found", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return
    headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.etag}"'}
    if blob.lfs:
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        self.reply(302, b"", {**headers, **linked, "Location": f"{self.hub.storage}/{blob.sha256}"})
        return
    self.send_ranged(blob.data, headers)


@route("GET HEAD", "/storage/(?P<oid>[0-9a-f]{64})")
def _stored(self: _Handler, oid: str) -> None:
    if oid not in self.hub.lfs:
        raise _Failed(404, "no such object")
    self.send_ranged(self.hub.lfs[oid], {"ETag": f'"{oid}"'})
