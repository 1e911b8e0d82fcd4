"""The interface with a login and a worker that does nothing, as a process: python ui_server.py ROOT.

Prints its address and routes as JSON, keeps what its worker was given in ROOT/../tasks.jsonl, and ends with its stdin.
"""

import json
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sds3d.ui.serve import ServeConfig, Server
from sds3d.workers.task import Outcome, Task


class IdleWorker:
    """Takes a task, writes it down, and waits to be stopped."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def run(
        self, task: Task, on_event: Callable[[Mapping[str, Any]], None], stop: threading.Event | None = None
    ) -> Outcome:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(task.to_json() + "\n")
        assert stop is not None
        stop.wait()
        return Outcome(status="interrupted", folder=task.folder)

    def close(self) -> None:
        return


def paths(routes: list[Any]) -> list[str]:
    """Paths of all routes; gradio's own are in a router that it includes below /gradio_api, prefix included."""
    found = [getattr(route, "path", "") for route in routes]
    inner = [getattr(route, "original_router", None) for route in routes]
    return [path for path in found if path] + [p for router in inner if router for p in paths(router.routes)]


if __name__ == "__main__":
    root = Path(sys.argv[1])
    config = ServeConfig(port=0, root=root, auth=(("ann", "pass word"),), max_queue=2)
    server = Server(config, lambda: IdleWorker(root.parent / "tasks.jsonl"))
    sys.stdout.write(json.dumps({"url": server.url, "routes": paths(server.page.app.routes)}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.close()
