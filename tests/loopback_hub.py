"""A Hugging Face hub on the loopback interface, as far as huggingface_hub asks for one when it downloads and uploads.

    with LoopbackHub() as hub:
        hub.add("dataset", "owner/name", {"data/train.parquet": b"..."})
        subprocess.run([...], env={**os.environ, **hub.environment(home)})
        hub.requests            # ["GET /api/datasets/owner/name", "HEAD /datasets/owner/name/resolve/...", ...]

`stall` holds downloads up, `token` and `gated` lock repositories, `users` may upload. Only public client behaviour is
relied on. Downloads: repository info, the tree of a revision, and `resolve` with HEAD, ETag and Range. Uploads: who a
token belongs to, the repository's creation, the check of README.md, which files go where, the LFS batch with its PUT
and its verification, and the commit as lines of JSON.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".png", ".parquet", ".gguf", ".bin")


@dataclass(frozen=True)
class _File:
    """The content of a file, in memory or (for what is large) on the disk."""

    content: bytes | Path

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        if isinstance(self.content, bytes):
            yield self.content[start:end]
            return
        with open(self.content, "rb") as file:
            file.seek(start)
            while start < end and (piece := file.read(min(2**20, end - start))):
                start += len(piece)
                yield piece

    @cached_property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for piece in self.pieces(0, self.size):
            digest.update(piece)
        return digest.hexdigest()

    @cached_property
    def blob(self) -> str:
        """The name that git gives to this content."""
        digest = hashlib.sha1(f"blob {self.size}\0".encode())
        for piece in self.pieces(0, self.size):
            digest.update(piece)
        return digest.hexdigest()


@dataclass
class _Repository:
    files: dict[str, _File]
    gated: bool = False
    private: bool = False
    commits: list[str] = field(default_factory=list)
    """The first line of each commit's message."""

    @property
    def revision(self) -> str:
        """A commit hash that depends on the content, as git's does."""
        return hashlib.sha1(repr(sorted((name, file.sha256) for name, file in self.files.items())).encode()).hexdigest()


