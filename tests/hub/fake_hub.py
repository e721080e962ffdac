"""A Hub on loopback that answers what `huggingface_hub` asks, and misbehaves on request.

    with FakeHub() as hub:                      # hub.url goes into HF_ENDPOINT
        hub.tokens["hf_writer"] = User("me", can_write=True)
        hub.fail("POST", "/api/models/.*/commit/", status=500, times=1)

It keeps repositories as commits of whole file trees, and large objects by their SHA-256. It knows what a draft's round
trip needs: who am I, create a repository, branches and references, metadata validation, preupload, LFS batch, upload
and verify, commit (with parent and pull request), model information, listing with filters and pages, paths, trees and
files. Anything else answers 501, so that a test that needs more fails loudly.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml


@dataclass
class User:
    name: str
    can_write: bool = True


@dataclass
class Fault:
    """What to do instead of answering: a `status` with headers, a `cut` connection, an answer `after` some seconds."""

    method: str
    path: re.Pattern[str]
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    after: float = 0.0


@dataclass
class Repo:
    """Commits by id, each a whole tree of path -> bytes; branches and pull requests point at commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    downloads: int = 0

    def commit(self, files: dict[str, bytes], message: str, ref: str = "main") -> str:
        digest = hashlib.sha1(f"{len(self.messages)}{message}".encode())
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        oid = digest.hexdigest()
        self.commits[oid] = files
        self.messages.append(message)
        self.refs[ref] = oid
        return oid

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        oid = self.find(revision)
        return self.commits[oid] if oid else {}


class FakeHub:
    """The server; use it as a context manager."""

    def __init__(self, page_size: int = 2) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, User] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        # What is answered about a repository instead of what is in it.
        self.overrides: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str]] = []
        self.page_size = page_size
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "FakeHub":
        self.thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fail(self, method: str, path: str, *, times: int = 1, **what: Any) -> None:
        """Misbehave on the next `times` requests whose path matches."""
        self.faults.append(Fault(method, re.compile(path), times, **what))

    def add(self, repo_id: str, files: dict[str, bytes | str], **options: Any) -> Repo:
        """A repository with one commit."""
        repo = self.repos[repo_id] = Repo(**options)
        repo.commit({path: body.encode() if isinstance(body, str) else body for path, body in files.items()}, "first")
        return repo

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None


def git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png", ".parquet"))


