"""What stands between the network and gradio: which routes exist, who may use them, and the files of runs.

Gradio serves no folder of ours. Files of runs go out here, by run id and by their name in the manifest.
"""

import io
import zipfile
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import anyio
from PIL import Image
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response

from sds3d.errors import InputError
from sds3d.paths import safe_slug
from sds3d.ui.store import RunStore

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# No font, script, picture or connection from anywhere else. The viewer compiles WebAssembly and starts workers.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' 'wasm-unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode("ascii")),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)
API = "/gradio_api"
# The page and its own files: the only thing that somebody may see before logging in.
PUBLIC = (
    "/assets/",
    "/static/",
    "/svelte/",
    "/theme.css",
    f"{API}/theme.css",
    "/favicon.ico",
    "/robots.txt",
    "/login",
)
PUBLIC_PAGES = (
    "/",
    "/manifest.json",
    f"{API}/login_check",
    f"{API}/user",
    f"{API}/app_id",
    f"{API}/token",
    f"{API}/startup-events",  # gradio asks this of itself; it says true
)
# What gradio offers and this page does not use: uploads, recordings, its editors and profilers.
CLOSED = (
    "/upload",
    "/process_recording",
    "/vibe",
    "/undo-vibe",
    "/dev/",
    "/proxy=",
    "/profiling",
    "/run-history",
    "/runs",
    "/deep_link",
    "/component_server",
    "/custom_component",
    "/stream/",
)
MAX_BODY = 1_000_000  # bytes of one request


class Guard:
    """Middleware: closes routes that are not used, asks for a login where there is one, adds security headers."""

    def __init__(self, app: Any, *, locked: bool) -> None:
        self.app, self.locked = app, locked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        refusal = self._refusal(Request(scope))
        if refusal is not None:
            await refusal(scope, receive, sending)
        else:
            await self.app(scope, receive, sending)

    def _refusal(self, request: Request) -> Response | None:
        path = request.url.path
        inner = path.removeprefix(API)
        if inner.startswith(CLOSED) or inner.startswith("/monitoring"):
            return PlainTextResponse("not offered here", 404)
        if request.method == "POST" and "content-length" not in request.headers:
            return PlainTextResponse("say how long it is", 411)
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return PlainTextResponse("too large", 413)
        public = path.startswith(PUBLIC) or path in PUBLIC_PAGES
        if self.locked and not public and not _logged_in(request):
            return PlainTextResponse("not authenticated", 401)
        return None


def _logged_in(request: Request) -> bool:
    """Whether the request carries a cookie of gradio's own login."""
    app = request.scope["app"]
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return any(request.cookies.get(name) in app.tokens for name in names if request.cookies.get(name))


class RunFiles:
    """GET /run-file/NAME?run=ID: a file of a run; "preview" and "thumbnail" as JPEG, obj and gltf as zip."""

    def __init__(self, store: RunStore) -> None:
        self.store = store

    async def respond(self, request: Request) -> Response:
        """One file, or 404."""
        run_id, name = request.query_params.get("run", ""), request.path_params["name"]
        try:
            return await anyio.to_thread.run_sync(self.answer, run_id, name)
        except (InputError, OSError, ValueError):
            return PlainTextResponse("no such file", 404)

    def answer(self, run_id: str, name: str) -> Response:
        """The response; raises InputError where there is no such run or file."""
        if name in ("preview", "thumbnail"):
            image = self.preview(run_id) if name == "preview" else self.thumbnail(run_id)
            return Response(
                jpeg(image), media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"}
            )
        paths = self.store.companions(run_id, name)
        slug = safe_slug(self.store.record(run_id).prompt)
        if len(paths) > 1:
            named = {"content-disposition": f'attachment; filename="{slug}-{name}.zip"'}
            return Response(zipped(paths), media_type="application/zip", headers=named)
        path = paths[0]
        shown = path.suffix in (".png", ".mp4")
        kind = "inline" if shown else "attachment"
        stem = slug if path.stem == "asset" else f"{slug}-{path.stem}"
        return FileResponse(path, filename=f"{stem}{path.suffix}", content_disposition_type=kind)

    def preview(self, run_id: str) -> Image.Image:
        """The last picture of a run."""
        return Image.open(self.store.file(run_id, "preview"))

    def thumbnail(self, run_id: str, size_px: int = 256) -> Image.Image:
        """One view of the finished asset, else of the last preview; raises InputError where there is neither."""
        record = self.store.record(run_id)
        if "contact_sheet" in record.files:  # three by three, seen from 45 degrees in the second tile
            sheet: Image.Image = Image.open(self.store.file(run_id, "contact_sheet"))
            side = sheet.width // 3
            tile = sheet.crop((side, 0, 2 * side, side))
        else:
            sheet = self.preview(run_id)
            side = sheet.width // max(1, columns(sheet))
            tile = sheet.crop((0, 0, side, side))
        return tile.resize((size_px, size_px), Image.Resampling.LANCZOS)


def columns(sheet: Image.Image) -> int:
    """Columns of a preview, told by its shape: square ones hold one or four views, 4:3 ones twelve."""
    if sheet.width == sheet.height:
        return 2 if sheet.width > 160 else 1
    return 4


def jpeg(image: Image.Image) -> bytes:
    """A picture as JPEG."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def zipped(paths: list[Path]) -> bytes:
    """Files side by side in one archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            archive.write(path, path.name)
    return buffer.getvalue()
