"""The page as a server, without a browser: who may ask for what, and what goes out."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from http.cookiejar import CookieJar
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_ui_store import until

from sds3d.cli import main
from sds3d.errors import ConfigError
from sds3d.ui.recipe import Recipe
from sds3d.ui.serve import ServeConfig, login, notes

pytest.importorskip("gradio")

ROOT = Path(__file__).resolve().parents[2]
SECRET = "a secret that nobody may read"


@dataclass(frozen=True)
class Locked:
    """A server with a login, and one run in its root."""

    url: str
    routes: list[str]
    root: Path

    def tasks(self) -> list[dict[str, Any]]:
        """What its worker was given."""
        log = self.root.parent / "tasks.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    folder = tmp_path_factory.mktemp("ui")
    (folder / "secret.txt").write_text(SECRET)
    run = folder / "root" / "default" / "one"
    run.mkdir(parents=True)
    for name in ("asset.obj", "asset.mtl", "asset.glb", "checkpoint.bin"):
        (run / name).write_bytes(name.encode())
    Image.new("RGB", (96, 72), "red").save(run / "preview.png")
    files = {"obj": "asset.obj", "glb": "asset.glb", "stl": "../../../secret.txt"}
    manifest = {"prompt": "a <b>duck</b>", "status": "done", "files": files, "started": "2020"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    command = [sys.executable, str(ROOT / "tests" / "ui_server.py"), str(folder / "root")]
    with subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        yield Locked(said["url"].rstrip("/"), said["routes"], folder / "root")
        process.stdin.close()
        assert process.wait(60) == 0


class Visitor:
    """Asks the server as a browser would, with cookies."""

    def __init__(self, server: Locked) -> None:
        self.url = server.url
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))

    def ask(
        self, path: str, data: bytes | None = None, kind: str = "application/json"
    ) -> tuple[int, bytes, Any]:
        request = urllib.request.Request(self.url + path, data=data, headers={"content-type": kind})
        try:
            with self.opener.open(request, timeout=30) as answer:
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), error.headers

    def enter(self, user: str, password: str) -> int:
        form = urllib.parse.urlencode({"username": user, "password": password}).encode()
        return self.ask("/login", form, "application/x-www-form-urlencoded")[0]

    def call(self, name: str, *values: Any) -> Any:
        status, body, _ = self.ask(f"/gradio_api/call/{name}", json.dumps({"data": values}).encode())
        assert status == 200, body
        _, stream, _ = self.ask(f"/gradio_api/call/{name}/{json.loads(body)['event_id']}")
        event, data = re.findall(rb"event: (\w+)\ndata: (.*)", stream)[-1]
        if event == b"error":
            raise ConfigError(json.loads(data)["error"] if data != b"null" else "error")
        return json.loads(data)[0]


@pytest.fixture
def inside(locked: Locked) -> Visitor:
    visitor = Visitor(locked)
    assert visitor.enter("ann", "pass word") == 200
    return visitor


def test_nothing_is_given_without_the_login(locked: Locked) -> None:
    stranger = Visitor(locked)
    assert stranger.enter("ann", "wrong") == 400
    page = stranger.ask("/")[1]
    assert b"red mug" not in page
    assert b"default/one" not in page
    fixed = {"/", "/manifest.json", "/favicon.ico", "/robots.txt", "/theme.css", "/login", "/login/"}
    asked = 0
    for route in locked.routes:
        path = re.sub(r"\{[^}]*\}", "x", route)
        public = path in fixed or path.startswith(("/static", "/assets", "/svelte"))
        if public or path.removeprefix("/gradio_api").rstrip("/") in (
            "/login_check",
            "/user",
            "/app_id",
            "/token",
            "/theme.css",
            "/startup-events",
        ):
            continue
        for data in (None, b"{}"):
            asked += 1
            assert stranger.ask(path or "/x", data)[0] in (401, 404, 405), path
    assert asked > 60
    assert stranger.ask("/gradio_api/user")[1] == b"null"


def test_files_of_runs_go_out_by_name_only(inside: Visitor) -> None:
    def get(name: str, run: str = "default/one") -> tuple[int, bytes, Any]:
        return inside.ask(f"/run-file/{urllib.parse.quote(name, safe='')}?run={urllib.parse.quote(run)}")

    status, body, headers = get("glb")
    assert (status, body) == (200, b"asset.glb")
    assert 'filename="a-b-duck-b.glb"' in headers["content-disposition"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in headers["content-security-policy"]
    archive = zipfile.ZipFile(BytesIO(get("obj")[1]))
    assert sorted(archive.namelist()) == ["asset.mtl", "asset.obj"]
    assert Image.open(BytesIO(get("thumbnail")[1])).size == (256, 256)
    for name, run in (
        ("stl", "default/one"),
        ("checkpoint.bin", "default/one"),
        ("../../../secret.txt", "default/one"),
        ("glb", "../root/default/one"),
        ("glb", "/etc"),
        ("glb", ""),
        ("glb", "default"),
    ):
        status, body, _ = get(name, run)
        assert status == 404
        assert SECRET.encode() not in body


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file={root}/default/one/manifest.json",
        "/gradio_api/file={secret}",
    ],
)
def test_gradio_gives_out_no_other_file(inside: Visitor, locked: Locked, path: str) -> None:
    root = locked.root
    status, body, _ = inside.ask(path.format(root=root, secret=root.parent / "secret.txt"))
    assert status in (403, 404)
    assert SECRET.encode() not in body


@pytest.mark.parametrize(
    "path", ["/upload", "/vibe-edit/", "/process_recording", "/component_server", "/runs", "/proxy=x"]
)
def test_what_the_page_does_not_need_is_closed(inside: Visitor, path: str) -> None:
    assert inside.ask(f"/gradio_api{path}", b"{}")[0] == 404
    assert inside.ask("/monitoring")[0] == 404


@pytest.mark.parametrize(("length", "status"), [("2000000", 413), ("lots", 413), (None, 411)])
def test_requests_of_no_or_great_length_are_refused(locked: Locked, length: str | None, status: int) -> None:
    address = urllib.parse.urlsplit(locked.url)
    connection = HTTPConnection(str(address.hostname), address.port, timeout=30)
    connection.putrequest("POST", "/gradio_api/call/submit")
    if length is None:
        connection.putheader("transfer-encoding", "chunked")
    else:
        connection.putheader("content-length", length)
    connection.endheaders()
    assert connection.getresponse().status in (status, 400)  # uvicorn itself refuses what is no number
    connection.close()


def test_jobs_through_the_api(inside: Visitor, locked: Locked) -> None:
    run = inside.call("submit", "a red mug", "fast", 1, 30, {"guidance.cfg_scale": 6.0})
    until(lambda: bool(locked.tasks()))
    given = locked.tasks()[0]["settings"]
    assert {"prompt": "a red mug", "seed": 1, "steps": 30, "guidance.cfg_scale": 6.0}.items() <= given.items()
    waiting = inside.call("submit_yaml", "extends: fast\nprompt: a blue car\n")
    assert inside.call("status", waiting)["ahead"] == 1
    assert [row["run"] for row in inside.call("queue")] == [run, waiting]
    for name, *values in (
        ("submit", "  ", "default", 0, None, None),
        ("submit", "a mug", "../default", 0, None, None),
        ("submit", "a mug", "default", 0, None, {"edit.run": "/etc"}),
        ("submit_yaml", "prior: {name: /etc}"),
        ("status", "../../etc"),
        ("stop", "/etc"),
        ("delete", ".."),
        ("delete", run),
        ("result", "nothing"),
        ("download", "default/one", "../../../secret.txt"),
        ("download", "default/one", "stl"),
        ("export", "default/one", ["exe"], None, None),
    ):
        with pytest.raises(
            ConfigError, match=r"expected|unknown|no such|holds no|empty|stop it first|cannot be"
        ):
            inside.call(name, *values)
    assert inside.call("stop", waiting) is True
    assert inside.call("stop", run) is True
    until(lambda: inside.call("queue") == [])
    assert inside.call("result", "default/one")["urls"]["glb"].startswith("run-file/glb?")
    assert [row["run"] for row in inside.call("runs", "duck", 50)] == ["default/one"]
    assert Path(inside.call("download", "default/one", "glb")["path"]).read_bytes() == b"asset.glb"


def test_the_page_holds_no_way_out(inside: Visitor) -> None:
    page = inside.ask("/")[1].decode()
    assert not re.search(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["']?(?:https?:)?//""", page)


@pytest.mark.parametrize("text", ["", "ann", "ann:", ":secret", " :x"])
def test_half_a_login_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="user:password"):
        login(text)


def test_safe_defaults_and_warnings() -> None:
    assert (ServeConfig().host, ServeConfig().share, notes(ServeConfig())) == ("127.0.0.1", False, [])
    for config in (ServeConfig(host="0.0.0.0"), ServeConfig(share=True)):
        assert "log in" in notes(config)[0]
    assert notes(ServeConfig(host="0.0.0.0", auth=(login("ann:x"),))) == []


def test_mistakes_on_the_command_line_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--auth", "nobody"]) == 2
    assert main(["ui", "--port", "99999"]) == 2
    said = capsys.readouterr().err
    assert "user:password" in said
    assert "port: got 99999" in said


def test_a_recipe_without_a_prompt_is_told() -> None:
    assert Recipe.from_yaml("") == Recipe()
