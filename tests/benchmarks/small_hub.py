"""A hub of models and data sets on this machine: as much of the Hub's interface as its own client asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

_COMMIT = "0" * 39 + "1"


#: Files that were fetched: kind of repository, name, path.
Fetched = set[tuple[str, str, str]]


class _Hub(ThreadingHTTPServer):
    #: Folders by kind (``models``, ``datasets``) and name.
    repositories: dict[tuple[str, str], Path]
    fetched: Fetched


class _Handler(BaseHTTPRequestHandler):
    server: _Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.headers["Content-Type"].startswith("application/json"):
            wanted = json.loads(body)["paths"]
        else:
            wanted = parse_qs(body)["paths"]
        self._answer(wanted)

    def _answer(self, wanted: list[str] | None = None) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        api = parts[0] == "api"
        parts = parts[api:]
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.server.repositories.get((kind, name))
        if folder is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif not api and rest[:1] == ["resolve"]:
            self._file(kind, name, folder, "/".join(rest[2:]))
        elif (api and not rest) or rest[:1] == ["revision"]:
            files = [{"rfilename": file["path"]} for file in _listing(folder)]
            about = {"id": name, "sha": _COMMIT, "private": False, "tags": [], "siblings": files}
            self._send(200, json.dumps(about).encode())
        elif api and rest[0] in ("tree", "paths-info"):
            below = "/".join(rest[2:])
            found = [f for f in _listing(folder) if not below or f["path"].startswith(f"{below}/")]
            if wanted is not None:
                found = [file for file in found if file["path"] in wanted]
            self._send(200, json.dumps(found).encode())
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _file(self, kind: str, name: str, folder: Path, path: str) -> None:
        if not (folder / path).is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _COMMIT})
            return
        content = (folder / path).read_bytes()
        if self.command == "GET":
            self.server.fetched.add((kind, name, path))
        mark = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": _COMMIT}
        self._send(200, content, mark)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _listing(folder: Path) -> list[dict[str, object]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in files
    ]


@contextmanager
def small_hub(
    repositories: dict[tuple[str, str], Path],
) -> Iterator[tuple[str, Fetched]]:
    """Serve folders as models and data sets; yields the address, and the files that were fetched so far."""
    server = _Hub(("127.0.0.1", 0), _Handler)
    server.repositories, server.fetched = repositories, set()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
