"""The right half of the page: a run while it goes on, and what came of it."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from sds3d.errors import InputError, Sds3dError
from sds3d.mesh.files import EXPORTERS
from sds3d.ui import html
from sds3d.ui.desk import Desk, View
from sds3d.ui.looks import LOOKS, Looks, jpeg_uri
from sds3d.ui.style import OPEN_RUN_JS
from sds3d.ui.web import columns

TICK_S = 0.5
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
FREE: dict[str, Any] = {**QUIET, "queue": False}  # answered at once, whatever else waits
IDLE = "Describe a thing on the left and press Create. It takes shape here."


@dataclass
class Stage:
    """The parts of the right half that other parts of the page talk to."""

    run: gr.Textbox  # id of the run that is shown; hidden
    seen: gr.Textbox  # what the browser shows already; hidden
    links: gr.HTML  # the queue, whose links open runs


def build_stage(desk: Desk, looks: Looks, run: gr.Textbox, message: gr.HTML) -> Stage:
    """All components with their events; `run` holds the id of the run that is shown."""
    seen = gr.Textbox(visible="hidden", elem_id="seen")
    stamp = gr.Textbox(visible="hidden", elem_id="stamp")
    live = gr.HTML(html.blank_stage(IDLE), elem_id="live")
    viewer = gr.Model3D(
        visible=False,
        label="3D model",
        clear_color=(0.97, 0.98, 0.98, 1.0),
        height="min(30rem, 92vw)",
        interactive=False,
        elem_id="viewer",
    )
    with gr.Row(elem_id="actions"):
        stop = gr.Button("Stop and keep what there is", variant="stop", visible=False, elem_id="stop")
        resume = gr.Button("Resume", variant="secondary", visible=False, elem_id="resume")
    progress = gr.HTML(elem_id="progress")
    saved = gr.HTML(elem_id="downloads")
    with gr.Tabs(visible=False, elem_id="results") as results:
        with gr.Tab("Turntable"):
            video = gr.HTML()
        with gr.Tab("Looks"):
            with gr.Row():
                look = gr.Radio(list(LOOKS), value="shaded", label="Look", elem_id="look")
                side = gr.Slider(0, 345, value=30, step=15, label="Seen from (degrees)")
            shown = gr.HTML(elem_id="look-picture")
        with gr.Tab("Gaussians", visible=False) as splat_tab:
            splats = gr.Model3D(
                elem_id="splats",
                label="The Gaussians themselves",
                height="min(30rem, 92vw)",
                interactive=False,
            )
        with gr.Tab("Figures"):
            figures = gr.HTML()
        with gr.Tab("Export again"):
            formats = gr.CheckboxGroup(list(EXPORTERS), value=["glb"], label="Formats")
            with gr.Row():
                faces = gr.Slider(500, 50_000, value=8000, step=500, label="Faces, about", elem_id="faces")
                texture = gr.Dropdown([128, 256, 512, 1024, 2048, 4096], value=512, label="Texture (pixels)")
            again = gr.Button("Export", elem_id="export-again")
    queue = gr.HTML(js_on_load=OPEN_RUN_JS, elem_id="queue")
    with gr.Accordion("Log", open=False, elem_id="log"):
        log = gr.HTML(html.log([]))

    def tick(run_id: str, seen_before: str) -> list[Any]:
        view, known = find(desk, run_id), _seen(seen_before)
        parts = {
            "progress": html.progress(view) if view is not None else "",
            "queue": html.queue_list(desk.queue.active(), run_id),
            "log": html.log(_lines(view)),
            "stamp": view.stamp if view is not None else run_id,
        }
        marks = {
            name: hashlib.blake2b(text.encode(), digest_size=6).hexdigest() for name, text in parts.items()
        }
        marks["live"] = live_mark(view)
        changed = [text if marks[name] != known.get(name) else gr.skip() for name, text in parts.items()]
        moving = live_picture(view) if marks["live"] != known.get("live") else gr.skip()
        return [*changed, moving, json.dumps(marks) if marks != known else gr.skip()]

    def settle(run_id: str) -> list[Any]:
        view, files = find(desk, run_id), results_of(desk, run_id)
        record = view.record if view is not None and files else None
        return [
            gr.update(visible="glb" not in files),
            gr.update(visible=True) if "glb" in files else gr.update(visible=False, value=None),
            gr.update(visible=view is not None and view.can_stop),
            gr.update(visible=view is not None and view.can_resume),
            html.downloads(record) if record is not None else "",
            gr.update(visible=record is not None),
            html.video(record) if record is not None else "",
            html.statistics(record) if record is not None else "",
            picture(run_id, "shaded", 30.0) if "glb" in files else "",
            gr.update(visible="splats_ply" in files),
        ]

    def models(run_id: str) -> list[Any]:
        view, files = find(desk, run_id), results_of(desk, run_id)
        if view is not None and view.exporting:
            return [gr.skip(), gr.skip()]  # a viewer that takes two models in a row may show neither
        return [_cached(files[name]) if name in files else None for name in ("glb", "splats_ply")]

    def cloud(run_id: str) -> str | None:
        files = results_of(desk, run_id)
        return _cached(files["splats_ply"]) if "splats_ply" in files else None

    def picture(run_id: str, kind: str, azimuth: float) -> str:
        try:
            path = desk.store.file(run_id, "glb")
            image = looks.picture(path, kind, azimuth)  # type: ignore[arg-type]
        except (Sds3dError, OSError) as error:
            return html.notice(str(error), "info")
        alt = f"The asset, {kind}, from {azimuth:.0f} degrees"
        return f'<div class="stage"><img alt="{alt}" src="{jpeg_uri(image)}"></div>'

    def export_again(run_id: str, kinds: list[str], max_faces: int, texture_px: int) -> str:
        wanted = {"export.max_faces": int(max_faces), "export.texture_px": int(texture_px)}
        return said(lambda: desk.export(run_id, kinds, wanted))

    timer = gr.Timer(TICK_S)
    outputs = [progress, queue, log, stamp, live, seen]
    gr.on([timer.tick, run.change], tick, [run, seen], outputs, **FREE)
    stamp.change(
        settle,
        run,
        [live, viewer, stop, resume, saved, results, video, figures, shown, splat_tab],
        **QUIET,
        concurrency_limit=4,
    ).then(
        models, run, [viewer, splats], **QUIET, concurrency_limit=4
    )  # a viewer must be there to take a model
    # A viewer takes a model only while it is on the page, so one in a tab gets it when the tab opens.
    splat_tab.select(lambda: None, None, splats, **QUIET).then(cloud, run, splats, **QUIET)
    stop.click(lambda run_id: said(lambda: desk.stop(run_id)), run, message, **FREE)
    resume.click(lambda run_id: said(lambda: desk.resume(run_id)), run, message, **FREE)
    again.click(export_again, [run, formats, faces, texture], message, **FREE)
    gr.on(
        [look.input, side.input],
        picture,
        [run, look, side],
        shown,
        trigger_mode="always_last",
        concurrency_limit=2,
        **QUIET,
    )
    return Stage(run=run, seen=seen, links=queue)


def said(act: Callable[[], object]) -> str:
    """Do something; the message to show where it was refused, else none."""
    try:
        act()
    except Sds3dError as error:
        return html.notice(str(error))
    return ""


def find(desk: Desk, run_id: str | None) -> View | None:
    """A run, or None where there is none of this id."""
    try:
        return desk.view(run_id) if run_id else None
    except InputError:
        return None


def results_of(desk: Desk, run_id: str) -> Mapping[str, Path]:
    """The files of a run that is not being made at this moment."""
    view = find(desk, run_id)
    return {} if view is None or view.active or view.record is None else view.record.files


def live_mark(view: View | None) -> str:
    """Changes with every picture that there is to show."""
    if view is None:
        return "idle"
    if not view.active:
        return f"{view.stamp}"
    path = _preview(view)
    return f"{view.run_id}|{path.stat().st_mtime_ns}" if path is not None else f"{view.run_id}|{view.status}"


def live_picture(view: View | None) -> str:
    """The picture of a run in progress, or words about what will be there."""
    if view is None:
        return html.blank_stage(IDLE)
    path = _preview(view)
    if path is None:
        waits = view.status == "waiting"
        over = "There is no picture of this run."
        words = (
            "Waiting for its turn …"
            if waits
            else "The first picture comes in a moment …"
            if view.active
            else over
        )
        return html.blank_stage(words)
    try:
        image = Image.open(path)
        uri = jpeg_uri(image)
    except (OSError, SyntaxError, ValueError):
        return html.blank_stage("…")
    return html.picture(uri, 12 if columns(image) == 4 else 1, time.time(), view.prompt)


def _preview(view: View) -> Path | None:
    path = None if view.record is None else view.record.current / "preview.png"
    return path if path is not None and path.is_file() else None


def _lines(view: View | None) -> list[str]:
    if view is None:
        return []
    if view.job is not None:
        return list(view.job.log)
    record = view.record
    return (
        []
        if record is None
        else [f"warning: {w}" for w in record.warnings] + ([record.error] if record.error else [])
    )


def _cached(path: Path) -> str:
    """A copy of a file where gradio may serve it from: its own cache, by content."""
    return save_file_to_cache(path, get_upload_folder())


def _seen(text: str) -> dict[str, str]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
