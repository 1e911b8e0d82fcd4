"""Start the server: queue, page, routes, and the order in which they end."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sds3d.errors import ConfigError, InputError
from sds3d.ops.threads import thread_count
from sds3d.ui.desk import Desk
from sds3d.ui.jobs import JobQueue, Worker
from sds3d.ui.roots import Root
from sds3d.workers.process import WorkerProcess

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where and for whom the page is served."""

    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    auth: tuple[tuple[str, str], ...] = ()
    root: Path = Path("outputs")
    max_queue: int = 20
    workers: int = 1

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that cannot work."""
        for name, low, high in (("port", 0, 65535), ("max_queue", 1, 10_000), ("workers", 1, 64)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name}: got {value}, expected {low} to {high}")

    @property
    def open_to_others(self) -> bool:
        """Whether more than this machine can reach the page."""
        return self.share or self.host not in LOOPBACK


def login(text: str) -> tuple[str, str]:
    """(user, password) of `user:password`; raises ConfigError for anything else."""
    user, colon, password = text.partition(":")
    if not (user.strip() and colon and password):
        raise ConfigError("--auth: expected user:password, both not empty")
    return user, password


class Server:
    """A running page. `url` is where it is."""

    def __init__(self, config: ServeConfig, make_worker: Callable[[], Worker] | None = None) -> None:
        """Starts at once; raises InputError where the port is taken."""
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
        from starlette.middleware import Middleware
        from starlette.routing import Route

        from sds3d.ui.page import build_page
        from sds3d.ui.style import CSS, theme
        from sds3d.ui.web import MAX_BODY, Guard, RunFiles

        queue = JobQueue(
            make_worker or worker_factory(config.workers),
            workers=config.workers,
            max_waiting=config.max_queue,
        )
        self.desk = Desk(Root(config.root), queue)
        self.page = build_page(self.desk)
        files = RunFiles(self.desk.store)
        self.page.queue(max_size=200, default_concurrency_limit=4)
        try:
            _, self.url, self.share_url = self.page.launch(
                server_name=config.host,
                server_port=config.port or None,
                share=config.share,
                auth=list(config.auth) or None,
                theme=theme(),
                css=CSS,
                max_file_size=MAX_BODY,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                show_error=True,
                quiet=True,
                inbrowser=False,
                prevent_thread_lock=True,
                app_kwargs={
                    "middleware": [Middleware(Guard, locked=bool(config.auth))],
                    "routes": [Route("/run-file/{name}", files.respond)],
                },
            )
        except OSError as error:
            self.desk.close()
            raise InputError(f"port {config.port} cannot be used: {error}; choose another --port") from error
        self._over = threading.Event()

    def serve(self) -> None:
        """Until Ctrl-C or SIGTERM; then what runs is saved."""

        def end(number: int, frame: object) -> None:
            self._over.set()

        before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while not self._over.wait(0.5):  # a plain wait would not let the signal in on every system
                pass
            self.close()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def close(self) -> None:
        """Save what runs, then end."""
        self.desk.close()
        self.page.close(verbose=False)


def worker_factory(workers: int) -> Callable[[], WorkerProcess]:
    """Worker processes that share the cores among them; they start at once, not with the first job."""
    env = {} if os.environ.get("SDS3D_THREADS") else {"SDS3D_THREADS": str(max(1, thread_count() // workers))}

    def make() -> WorkerProcess:
        worker = WorkerProcess(env=env)
        worker.start()
        return worker

    return make


def notes(config: ServeConfig) -> Sequence[str]:
    """What the person who starts the server should know."""
    if config.open_to_others and not config.auth:
        return ["warning: others can reach this page and nobody has to log in; add --auth user:password"]
    return []