class _Answer(Exception):
    """Ends a request early with a status, the Hub's error code header and a message."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self) -> None:
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        self.hub.requests.append((self.command, path))
        fault = self.hub.fault_for(self.command, path)
        try:
            if fault and fault.cut:
                # In the middle of what the client is sending: read a little, then reset.
                self.rfile.read(min(64, int(self.headers.get("Content-Length", 0))))
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.close_connection = True
                self.connection.close()
                return
            self.body = self.read_body()
            if fault:
                time.sleep(fault.after)
                if fault.status:
                    raise _Answer(fault.status, "fault injected by a test", headers=fault.headers)
            with self.hub.lock:
                self.route(path)
        except _Answer as answer:
            headers = {"X-Error-Message": answer.message, **answer.headers}
            if answer.code:
                headers["X-Error-Code"] = answer.code
            self.send(answer.status, {"error": answer.message}, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # -- who, and what

    def user(self, *, writing: bool = False, owner: str | None = None) -> User | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        user = self.hub.tokens.get(token)
        if token and user is None:
            raise _Answer(401, "Invalid credentials in Authorization header")
        if writing and user is None:
            raise _Answer(401, "Invalid username or password.")
        if writing and user and (not user.can_write or (owner and owner != user.name)):
            raise _Answer(403, f"You don't have the rights to write under the namespace {owner!r}")
        return user

    def repo(self, repo_id: str, *, writing: bool = False) -> Repo:
        user = self.user(writing=writing, owner=repo_id.split("/")[0])
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and (user is None or user.name != repo_id.split("/")[0])):
            raise _Answer(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def commit_id(self, repo: Repo, revision: str) -> str:
        oid = repo.find(revision)
        if oid is None and repo.commits:
            raise _Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid or "0" * 40

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models", "list_models"),
        ("GET", r"/api/models/(?P<repo_id>[^/]+/[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/revision/(?P<revision>.+)", "info"),
        ("GET", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/refs", "references"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/branch/(?P<branch>.+)", "branch"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/preupload/(?P<revision>.+)", "preupload"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/commit/(?P<revision>.+)", "commit"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/paths-info/(?P<revision>.+)", "paths_info"),
        ("GET", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", "tree"),
        ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("GET", r"/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def route(self, path: str) -> None:
        # Data sets are repositories as models are; no test has one of each by the same name.
        path = path.replace("/api/datasets/", "/api/models/", 1).replace("/datasets/", "/", 1)
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in (method, "HEAD" if method == "GET" else method):
                getattr(self, name)(**match.groupdict())
                return
        raise _Answer(501, f"the fake Hub does not know {self.command} {path}")

    # -- repositories

    def whoami(self) -> None:
        user = self.user(writing=False)
        if user is None:
            raise _Answer(401, "Invalid username or password.")
        self.send(200, {"type": "user", "name": user.name, "auth": {"type": "access_token"}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        user = self.user(writing=True, owner=wanted.get("organization"))
        assert user is not None
        repo_id = f"{wanted.get('organization') or user.name}/{wanted['name']}"
        kind = "datasets/" if wanted.get("type") == "dataset" else ""
        if repo_id in self.hub.repos:
            self.send(409, {"error": "You already created this repo", "url": f"{self.hub.url}/{kind}{repo_id}"})
            return
        repo = self.hub.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.send(200, {"url": f"{self.hub.url}/{kind}{repo_id}", "name": repo_id, "id": repo_id})

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        problem = None
        try:
            data = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
            if not isinstance(data, dict) or not isinstance(data.get("license", ""), str):
                problem = '"license" must be a string'
        except yaml.YAMLError as error:
            problem = str(error)
        if problem:
            self.send(400, {"error": problem, "errors": [{"message": problem}], "warnings": []})
        else:
            self.send(200, {"errors": [], "warnings": []})

    def branch(self, repo_id: str, branch: str) -> None:
        repo = self.repo(repo_id, writing=True)
        if branch.startswith("refs/"):
            raise _Answer(400, "Invalid reference for a branch", "BadRequest")
        if branch in repo.refs:
            raise _Answer(409, "Reference already exists")
        repo.refs[branch] = repo.refs["main"]
        self.send(200, {})

    def references(self, repo_id: str) -> None:
        repo = self.repo(repo_id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in repo.refs.items()
            if not name.startswith("refs/")
        ]
        self.send(200, {"branches": branches, "tags": [], "converts": []})

    def metadata(self, repo: Repo, revision: str) -> dict[str, Any]:
        card = repo.files(revision).get("README.md", b"").decode(errors="replace")
        try:
            return (yaml.safe_load(card.split("---\n")[1]) or {}) if card.startswith("---\n") else {}
        except yaml.YAMLError:
            return {}

    def info_of(self, repo_id: str, revision: str = "main") -> dict[str, Any]:
        repo = self.hub.repos[repo_id]
        metadata = self.metadata(repo, revision)
        index = metadata.pop("model-index", None)
        files = repo.files(revision)
        tags = [*metadata.get("tags", [])]
        tags += [f"{key}:{metadata[key]}" for key in ("license", "base_model") if key in metadata]
        info = {
            "id": repo_id,
            "modelId": repo_id,
            "sha": self.commit_id(repo, revision),
            "private": repo.private,
            "downloads": repo.downloads,
            "likes": 0,
            "tags": tags,
            "cardData": metadata,
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }
        if index is not None:
            info["model-index"] = index
        weights = [body for path, body in files.items() if path.endswith(".safetensors")]
        if weights:
            info["safetensors"] = safetensors_info(weights)
        return info | self.hub.overrides.get(repo_id, {})

    def info(self, repo_id: str, revision: str = "main") -> None:
        repo = self.repo(repo_id)
        self.commit_id(repo, revision)
        info = self.info_of(repo_id, revision)
        # As on the real Hub, only what is asked for is sent, if anything is.
        wanted = {"id", *self.query.get("expand", info)}
        self.send(200, {key: value for key, value in info.items() if key in wanted})

    def list_models(self) -> None:
        user = self.user()
        found = [
            self.info_of(repo_id)
            for repo_id, repo in sorted(self.hub.repos.items())
            if not repo.private or (user and user.name == repo_id.split("/")[0])
        ]
        found = [info for info in found if set(self.query.get("filter", [])) <= set(info["tags"])]
        expand = set(self.query.get("expand", []))
        # As on the real Hub, only what is asked for is sent.
        found = [{key: value for key, value in info.items() if key in {"id", *expand}} for info in found]
        start = int(self.query.get("cursor", ["0"])[0])
        page = found[start : start + self.hub.page_size]
        headers = {}
        if start + self.hub.page_size < len(found):
            others = "&".join(
                f"{key}={quote(item)}" for key, items in self.query.items() if key != "cursor" for item in items
            )
            headers["Link"] = f'<{self.hub.url}/api/models?{others}&cursor={start + self.hub.page_size}>; rel="next"'
        self.send(200, page, headers)

    # -- uploading

    def preupload(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id, writing=True)
        self.commit_id(repo, revision)
        held = repo.files(revision)
        answer = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            entry = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
            if path in held:
                body = held[path]
                entry["oid"] = hashlib.sha256(body).hexdigest() if is_lfs(path) else git_blob_id(body)
            answer.append(entry)
        self.send(200, {"files": answer})

    def lfs_batch(self, repo_id: str) -> None:
        self.repo(repo_id, writing=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"], "authenticated": True}
            if item["oid"] not in self.hub.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs/verify"},
                }
            objects.append(entry)
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Answer(400, "the content does not have this checksum")
        self.hub.objects[oid] = self.body
        self.send(200, {})

    def lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise _Answer(404, "object not found")
        self.send(200, {})

    def commit(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id, writing=True)
        head = self.commit_id(repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head):
            raise _Answer(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.files(revision))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Answer(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            oid = repo.commit(files, header["summary"], f"refs/pr/{number}")
            url = f"{self.hub.url}/{repo_id}/discussions/{number}"
        else:
            oid, url = repo.commit(files, header["summary"], revision), None
        self.send(
            200,
            {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid, "pullRequestUrl": url},
        )

    # -- reading

    def paths_info(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id)
        self.commit_id(repo, revision)
        held = repo.files(revision)
        form = parse_qs(self.body.decode()) if not self.body.startswith(b"{") else json.loads(self.body)
        self.send(200, [_entry(path, held[path]) for path in form["paths"] if path in held])

    def tree(self, repo_id: str, revision: str, folder: str | None) -> None:
        repo = self.repo(repo_id)
        self.commit_id(repo, revision)
        prefix = (folder or "").strip("/")
        held = {
            path: body for path, body in repo.files(revision).items() if path.startswith(f"{prefix}/" if prefix else "")
        }
        if prefix and not held:
            raise _Answer(404, f"{prefix} does not exist", "EntryNotFound")
        folders = {str(parent) for path in held for parent in PurePosixPath(path).parents} - {"."}
        entries = [_entry(path, body) for path, body in sorted(held.items())]
        entries += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        entries = [entry for entry in entries if entry["path"].startswith(f"{prefix}/" if prefix else "")]
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            entries = [entry for entry in entries if str(PurePosixPath(entry["path"]).parent) == (prefix or ".")]
        self.send(200, entries)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.repo(repo_id)
        oid = self.commit_id(repo, revision)
        body = repo.files(revision).get(path)
        if body is None:
            raise _Answer(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": oid})
        etag = hashlib.sha256(body).hexdigest() if is_lfs(path) else git_blob_id(body)
        self.send(200, body, {"X-Repo-Commit": oid, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"})


def _entry(path: str, body: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(body), "oid": git_blob_id(body)}
    if is_lfs(path):
        entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
    return entry


def safetensors_info(files: list[bytes]) -> dict[str, Any]:
    """What the Hub reads off the headers: parameters by number format."""
    counts: dict[str, int] = {}
    for body in files:
        size = int.from_bytes(body[:8], "little")
        # Tests also keep words where weights would be.
        header = json.loads(body[8 : 8 + size]) if size < len(body) else {}
        for name, tensor in header.items():
            if name != "__metadata__":
                count = 1
                for length in tensor["shape"]:
                    count *= length
                counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + count
    return {"parameters": counts, "total": sum(counts.values())}
