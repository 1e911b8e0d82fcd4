"""Small pieces of HTML for the page. Everything that comes from people or files goes through `escape`."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote, urlencode

from sds3d.ui.desk import View
from sds3d.ui.jobs import Job
from sds3d.ui.store import RunRecord

WORDS = {
    "waiting": "waiting",
    "running": "running",
    "done": "finished",
    "interrupted": "stopped",
    "failed": "failed",
    "died": "crashed",
    "cancelled": "cancelled",
    "unfinished": "unfinished",
}
FORMAT_WORDS = {
    "glb": "GLB",
    "gltf": "glTF (zip)",
    "obj": "OBJ (zip)",
    "ply": "PLY mesh",
    "stl": "STL",
    "usdz": "USDZ",
    "splats_ply": "Gaussians PLY",
    "splats_splat": "Gaussians .splat",
    "splats_spz": "Gaussians SPZ",
    "splats_glb": "Gaussians GLB",
    "turntable": "Video",
    "contact_sheet": "Picture",
    "config": "Config YAML",
}
COMPARED = (
    "faces",
    "watertight",
    "components",
    "fidelity: psnr db",
    "seed",
    "config",
    "scene",
    "guidance",
    "time",
)
COLUMNS, ROWS, TURN_S = 4, 3, 6.0  # of the live picture, and the time of one turn


def file_url(run_id: str, name: str, version: object = "") -> str:
    """Where the server gives out a file of a run; see `web.RunFiles`."""
    return f"run-file/{quote(name, safe='')}?" + urlencode({"run": run_id, "v": version})


def run_link(run_id: str, inner: str, label: str = "") -> str:
    """A link that opens a run; `inner` is HTML already."""
    named = f' aria-label="{escape(label)}"' if label else ""
    place = escape(urlencode({"run": run_id}))
    return f'<a class="run-link" href="?{place}" data-run="{escape(run_id)}"{named}>{inner}</a>'


def pill(status: str) -> str:
    """A status as a coloured word."""
    return f'<span class="pill pill-{escape(status)}">{escape(WORDS.get(status, status))}</span>'


def notice(text: str, kind: str = "error") -> str:
    """A message to the user: "error", "warning" or "info"; nothing for an empty text."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="notice notice-{kind}" role="{role}">{escape(text)}</div>' if text else ""


def warnings_box(lines: Iterable[str]) -> str:
    """Several warnings in one box."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="notice notice-warning" role="status"><ul>{items}</ul></div>' if items else ""


def picture(uri: str, views: int, phase_s: float, label: str) -> str:
    """The live picture; twelve views go round by themselves, `phase_s` into the turn."""
    alt = escape(f"Live preview of {label}")
    if views == COLUMNS * ROWS:
        across, down = phase_s % (TURN_S / ROWS), phase_s % TURN_S
        style = f"background-image:url({uri});animation-delay:-{across:.2f}s,-{down:.2f}s"
        return f'<div class="stage"><div class="orbit" role="img" aria-label="{alt}" style="{style}"></div></div>'
    return f'<div class="stage"><img class="still" alt="{alt}" src="{uri}"></div>'


def blank_stage(text: str) -> str:
    """The stage with nothing to see yet."""
    return f'<div class="stage"><p class="hint">{escape(text)}</p></div>'


def progress(view: View) -> str:
    """Status, bar, step, time left and the curve of gradients."""
    job, record = view.job, view.record
    head = f'<div class="headline">{pill(view.status)} <strong>{escape(view.prompt)}</strong></div>'
    if view.status == "waiting":
        ahead = "next in line" if view.ahead == 0 else f"{view.ahead} job{'s' * (view.ahead > 1)} ahead"
        return f'<div class="progress">{head}<p>Waiting: {ahead}.</p></div>'
    error = (job.error if job is not None else None) or (record.error if record is not None else None)
    trouble = notice(error) if error else ""
    if job is None or job.status != "running":
        return f'<div class="progress">{head}<p>{escape(_summary(record))}</p>{trouble}</div>'
    done = job.step / job.steps if job.steps else 0.0
    left = f" · about {duration(job.left_s)} left" if job.left_s and job.step < job.steps else ""
    words = f"Step {job.step} of {job.steps}{left}" if job.steps else "Getting ready"
    words = words if job.task.kind != "export" else "Writing files"
    phase = "" if job.phase in ("", "optimising", "exporting") else f" · {job.phase}"
    bar = (
        f'<div class="bar" role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{100 * done:.0f}"><span style="width:{100 * done:.1f}%"></span></div>'
    )
    curve = sparkline([value for _, value in job.curve])
    return f'<div class="progress">{head}{bar}<p>{escape(words + phase)}</p>{curve}{trouble}</div>'


def _summary(record: RunRecord | None) -> str:
    if record is None:
        return ""
    steps = f"{record.steps_done} of {record.steps} steps" if record.steps else f"{record.steps_done} steps"
    return f"{steps} · {duration(record.seconds)} · seed {record.seed} · {record.config}"


def duration(seconds: float | None) -> str:
    """Seconds in words."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    return (
        f"{whole} s"
        if whole < 90
        else f"{whole // 60} min {whole % 60:02d} s"
        if whole < 5400
        else f"{whole / 3600:.1f} h"
    )


def sparkline(values: Sequence[float], width: int = 300, height: int = 48) -> str:
    """Gradient norms as a line on a logarithmic scale; nothing for fewer than two values."""
    known = [math.log10(value) for value in values if value > 0 and math.isfinite(value)]
    if len(known) < 2:
        return ""
    low, span = min(known), max(max(known) - min(known), 1e-6)
    points = " ".join(
        f"{width * i / (len(known) - 1):.1f},{height - 3 - (height - 6) * (v - low) / span:.1f}"
        for i, v in enumerate(known)
    )
    label = f"Gradient norm, {10 ** known[-1]:.3g} now"
    return (
        f'<figure class="curve"><svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}"><polyline points="{points}"/></svg><figcaption>{label}</figcaption></figure>'
    )


