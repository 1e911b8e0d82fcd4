"""Endpoints for programs: the same desk as the page, through gradio's REST interface and `gradio_client`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from sds3d.errors import Sds3dError
from sds3d.ui.desk import Desk
from sds3d.ui.html import file_url
from sds3d.ui.recipe import Recipe

Record = dict[str, Any]


@contextmanager
def told() -> Iterator[None]:
    """Our errors become messages for the caller."""
    try:
        yield
    except Sds3dError as error:
        raise gr.Error(str(error), print_exception=False) from error


class Endpoints:
    """One method per endpoint; its docstring is what the API page says."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def submit(
        self,
        prompt: str,
        preset: str = "default",
        seed: int = 0,
        steps: int | None = None,
        settings: Record | None = None,
    ) -> str:
        """Queue a run and return its id; `settings` are dotted keys, e.g. {"guidance.cfg_scale": 7.5}."""
        chosen = {**(settings or {}), "prompt": prompt, "seed": seed} | ({"steps": steps} if steps else {})
        with told():
            return self.desk.submit(Recipe(config=preset, settings=chosen))

    def submit_yaml(self, text: str) -> str:
        """Queue a run that is described by a YAML config and return its id."""
        with told():
            return self.desk.submit(Recipe.from_yaml(text))

    def status(self, run: str) -> Record:
        """Status, position, step and time left of a run."""
        with told():
            return self.desk.status(run)

    def stop(self, run: str) -> bool:
        """End a run after its current step with a usable asset, or take it out of the queue; false if it is over."""
        with told():
            self.desk.view(run)
            return self.desk.stop(run)

    def resume(self, run: str) -> str:
        """Queue the rest of a run that ended early."""
        with told():
            return self.desk.resume(run)

    def export(
        self, run: str, formats: list[str], max_faces: int | None = None, texture_px: int | None = None
    ) -> str:
        """Queue another export of a run."""
        wanted = {"export.max_faces": max_faces, "export.texture_px": texture_px}
        given = {key: value for key, value in wanted.items() if value is not None}
        with told():
            return self.desk.export(run, formats, given)

    def result(self, run: str) -> Record:
        """Files (with addresses relative to this server), mesh figures and fidelity of a run."""
        with told():
            found = self.desk.result(run)
        return {**found, "urls": {name: file_url(run, name) for name in found["files"]}}

    def runs(self, search: str = "", limit: int = 50) -> list[Record]:
        """Runs below the root, the newest first."""
        return [
            {
                "run": record.id,
                "prompt": record.prompt,
                "status": self.desk.view(record.id).status,
                "started": record.started,
            }
            for record in self.desk.store.runs(search, max(1, min(limit, 500)))
        ]

    def delete(self, run: str) -> bool:
        """Remove a run from disk."""
        with told():
            self.desk.delete(run)
        return True

    def queue(self) -> list[Record]:
        """Running and waiting jobs in their order."""
        return [self.desk.status(job.run_id) for job in self.desk.queue.active()]

    def download(self, run: str, name: str) -> str:
        """One file of a run by its format, e.g. "glb"."""
        with told():
            return save_file_to_cache(self.desk.store.file(run, name), get_upload_folder())


def build_api(desk: Desk) -> None:
    """Name the endpoints; to be called inside Blocks."""
    ends = Endpoints(desk)
    plain = (ends.submit, ends.submit_yaml, ends.status, ends.stop, ends.resume, ends.export, ends.result)
    for endpoint in (*plain, ends.runs, ends.delete, ends.queue):
        gr.api(endpoint, api_name=endpoint.__name__, concurrency_limit=8)
    # The one endpoint that gives a file needs components, which nobody sees.
    run, kind = gr.Textbox(visible=False, label="run"), gr.Textbox(visible=False, label="name")
    file, button = gr.File(visible=False, label="file"), gr.Button(visible=False)
    button.click(ends.download, [run, kind], file, api_name="download", concurrency_limit=4)
