"""A Hugging Face hub on the loopback interface, as far as huggingface_hub asks for one when it downloads.

    with LoopbackHub() as hub:
        hub.add("dataset", "owner/name", {"data/train.parquet": b"..."})
        subprocess.run([...], env={**os.environ, **hub.environment(home)})
        hub.requests            # ["GET /api/datasets/owner/name", "HEAD /datasets/owner/name/resolve/...", ...]

`stall` holds downloads up, `token` and `gated` lock repositories. Only public client behaviour is relied on: repository
info, the tree of a revision, and `resolve` with HEAD, ETag and Range.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class _Repository:
    files: dict[str, bytes]
    gated: bool

    @property
    def revision(self) -> str:
        """A commit hash that depends on the content, as git's does."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class LoopbackHub:
    """Serves while the `with` block runs."""

    token: str | None = None
    """Without it, as a bearer token, no repository is to be seen."""
    stall: dict[str, int] = field(default_factory=dict)
    """{file: bytes}: a download of this file gets so many bytes and then nothing more while the `with` block runs."""
    requests: list[str] = field(default_factory=list)
    """"METHOD path" of every request so far, and "METHOD path bytes=..." of those with a range."""

    def add(self, kind: str, name: str, files: dict[str, bytes], gated: bool = False) -> None:
        """Put a repository there; `kind` is "model" or "dataset". Adding it again is a new revision."""
        self._repositories[f"{kind}s/{name}"] = _Repository(dict(files), gated)

    def environment(self, home: str | Path, **more: str) -> dict[str, str]:
        """Variables that lead huggingface_hub here, with its cache in `home` and without what may be set around."""
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

    @property
    def url(self) -> str:
        """http://127.0.0.1:PORT"""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __post_init__(self) -> None:
        self._repositories: dict[str, _Repository] = {}
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

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        wanted = self.headers.get("Range")
        self.owner.requests.append(f"{self.command} {path}" + (f" {wanted}" if wanted else ""))
        api = path.startswith("/api/")
        parts = path.removeprefix("/api").strip("/").split("/")
        kind = parts.pop(0) if parts[0] in ("datasets", "models") else "models"
        repo = self.owner._repositories.get(f"{kind}/{'/'.join(parts[:2])}")
        rest = parts[2:]
        if self.owner.token is not None and self.headers.get("Authorization") != f"Bearer {self.owner.token}":
            return self._refuse(401, "RepoNotFound", "Invalid username or password.")
        if repo is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if len(rest) > 1 and rest[0] in ("resolve", "revision", "tree") and rest[1] not in ("main", repo.revision):
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        if repo.gated and rest[:1] == ["resolve"]:
            return self._refuse(403, "GatedRepo", "Access to this repository is restricted")
        if api and rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in sorted(repo.files.items())
            ]
            return self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        if api:
            info = {
                "id": "/".join(parts[:2]),
                "sha": repo.revision,
                "private": False,
                "gated": repo.gated,
                "tags": [],
                "downloads": 0,
                "siblings": [{"rfilename": name} for name in sorted(repo.files)],
            }
            return self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        name = "/".join(rest[2:])
        if name not in repo.files:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repo.revision})
        self._send_file(name, repo.files[name], wanted, repo.revision)

    def _send_file(self, name: str, content: bytes, wanted: str | None, revision: str) -> None:
        headers = {
            "X-Repo-Commit": revision,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        status, start, end = 200, 0, len(content)
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else len(content)
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self._send(status, content[start:end], headers, self.owner.stall.get(name))

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self._send(status, json.dumps({"error": message}).encode(), named)

    def _send(self, status: int, body: bytes, headers: dict[str, str], stall: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:stall])
            if stall is not None:
                self.owner._closing.wait()
                self.close_connection = True
