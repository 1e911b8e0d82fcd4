"""The form: what to make and how. Everything on it becomes one `Recipe`."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from sds3d.errors import Sds3dError
from sds3d.ui import html, words
from sds3d.ui.desk import Desk
from sds3d.ui.drawer import Drawer
from sds3d.ui.recipe import MAX_PROMPT, Recipe, word_warnings
from sds3d.ui.style import COPY_JS

MAX_SEED = 2**31 - 1
# Settings with an input of their own; the drawer and the YAML may hold any other.
OWN = {"prompt": "prompt", "negative_prompt": "negative", "prior.name": "prior", "guidance.kind": "method"}


@dataclass
class Form:
    """The inputs of the form, in the order in which handlers take them."""

    prompt: gr.Textbox
    negative: gr.Textbox
    preset: gr.Dropdown
    method: gr.Dropdown
    prior: gr.Dropdown
    seed: gr.Number
    steps: gr.Number
    changes: gr.State

    def inputs(self) -> list[Any]:
        """For `inputs=` of an event whose handler ends in `*form`."""
        return [
            self.prompt,
            self.negative,
            self.preset,
            self.method,
            self.prior,
            self.seed,
            self.steps,
            self.changes,
        ]


def recipe_of(
    prompt: str,
    negative: str,
    preset: str,
    method: str,
    prior: str,
    seed: float | None,
    steps: float | None,
    changes: Mapping[str, Any],
) -> Recipe:
    """The recipe that the inputs of a `Form` describe; empty inputs leave it to the preset."""
    settings: dict[str, Any] = {"prompt": (prompt or "").strip()}
    if (negative or "").strip():
        settings["negative_prompt"] = negative.strip()
    if method:
        settings["guidance.kind"] = method
    if prior:
        settings["prior.name"] = prior
    if seed is not None:
        settings["seed"] = int(seed)
    if steps:
        settings["steps"] = int(steps)
    rest = {key: value for key, value in changes.items() if key not in settings}
    return Recipe(config=preset or "default", settings=settings).with_all(rest)


def form_of(recipe: Recipe) -> list[Any]:
    """The values of a form that describe a recipe."""
    settings = dict(recipe.settings)
    taken = {name: str(settings.pop(key, None) or "") for key, name in OWN.items()}
    seed, steps = settings.pop("seed", 0), settings.pop("steps", None)
    return [
        taken["prompt"],
        taken["negative"],
        recipe.config,
        taken["method"],
        taken["prior"],
        seed,
        steps,
        settings,
    ]


def build_form(desk: Desk) -> tuple[Form, gr.Button, gr.HTML]:
    """The form with its own events; returns it with the Create button and the place for messages."""
    prompt = gr.Textbox(
        label="What shall it be?",
        placeholder="a yellow duck",
        lines=2,
        max_length=MAX_PROMPT,
        autofocus=True,
        elem_id="prompt",
        submit_btn=False,
    )
    with gr.Row(elem_id="examples"):
        chips = [gr.Button(text, size="sm", variant="secondary") for text in words.EXAMPLES]
    hints = gr.HTML(elem_id="hints")
    quality = gr.Radio(list(words.QUALITIES), value="default", label="Quality", elem_id="quality")
    with gr.Row(equal_height=True):
        seed = gr.Number(
            value=0,
            precision=0,
            minimum=0,
            maximum=MAX_SEED,
            label="Seed: same seed, same result",
            min_width=120,
        )
        dice = gr.Button("⚄ New seed", elem_id="dice", min_width=130, scale=0)
    create = gr.Button("Create", variant="primary", size="lg", elem_id="create")
    message = gr.HTML(elem_id="message")
    with gr.Accordion("More options", open=False, elem_id="more"):
        negative = gr.Textbox(label="Steer away from", placeholder="e.g. blurry, dark", max_length=MAX_PROMPT)
        preset = gr.Dropdown(words.presets(), value="default", label="Preset", filterable=True)
        method = gr.Dropdown(
            words.methods(), value="", label="Method", info="How the diffusion model guides the shape"
        )
        prior = gr.Dropdown(
            words.priors(),
            value="",
            label="Prior",
            info="The 2D diffusion model that knows what things look like",
        )
        steps = gr.Number(
            value=None,
            precision=0,
            minimum=1,
            maximum=10_000_000,
            label="Steps",
            placeholder="as the preset says",
        )
    changes = gr.State({})
    form = Form(prompt, negative, preset, method, prior, seed, steps, changes)
    with gr.Accordion("Advanced settings", open=False, elem_id="advanced"):
        Drawer(desk, form.inputs(), changes, recipe_of)
    with gr.Accordion("As YAML or command", open=False, elem_id="text"):
        code = gr.Code(language="yaml", label="Config: edit and apply", lines=6, max_lines=24, elem_id="yaml")
        with gr.Row():
            apply = gr.Button("Apply YAML", size="sm")
            copy = gr.Button("Copy CLI command", size="sm", elem_id="copy-command")
        command = gr.Textbox(label="The same run from a shell", interactive=False, lines=2, elem_id="command")

    def told(*values: Any) -> tuple[str, str, str]:
        recipe = recipe_of(*values)
        hint = html.warnings_box(word_warnings(recipe, desk.root)) if recipe.settings["prompt"] else ""
        return hint, recipe.to_yaml(), recipe.command()

    def applied(text: str) -> list[Any]:
        try:
            recipe = Recipe.from_yaml(text or "")
            if recipe.settings.get("prompt"):
                recipe.jobs(desk.root)
        except Sds3dError as error:
            return [gr.skip()] * len(form.inputs()) + [html.notice(str(error))]
        return [*form_of(recipe), ""]

    def tuned(kind: str) -> Any:
        return words.preset_of(kind) or gr.skip()

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
    for chip, text in zip(chips, words.EXAMPLES, strict=True):
        chip.click(lambda text=text: text, None, prompt, **quiet)
    dice.click(lambda: secrets.randbelow(MAX_SEED), None, seed, **quiet)
    quality.input(lambda name: name, quality, preset, **quiet)
    preset.change(
        lambda name: name if name in [known for _, known in words.QUALITIES] else None,
        preset,
        quality,
        **quiet,
    )
    method.input(tuned, method, preset, **quiet)
    gr.on(
        [item.change for item in form.inputs()],
        told,
        form.inputs(),
        [hints, code, command],
        trigger_mode="always_last",
        **quiet,
    )
    apply.click(applied, code, [*form.inputs(), message], **quiet)
    copy.click(None, command, None, js=COPY_JS, api_visibility="private")
    return form, create, message
