"""Many people at one server: `python -m benchmarks.ui_load [--sessions 20] [--minutes 5] [--json FILE]`.

Every session is a client of its own that queues a small run, watches it like the page does, takes the result, and comes
back. Prints what was finished by whom, how long requests took, errors, and the server's memory at the start and end.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradio_client import Client

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "brown", "white", "gray")
KINDS = ("mug", "duck")
SMALL = {"preview.turntable_frames": 0, "export.cells_per_side": 32, "export.compare_views": 1}


@dataclass
class Session:
    """What one client lived through."""

    name: str
    orders: list[tuple[float, str]] = field(default_factory=list)  # when queued, id
    done: list[tuple[float, str]] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)  # of single requests
    errors: list[str] = field(default_factory=list)


def live(session: Session, url: str, until: float) -> None:
    """Queue, watch and fetch until the time is over; the last run is waited for."""
    client = Client(url, verbose=False)

    def ask(endpoint: str, *arguments: Any) -> Any:
        began = time.monotonic()
        answer = client.predict(*arguments, api_name=endpoint)
        session.waits_s.append(time.monotonic() - began)
        return answer

    seed = 0
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(url, timeout=30) as page:
                page.read()
            run = ask("/submit", session.name, "fast", seed, 8, SMALL)
            session.orders.append((time.monotonic(), run))
            while (state := ask("/status", run))["status"] in ("waiting", "running"):
                time.sleep(1.0)
            if state["status"] != "done":
                session.errors.append(f"{run}: {state['status']}: {state.get('error')}")
            ask("/result", run)
            session.done.append((time.monotonic(), run))
        except Exception as error:  # noqa: BLE001 (a benchmark counts what goes wrong)
            session.errors.append(f"{type(error).__name__}: {error}")
            time.sleep(1.0)
        seed += 1


def memory_mb(pid: int) -> float:
    """Resident memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    return int(found[1]) / 1024 if found else 0.0


def start(root: Path, sessions: int) -> tuple["subprocess.Popen[str]", str]:
    """The server and its address."""
    command = [sys.executable, "-m", "sds3d", "ui", "--port", "0", "--allowed-root", str(root)]
    command += ["--max-queue", str(sessions), "--workers", "1"]
    server = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            threading.Thread(target=server.stdout.read, daemon=True).start()
            return server, found[0] + "/"
    raise SystemExit("the server did not start")


def fairness(sessions: list[Session]) -> int:
    """How many runs were finished before one that was queued earlier."""
    order = {run: when for s in sessions for when, run in s.orders}
    ended = [run for _, run in sorted(pair for s in sessions for pair in s.done)]
    overtaken = 0
    for index, run in enumerate(ended):
        # One place is lost to the second between two looks at the status.
        overtaken += any(order[later] < order[run] - 2.0 for later in ended[index + 2 :])
    return overtaken


def main() -> None:
    """Run the load and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        server, url = start(Path(name), given.sessions)
        try:
            names = [f"a {COLORS[i % 10]} {KINDS[i // 10 % 2]}" for i in range(given.sessions)]
            sessions = [Session(name) for name in names]
            until = time.monotonic() + 60 * given.minutes
            threads = [threading.Thread(target=live, args=(s, url, until)) for s in sessions]
            for thread in threads:
                thread.start()
            memory = []
            while any(thread.is_alive() for thread in threads):
                memory.append(memory_mb(server.pid))
                time.sleep(5.0)
        finally:
            server.terminate()
            server.wait(60)
    waits = sorted(w for s in sessions for w in s.waits_s)
    tenth = max(1, len(memory) // 10)
    facts = {
        "sessions": given.sessions,
        "minutes": given.minutes,
        "runs_done": sum(len(s.done) for s in sessions),
        "runs_per_session": [min(len(s.done) for s in sessions), max(len(s.done) for s in sessions)],
        "overtaken": fairness(sessions),
        "errors": [error for s in sessions for error in s.errors],
        "requests": len(waits),
        "request_median_s": round(statistics.median(waits), 3),
        "request_p99_s": round(waits[int(0.99 * (len(waits) - 1))], 3),
        "memory_after_first_tenth_mb": round(memory[tenth], 1),
        "memory_at_end_mb": round(statistics.median(memory[-tenth:]), 1),
    }
    text = json.dumps(facts, indent=2)
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
