"""A hub on the loopback interface: enough of its protocol to list and download one repository."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Repositories by name; `faults` by name: gated, busy or forbidden."""

    url: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)  # files whose content went out
    asked: list[str] = field(default_factory=list)  # repositories that were asked about
    declared: dict[str, int] = field(default_factory=dict)  # sizes that are not the true ones

    def refusal(self, name: str, verb: str, revision: str, rest: str) -> tuple[int, str] | None:
        """Status and error code where there is no answer."""
        fault = self.faults.get(name)
        if name not in self.repositories:
            return 404, "RepoNotFound"
        if fault in ("busy", "forbidden"):
            return (500 if fault == "busy" else 403), ""
        if revision not in ("main", SHA):
            return 404, "RevisionNotFound"
        if verb == "resolve" and fault == "gated":
            return 401, "GatedRepo"
        return (404, "EntryNotFound") if verb == "resolve" and rest not in self.files(name) else None

    def listing(self, name: str, verb: str) -> Any:
        """All files: as one record, or as a tree."""
        sizes = {
            path: self.declared.get(path, file.stat().st_size) for path, file in self.files(name).items()
        }
        if verb == "revision":
            siblings = [{"rfilename": path, "size": size} for path, size in sizes.items()]
            return {"id": name, "sha": SHA, "private": False, "siblings": siblings}
        oids = {path: digest(file) for path, file in self.files(name).items()}
        return [
            {"type": "file", "path": path, "size": size, "oid": oids[path]} for path, size in sizes.items()
        ]

    def files(self, name: str) -> dict[str, Path]:
        root = self.repositories[name]
        return {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}


class _Server(ThreadingHTTPServer):
    hub: FakeHub


class _Handler(BaseHTTPRequestHandler):
    """Speaks for the server's hub."""

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path).strip("/").removeprefix("api/models/").split("/")
        name, verb, revision, rest = "/".join(path[:2]), path[2], path[3], "/".join(path[4:])
        hub.asked.append(name)
        refusal = hub.refusal(name, verb, revision, rest)
        if refusal is not None:
            self._send(refusal[0], {"X-Error-Code": refusal[1]})
        elif verb == "resolve":
            file = hub.files(name)[rest]
            if body:
                hub.sent.append(rest)
            headers = {"ETag": f'"{digest(file)}"', "X-Repo-Commit": SHA}
            self._send(200, headers, file.read_bytes(), body=body)
        else:
            self._send(
                200, {"Content-Type": "application/json"}, json.dumps(hub.listing(name, verb)).encode()
            )

    def _send(self, status: int, headers: dict[str, str], data: bytes = b"", *, body: bool = True) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running hub."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = FakeHub(url=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
