"""The page: a form on the left, the run on the right, past runs in a tab of their own."""

from typing import Any

import gradio as gr

from sds3d.errors import Sds3dError
from sds3d.ui import html
from sds3d.ui.api import build_api
from sds3d.ui.create import build_form, form_of, recipe_of
from sds3d.ui.desk import Desk
from sds3d.ui.gallery import build_gallery, settings_of
from sds3d.ui.looks import Looks
from sds3d.ui.stage import FREE, build_stage, find
from sds3d.ui.style import ADDRESS_JS

TITLE = "sds3d — text to 3D"


def build_page(desk: Desk) -> gr.Blocks:
    """The whole page with its events and endpoints."""
    looks = Looks()
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        gr.HTML("<h1>sds3d</h1><p>Words in, a textured 3D model out.</p>", elem_id="title")
        run = gr.Textbox(visible="hidden", elem_id="run-id")
        with gr.Tabs(selected="create") as tabs:
            with gr.Tab("Create", id="create"), gr.Row():
                with gr.Column(scale=5, min_width=300):
                    form, create, message = build_form(desk)
                    reuse = gr.Button(
                        "Fill the form from the run shown", size="sm", visible=False, elem_id="reuse"
                    )
                with gr.Column(scale=6, min_width=300, elem_id="stage"):
                    stage = build_stage(desk, looks, run, message)
            with gr.Tab("Gallery", id="gallery") as tab:
                cards = build_gallery(desk, tab)

        def start(*values: Any) -> tuple[Any, str]:
            try:
                return desk.submit(recipe_of(*values)), ""
            except Sds3dError as error:
                return gr.skip(), html.notice(str(error))

        def attach(request: gr.Request) -> tuple[Any, str, Any]:
            asked = request.query_params.get("run", "")
            if asked:
                view = find(desk, asked)
                if view is None:
                    return "", html.notice("This run is no longer here.", "info"), gr.skip()
                return asked, "", view.prompt
            active = desk.queue.active()
            return (active[0].run_id if active else ""), "", gr.skip()

        def opened(event: gr.EventData) -> tuple[str, Any]:
            return str(event.run), gr.update(selected="create")

        def refill(run_id: str) -> list[Any]:
            try:
                return [*form_of(settings_of(desk, run_id)), ""]
            except Sds3dError as error:
                return [gr.skip()] * len(form.inputs()) + [html.notice(str(error))]

        submitting: dict[str, Any] = {**FREE, "show_progress": "minimal"}
        gr.on([create.click, form.prompt.submit], start, form.inputs(), [run, message], **submitting)
        run.change(None, run, None, js=ADDRESS_JS, api_visibility="private")
        run.change(lambda run_id: gr.update(visible=bool(run_id)), run, reuse, **FREE)
        reuse.click(refill, run, [*form.inputs(), message], **FREE)
        for links in (cards, stage.links):
            links.select(opened, None, [run, tabs], **FREE)
        page.load(attach, None, [run, message, form.prompt], **FREE)
        build_api(desk)
    return page