def log(lines: Iterable[str]) -> str:
    """What happened, line by line."""
    text = escape("\n".join(lines)) or "Nothing yet."
    return f'<pre class="log" tabindex="0" aria-label="Log">{text}</pre>'


def queue_list(jobs: Sequence[Job], current: str) -> str:
    """Running and waiting jobs with their positions; nothing while there is at most the one that is looked at."""
    if not jobs or (len(jobs) == 1 and jobs[0].run_id == current):
        return ""
    rows, waiting = [], 0
    for job in jobs:
        waiting += job.status == "waiting"
        where = f"{100 * job.step / job.steps:.0f} %" if job.status == "running" and job.steps else ""
        where = where or (f"no. {waiting}" if job.status == "waiting" else "starting")
        mine = ' class="mine"' if job.run_id == current else ""
        inner = f"<span>{escape(job.prompt or job.run_id)}</span><em>{escape(where)}</em>"
        rows.append(f"<li{mine}>{run_link(job.run_id, inner)}</li>")
    return f'<div class="queue"><h3>Queue</h3><ol>{"".join(rows)}</ol></div>'


def downloads(record: RunRecord) -> str:
    """A button for every file of a run, the GLB first."""
    version = record.facts.get("seconds", "")
    names = [name for name in FORMAT_WORDS if name in record.files]
    names += sorted(set(record.files) - set(names))
    links = [
        f'<a class="button{" first" * (name == "glb")}" download href="{escape(file_url(record.id, name, version))}">'
        f"{escape(FORMAT_WORDS.get(name, name))}</a>"
        for name in names
    ]
    if (record.current / "config.yaml").is_file():
        links.append(
            f'<a class="button" download href="{escape(file_url(record.id, "config"))}">Config YAML</a>'
        )
    return f'<nav class="downloads" aria-label="Downloads">{"".join(links)}</nav>' if links else ""


def video(record: RunRecord) -> str:
    """The turntable, or nothing."""
    if "turntable" not in record.files:
        return notice("This run has no turntable.", "info")
    url = escape(file_url(record.id, "turntable", record.facts.get("seconds", "")))
    return f'<div class="stage"><video src="{url}" controls loop autoplay muted playsinline></video></div>'


def statistics(record: RunRecord, only: Collection[str] = ()) -> str:
    """What the manifest says about the mesh, its fidelity and the run; `only` some of it, where given."""
    mesh, fidelity, facts = record.mesh, record.fidelity, {**record.facts}
    rows: list[tuple[str, object]] = [
        *((name.replace("_", " "), value) for name, value in mesh.items()),
        *((f"fidelity: {name.replace('_', ' ')}", value) for name, value in fidelity.items()),
        ("seed", record.seed),
        ("config", record.config),
        *(
            (name, facts[name])
            for name in ("scene", "guidance", "prior", "device", "verdict")
            if name in facts
        ),
        ("time", duration(record.seconds)),
        ("run folder", record.id),
    ]
    plain = [
        row for row in rows if isinstance(row[1], (str, int, float, bool)) and (not only or row[0] in only)
    ]
    return table(plain) + warnings_box(record.warnings)


def table(rows: Sequence[tuple[str, object]]) -> str:
    """Two columns."""
    cells = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(shown(v))}</td></tr>" for name, v in rows
    )
    return f'<table class="facts"><tbody>{cells}</tbody></table>'


def shown(value: Any) -> str:
    """A value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def gallery(records: Sequence[RunRecord], statuses: Mapping[str, str]) -> str:
    """Cards of runs; each opens its run."""
    if not records:
        return notice(
            "No runs here yet. What you create appears in this gallery, and what the command line made.",
            "info",
        )
    cards = []
    for record in records:
        url = escape(file_url(record.id, "thumbnail", record.facts.get("seconds", "")))
        status = statuses.get(record.id, record.status)
        day = escape(record.started[:16].replace("T", " "))
        inner = (
            f'<img loading="lazy" alt="" src="{url}"><strong>{escape(record.prompt[:80] or record.id)}</strong>'
            f"<small>{pill(status)}<br>{day}</small>"
        )
        cards.append(f"<li>{run_link(record.id, inner, f'Open {record.prompt[:80]}')}</li>")
    return f'<ul class="cards">{"".join(cards)}</ul>'


def comparison(left: RunRecord, right: RunRecord, differences: Sequence[tuple[str, object, object]]) -> str:
    """Two runs side by side: pictures, figures, and the settings in which they differ."""
    columns = []
    for record in (left, right):
        url = escape(file_url(record.id, "contact_sheet", record.facts.get("seconds", "")))
        sheet = (
            f'<img alt="{escape(record.prompt)} from nine sides" src="{url}">'
            if "contact_sheet" in record.files
            else ""
        )
        columns.append(
            f"<section><h3>{escape(record.prompt)}</h3>{sheet}{statistics(record, COMPARED)}</section>"
        )
    rows = "".join(
        f"<tr><th scope='row'>{escape(key)}</th><td>{escape(shown(a))}</td><td>{escape(shown(b))}</td></tr>"
        for key, a, b in differences
    )
    head = "<thead><tr><th>setting</th><th>left</th><th>right</th></tr></thead>"
    told = f'<table class="facts">{head}<tbody>{rows}</tbody></table>'
    same = "<p>All settings are the same.</p>"
    return f'<div class="compare">{"".join(columns)}</div><h3>Settings that differ</h3>{told if differences else same}'