@dataclass
class LoopbackHub:
    """Serves while the `with` block runs."""

    token: str | None = None
    """Without it, as a bearer token, no repository is to be seen."""
    users: dict[str, str] = field(default_factory=dict)
    """{token: user}: who this token belongs to, and so where it may write; a token that begins with "read" may not."""
    stall: dict[str, int] = field(default_factory=dict)
    """{file: bytes}: a download of this file gets so many bytes and then nothing more while the `with` block runs."""
    fail: dict[str, tuple[int, str]] = field(default_factory=dict)
    """{part of a path: (status, message)}: what such a request is answered with."""
    requests: list[str] = field(default_factory=list)
    """"METHOD path" of every request so far, and "METHOD path bytes=..." of those with a range."""

    def add(self, kind: str, name: str, files: dict[str, Any], gated: bool = False) -> None:
        """Put a repository there; `kind` is "model" or "dataset". Adding it again is a new revision.

        The content of a file is bytes, or the path of a file to serve.
        """
        self._repositories[f"{kind}s/{name}"] = _Repository({n: _File(content) for n, content in files.items()}, gated)

    def files(self, name: str) -> dict[str, bytes]:
        """What a model's repository holds."""
        held = self._repositories[f"models/{name}"].files
        return {path: b"".join(file.pieces(0, file.size)) for path, file in held.items()}

    def commits(self, name: str) -> list[str]:
        """The messages of the commits that were pushed to a model's repository."""
        return self._repositories[f"models/{name}"].commits

    def is_private(self, name: str) -> bool:
        """Whether a model's repository is."""
        return self._repositories[f"models/{name}"].private

    def environment(self, home: str | Path, **more: str) -> dict[str, str]:
        """Variables that lead huggingface_hub here, with its cache in `home` and without what may be set around.

        Xet, the hub's own protocol for large files, is off: then huggingface_hub speaks LFS, as it does where hf_xet is
        not installed.
        """
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home) / "hub"),
            "HF_TOKEN_PATH": str(Path(home) / "token"),
            "HF_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            **more,
        }

    def downloads(self, file: str) -> int:
        """How often the content of a file was asked for."""
        return sum(r.startswith("GET ") and r.split(" ")[1].endswith(f"/{file}") for r in self.requests)

    def uploads(self) -> list[str]:
        """The requests that changed something: repositories created, large files put, commits."""
        changing = ("POST /api/repos/create", "PUT ", "POST /api/models/")
        return [r for r in self.requests if r.startswith(changing) and "/preupload/" not in r]

    @property
    def url(self) -> str:
        """http://127.0.0.1:PORT"""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __post_init__(self) -> None:
        self._repositories: dict[str, _Repository] = {}
        self._large: dict[str, bytes] = {}  # {sha256: content} of what came by LFS
        self._closing = threading.Event()
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path, self._query = unquote(url.path), url.query
        body = self._body()
        wanted = self.headers.get("Range")
        self.owner.requests.append(f"{self.command} {path}" + (f" {wanted}" if wanted else ""))
        for part, (status, message) in self.owner.fail.items():
            if part in path:
                return self._refuse(status, "", message)
        if self.owner.token is not None and self._token != self.owner.token:
            return self._refuse(401, "RepoNotFound", "Invalid username or password.")
        if self._token and self.owner.users and self._token not in self.owner.users:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if self.command in ("GET", "HEAD") and path != "/api/whoami-v2":
            return self._read(path, wanted)
        return self._write(path, body)

    @property
    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    @property
    def _user(self) -> str | None:
        return self.owner.users.get(self._token)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # --- downloads

    def _read(self, path: str, wanted: str | None) -> None:
        api = path.startswith("/api/")
        parts = path.removeprefix("/api").strip("/").split("/")
        kind = parts.pop(0) if parts[0] in ("datasets", "models") else "models"
        repo = self.owner._repositories.get(f"{kind}/{'/'.join(parts[:2])}")
        rest = parts[2:]
        if repo is None or (repo.private and self._user != parts[0]):
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if len(rest) > 1 and rest[0] in ("resolve", "revision", "tree") and rest[1] not in ("main", repo.revision):
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        if repo.gated and rest[:1] == ["resolve"]:
            return self._refuse(403, "GatedRepo", "Access to this repository is restricted")
        if api and rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": file.size, "oid": file.blob}
                for name, file in sorted(repo.files.items())
            ]
            return self._send_json(entries)
        if api:
            info = {
                "id": "/".join(parts[:2]),
                "sha": repo.revision,
                "private": repo.private,
                "gated": repo.gated,
                "tags": [],
                "downloads": 0,
                "siblings": [self._sibling(name, file) for name, file in sorted(repo.files.items())],
            }
            return self._send_json(info)
        name = "/".join(rest[2:])
        if name not in repo.files:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repo.revision})
        self._send_file(name, repo.files[name], wanted, repo.revision)

    def _sibling(self, name: str, file: _File) -> dict[str, Any]:
        """A file in a repository's info, with what it is if the client asked for that."""
        if "blobs=" not in self._query:
            return {"rfilename": name}
        known = {"rfilename": name, "size": file.size, "blobId": file.blob}
        if name.endswith(LFS_SUFFIXES):
            known["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 130}
        return known

    def _send_file(self, name: str, file: _File, wanted: str | None, revision: str) -> None:
        headers = {"X-Repo-Commit": revision, "ETag": f'"{file.sha256}"', "Accept-Ranges": "bytes"}
        status, start, end = 200, 0, file.size
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else file.size
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
        self._start(status, end - start, headers)
        if self.command != "GET":
            return
        stall = self.owner.stall.get(name)
        for piece in file.pieces(start, end if stall is None else start + stall):
            self.wfile.write(piece)
        if stall is not None:
            self.owner._closing.wait()
            self.close_connection = True

    # --- uploads

    def _write(self, path: str, body: bytes) -> None:
        if self.command == "PUT" and path.startswith("/lfs/"):  # a signed address, as of a store beside the hub
            if hashlib.sha256(body).hexdigest() != path.removeprefix("/lfs/"):
                return self._refuse(400, "", "the content is not what was announced")
            self.owner._large[path.removeprefix("/lfs/")] = body
            return self._send(200, b"", {})
        if self._user is None:
            return self._refuse(401, "", "Invalid username or password.")
        if path == "/api/whoami-v2":
            role = "read" if self._token.startswith("read") else "write"
            return self._send_json({"type": "user", "name": self._user, "auth": {"accessToken": {"role": role}}})
        if path == "/api/validate-yaml":
            return self._check_card(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        owner, name = path.removeprefix("/api/models").strip("/").split("/")[:2]
        name = name.removesuffix(".git")
        repo = self.owner._repositories.get(f"models/{owner}/{name}")
        if repo is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if not self._may_write(owner):
            return self._refuse(403, "", f"You don't have the rights to write to {owner}/{name}")
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return self._send_json({"files": [self._destination(repo, file) for file in files]})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [self._action(f"{owner}/{name}", wanted) for wanted in objects]
            return self._send_json({"transfer": "basic", "objects": actions})
        if path.endswith("/lfs-verify"):
            known = json.loads(body)["oid"] in self.owner._large
            return self._send_json({}) if known else self._refuse(404, "", "no such object")
        if path.endswith("/commit/main"):
            return self._commit(f"{owner}/{name}", repo, [json.loads(line) for line in body.splitlines()])
        self._refuse(404, "", "Not found")

    def _may_write(self, owner: str | None) -> bool:
        return owner == self._user and not self._token.startswith("read")

    def _check_card(self, content: str) -> None:
        """The front matter of a README.md: YAML whose license is one word."""
        errors = []
        try:
            values = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
            if not isinstance(values.get("license", ""), str):
                errors.append({"message": '"license" must be a string'})
        except yaml.YAMLError as error:
            errors.append({"message": f"YAML parsing: {error}"})
        self._send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _create(self, wanted: dict[str, Any]) -> None:
        owner = wanted.get("organization") or self._user
        name = f"{owner}/{wanted['name']}"
        if not self._may_write(owner):
            return self._refuse(403, "", f'You don\'t have the rights to create a model under the namespace "{owner}"')
        where = {"url": f"{self.owner.url}/{name}", "name": name, "id": "0"}
        if f"models/{name}" in self.owner._repositories:
            return self._send_json({"error": "You already created this model repo", **where}, 409)
        private = wanted.get("visibility") == "private" or wanted.get("private", False)
        first = _File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        self.owner._repositories[f"models/{name}"] = _Repository({".gitattributes": first}, private=private)
        self._send_json(where)

    def _destination(self, repo: _Repository, file: dict[str, Any]) -> dict[str, Any]:
        """Whether a file goes through LFS or into the commit, and what the repository has under its name."""
        large, held = file["path"].endswith(LFS_SUFFIXES), repo.files.get(file["path"])
        oid = None if held is None else held.sha256 if large else held.blob
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _action(self, name: str, wanted: dict[str, Any]) -> dict[str, Any]:
        """Where to put a large file; nowhere if it is known."""
        if wanted["oid"] in self.owner._large:
            return wanted
        put = {"href": f"{self.owner.url}/lfs/{wanted['oid']}"}
        return {**wanted, "actions": {"upload": put, "verify": {"href": f"{self.owner.url}/{name}/lfs-verify"}}}

    def _commit(self, name: str, repo: _Repository, lines: list[dict[str, Any]]) -> None:
        files, message = dict(repo.files), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", repo.revision) != repo.revision:
                    return self._refuse(412, "", "A commit has happened since. Please refresh and try again.")
            elif line["key"] == "file":
                files[value["path"]] = _File(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.owner._large:
                    return self._refuse(400, "", f"{value['path']} was never uploaded")
                files[value["path"]] = _File(self.owner._large[value["oid"]])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repo.files = files
        repo.commits.append(message)
        self._send_json({"commitUrl": f"{self.owner.url}/{name}/commit/{repo.revision}", "commitOid": repo.revision})

    # --- answers

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code} if code else {}
        named |= {"X-Error-Message": message, **(headers or {})}
        self._send(status, json.dumps({"error": message}).encode(), named)

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._start(status, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _start(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
