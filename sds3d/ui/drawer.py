"""The drawer of advanced settings: pick a part of the config, change its fields; help texts come from the config."""

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from sds3d.errors import Sds3dError
from sds3d.ui import html
from sds3d.ui.desk import Desk
from sds3d.ui.forms import Field, entered, sections
from sds3d.ui.recipe import Recipe

PARTS = (
    "guidance", "time", "noise", "scene", "camera", "shading", "penalties", "optimizer", "prompting", "prior",
    "export", "preview", "checkpoint", "memory", "general",
)  # fmt: skip
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


class Drawer:
    """Its changes are dotted settings in a state; a field shows what holds with all of them."""

    def __init__(
        self, desk: Desk, inputs: list[Any], changes: gr.State, recipe_of: Callable[..., Recipe]
    ) -> None:
        self.desk, self.changes, self.recipe_of = desk, changes, recipe_of
        part = gr.Dropdown(PARTS, value=None, label="Part of the config", elem_id="part", filterable=True)
        self.message = gr.HTML()
        gr.render([part, *inputs], triggers=[part.change, changes.change], show_progress="hidden")(self._show)
        self.changed = gr.HTML()
        reset = gr.Button("Take all changes back", size="sm", visible=False)
        changes.change(self._list, changes, [self.changed, reset], **QUIET)
        reset.click(lambda: ({}, ""), None, [changes, self.message], **QUIET)

    def _list(self, changes: Mapping[str, Any]) -> tuple[str, Any]:
        rows = list(changes.items())
        return (html.table(rows) if rows else ""), gr.update(visible=bool(rows))

    def _show(self, part: str | None, *values: Any) -> None:
        if not part:
            return
        try:
            job = self._recipe(*values).jobs(self.desk.root)[0]
        except Sds3dError as error:
            gr.HTML(html.notice(str(error)))
            return
        for entry in sections(job).get(part, []):
            self._input(entry, list(values))

    def _recipe(self, *values: Any) -> Recipe:
        recipe = self.recipe_of(*values)
        return recipe if recipe.settings.get("prompt") else recipe.with_all({"prompt": "a red mug"})

    def _input(self, entry: Field, values: list[Any]) -> None:
        shared: dict[str, Any] = {
            "label": entry.label,
            "info": entry.help or None,
            "key": entry.key,
            "interactive": True,
        }
        component: Any
        if entry.kind == "switch":
            component = gr.Checkbox(entry.value, **shared)
        elif entry.kind == "choice":
            component = gr.Dropdown(list(entry.choices), value=entry.value, **shared)
        elif entry.kind in ("integer", "number"):
            precision = 0 if entry.kind == "integer" else None
            component = gr.Number(entry.value, precision=precision, **shared)
        else:
            component = gr.Textbox(entry.value, **shared)

        def changed(value: Any, changes: Mapping[str, Any]) -> tuple[Any, str]:
            if value == entry.value:
                return gr.skip(), ""
            try:
                new = {**changes, entry.key: entered(entry, value)}
                self._recipe(*values[:-1], new).jobs(self.desk.root)
            except Sds3dError as error:
                return gr.skip(), html.notice(str(error))
            return new, ""

        listen = component.input if entry.kind in ("switch", "choice") else component.blur
        listen(changed, [component, self.changes], [self.changes, self.message], **QUIET)
        if entry.kind in ("integer", "number", "text", "yaml"):
            component.submit(changed, [component, self.changes], [self.changes, self.message], **QUIET)
