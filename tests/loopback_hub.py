"""A hub on the loopback address, for pushes and fetches; it keeps what it is sent."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_" + "Canary0" * 5
_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The state of the hub: its repositories, and what it refuses."""

    address: str = ""
    repos: dict[str, dict[str, Any]] = field(default_factory=dict)
    refuses: dict[str, int] = field(default_factory=dict)  # part of a path: status
    requests: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """The status and the JSON of an answer."""
        self.requests.append(f"{method} {path}")
        for part, status in self.refuses.items():
            if part in f"{method} {path}":
                # Servers have been seen to repeat what they were sent.
                return status, {"error": f"refused, you sent {token}"}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked["visibility"] == "private"
            self.repos[name] = {"private": private, "branches": {"main": {}}}
            return 200, {"url": f"{self.address}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        parts = [unquote(each) for each in path.removeprefix("/api/models/").split("/")]
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo not in self.repos:
            return 404, {"error": "Repository not found", "code": "RepoNotFound"}
        return self._of_repo(repo, rest, body)

    def file(self, path: str, token: str) -> bytes | None:
        """The content of a file that is fetched; None where there is no such file."""
        repo, _, rest = unquote(path).removeprefix("/").partition("/resolve/")
        branches = self.repos.get(repo, {"branches": {}})["branches"]
        _, _, name = rest.partition("/")
        content: bytes | None = branches.get("main", {}).get(name)
        return content if token == f"Bearer {TOKEN}" else None

    def _of_repo(self, repo: str, rest: list[str], body: bytes) -> tuple[int, Any]:
        held = self.repos[repo]
        branches = held["branches"]
        match rest:
            case [] | ["revision", _]:
                branch = rest[1] if rest and rest[1] != _COMMIT else "main"
                if branch not in branches:
                    return 404, {"error": "Invalid rev id", "code": "RevisionNotFound"}
                names = [".gitattributes", *branches[branch]]
                siblings = [{"rfilename": name} for name in names]
                about = {"id": repo, "private": held["private"], "sha": _COMMIT}
                return 200, {**about, "siblings": siblings, "tags": []}
            case ["tree", _]:
                files = branches["main"].items()
                return 200, [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(content),
                        "oid": hashlib.sha256(content).hexdigest(),
                    }
                    for name, content in files
                ]
            case ["branch", branch]:
                branches[branch] = dict(branches["main"])
                return 200, {}
            case ["preupload", _]:
                files = json.loads(body)["files"]
                modes = [{"path": e["path"], "uploadMode": "regular"} for e in files]
                return 200, {"files": [{**each, "shouldIgnore": False} for each in modes]}
            case ["commit", branch]:
                self._commit(branches[branch], body)
                held["message"] = json.loads(body.splitlines()[0])["value"]["summary"]
                url = f"{self.address}/{repo}/commit/{_COMMIT}"
                return 200, {"commitUrl": url, "commitOid": _COMMIT, "pullRequestUrl": None}
        return 404, {"error": f"no such place: {rest}"}

    def _commit(self, branch: dict[str, bytes], body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                branch[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del branch[value["path"]]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            token = self.headers.get("Authorization", "")
            path = self.path.partition("?")[0]
            if "/resolve/" in path:
                self._send_file(hub.file(path, token))
                return
            status, content = hub.answer(self.command, path, body, token)
            raw = json.dumps(content).encode()
            self.send_response(status)
            for key in ("error", "code"):
                if key in content:
                    name = {"error": "X-Error-Message", "code": "X-Error-Code"}[key]
                    self.send_header(name, content[key])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def _send_file(self, content: bytes | None) -> None:
            self.send_response(404 if content is None else 200)
            self.send_header("X-Repo-Commit", _COMMIT)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            else:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        do_GET = do_POST = do_HEAD = _answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
