"""Past runs: searched, opened, compared, deleted."""

from typing import Any

import gradio as gr

from sds3d.config.dump import leaves
from sds3d.errors import InputError, Sds3dError
from sds3d.ui import html
from sds3d.ui.desk import Desk
from sds3d.ui.recipe import Recipe
from sds3d.ui.stage import QUIET, said
from sds3d.ui.style import OPEN_RUN_JS

SHOWN = 120  # cards


def build_gallery(desk: Desk, tab: gr.Tab) -> gr.HTML:
    """The contents of the tab; returns the cards, whose links open runs."""
    with gr.Row(equal_height=True):
        search = gr.Textbox(
            label="Search",
            lines=1,
            max_lines=1,
            placeholder="words of the prompt, the method, the status …",
            elem_id="search",
        )
        fresh = gr.Button("Refresh", scale=0, min_width=110)
    cards = gr.HTML(js_on_load=OPEN_RUN_JS, elem_id="cards")
    with gr.Accordion("Compare two runs", open=False, elem_id="compare"):
        with gr.Row():
            left = gr.Dropdown([], label="Left", filterable=True)
            right = gr.Dropdown([], label="Right", filterable=True)
        side_by_side = gr.HTML()
    with gr.Accordion("Delete a run", open=False, elem_id="delete"):
        doomed = gr.Dropdown([], label="Run", filterable=True)
        ask = gr.Button("Delete …", size="sm")
        with gr.Row(visible=False) as sure:
            yes = gr.Button("Yes, delete it for good", variant="stop", size="sm", elem_id="delete-yes")
            no = gr.Button("Keep it", size="sm")
        answer = gr.HTML()

    def fill(words: str) -> list[Any]:
        records = desk.store.runs(words or "", SHOWN)
        statuses = {record.id: desk.view(record.id).status for record in records}
        choices = [
            (f"{record.prompt[:60]} · {record.started[:16].replace('T', ' ')} · {record.id}", record.id)
            for record in records
        ]
        menus = [gr.update(choices=choices, value=None) for _ in range(3)]
        return [html.gallery(records, statuses), *menus]

    def compare(a: str | None, b: str | None) -> str:
        if not a or not b:
            return ""
        try:
            first, second = desk.store.record(a), desk.store.record(b)
            return html.comparison(first, second, differences(Recipe.of_run(first), Recipe.of_run(second)))
        except Sds3dError as error:
            return html.notice(str(error))

    def forget(run_id: str | None, words: str) -> list[Any]:
        problem = said(lambda: desk.delete(run_id or ""))
        return [problem or html.notice("Deleted.", "info"), gr.update(visible=False), *fill(words)]

    lists = [cards, left, right, doomed]
    gr.on(
        [tab.select, fresh.click, search.submit, search.change],
        fill,
        search,
        lists,
        trigger_mode="always_last",
        concurrency_limit=2,
        **QUIET,
    )
    gr.on([left.input, right.input], compare, [left, right], side_by_side, **QUIET)
    ask.click(lambda run_id: gr.update(visible=bool(run_id)), doomed, sure, **QUIET)
    no.click(lambda: gr.update(visible=False), None, sure, **QUIET)
    yes.click(forget, [doomed, search], [answer, sure, *lists], **QUIET)
    return cards


def differences(left: Recipe, right: Recipe) -> list[tuple[str, object, object]]:
    """Settings in which two recipes differ."""
    a, b = ({"config": r.config, **dict(leaves(dict(r.settings)))} for r in (left, right))
    return [(key, a.get(key, "–"), b.get(key, "–")) for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def settings_of(desk: Desk, run_id: str) -> Recipe:
    """What a run was started with; raises InputError where its config cannot be read."""
    record = desk.store.record(run_id)
    try:
        return Recipe.of_run(record)
    except OSError as error:
        raise InputError(f"{run_id}: its config.yaml cannot be read") from error
