"""report.html: one page that needs no network and runs no script; everything that people wrote is escaped."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any
from urllib.parse import quote

MOVING = 60  # with more runs than this, turntables move on a click only

_STYLE = """
:root{color-scheme:light dark;--bg:#f6f6f4;--card:#fff;--ink:#1d1d1f;--dim:#6b6b70;--line:#e2e2de;--good:#1a7f37;
--bad:#b3261e;--accent:#8a5a00}
@media(prefers-color-scheme:dark){:root{--bg:#17181a;--card:#212326;--ink:#ececee;--dim:#9b9ba3;--line:#33363b;
--good:#57c07a;--bad:#ff7b72;--accent:#e5b35a}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main{max-width:1500px;margin:auto;padding:20px}header{padding-bottom:0}
h1{font-size:1.5rem;margin:0 0 6px}.facts{color:var(--dim);margin:0}.facts b{color:var(--ink)}
h2{font-size:1.05rem;margin:26px 0 10px;overflow-wrap:anywhere}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(250px,1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;overflow:hidden;display:flex;
flex-direction:column}.card.best{border-color:var(--accent);box-shadow:0 0 0 1px var(--accent)}
.view{aspect-ratio:1;background:#fff;display:flex;align-items:center;justify-content:center;color:#8a8a8f}
.view video,.view img{width:100%;height:100%;object-fit:contain;display:block}
.body{padding:12px 14px;display:flex;flex-direction:column;gap:7px;flex:1}
.prompt{font-weight:600;overflow-wrap:anywhere;margin:0}
.tags{display:flex;flex-wrap:wrap;gap:5px;margin:0;padding:0;list-style:none;font-size:.82rem}
.tags li{border:1px solid var(--line);border-radius:99px;padding:1px 8px;color:var(--dim);overflow-wrap:anywhere}
.tags .done{color:var(--good)}.tags .failed,.error{color:var(--bad)}.tags .mark{color:var(--accent);
border-color:var(--accent)}.error,.note{font-size:.84rem;margin:0;overflow-wrap:anywhere}.note{color:var(--dim)}
.row{display:flex;gap:10px;align-items:center;margin-top:auto}.row img{width:54px;height:54px;border-radius:6px;
background:#fff;border:1px solid var(--line)}.links{font-size:.86rem;display:flex;gap:4px 10px;flex-wrap:wrap}
a{color:inherit;text-decoration-color:var(--dim)}a:focus-visible{outline:2px solid var(--accent)}
"""
_POLICY = "default-src 'none'; img-src 'self' file:; media-src 'self' file:; style-src 'unsafe-inline'"


def page(summary: Mapping[str, Any]) -> str:
    """The whole page from what summary.json says."""
    rows = summary["rows"]
    still = len(rows) > MOVING
    facts = (
        f"<b>{summary['done']}</b> of {summary['jobs']} done, <b>{summary['failed']}</b> failed, "
        f"{summary['interrupted'] + summary['waiting']} to go &middot; engine {escape(summary['engine'])} &middot; "
        f"{summary['wall_s']:.0f} s in the last session"
    )
    sections = []
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    choices = [members for members in groups.values() if len(members) > 1]
    single = [members[0] for members in groups.values() if len(members) == 1]
    for members in choices:
        title = f"{escape(members[0]['prompt'])}{_settings(members[0])}: {len(members)} candidates"
        sections.append(f"<h2>{title}</h2>{_grid(members, still)}")
    if single:
        sections.append((f"<h2>{'Others' if choices else 'Runs'}</h2>") + _grid(single, still))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>sds3d batch</title>'
        f"<style>{_STYLE}</style></head><body><header><h1>sds3d batch</h1>"
        f'<p class="facts">{facts} &middot; <a href="summary.csv">summary.csv</a> &middot; '
        f'<a href="summary.json">summary.json</a></p></header><main>{"".join(sections)}</main></body></html>\n'
    )


def _settings(row: Mapping[str, Any]) -> str:
    text = ", ".join(f"{key} = {_short(value)}" for key, value in row["varied"].items())
    return f" ({escape(text)})" if text else ""


def _grid(rows: list[Mapping[str, Any]], still: bool) -> str:
    return f'<div class="grid">{"".join(_card(row, len(rows), still) for row in rows)}</div>'


def _card(row: Mapping[str, Any], candidates: int, still: bool) -> str:
    best = row["best"] and row["score"] is not None
    tags = [
        f'<li class="{escape(row["status"])}">{escape(row["status"])}</li>',
        f"<li>seed {row['seed']}</li>",
    ]
    if best:
        tags.insert(0, '<li class="mark">best</li>')
    if row["score"] is not None:
        tags.append(f"<li>score {row['score']:.3f}</li>")
    tags += [
        f"<li>{escape(f'{key} {_short(value)}')}</li>"
        for key, value in row["varied"].items()
        if key != "seed"
    ]
    if row["attempts"] > 1:
        tags.append(f"<li>{row['attempts']} attempts</li>")
    tags.append(f"<li>{row['seconds']:.0f} s</li>")
    notes = "".join(
        f'<p class="note">{escape(str(text))}</p>' for text in (row["verdict"], *row["warnings"][:2]) if text
    )
    error = f'<p class="error">{escape(row["error"])}</p>' if row["error"] else ""
    kind = "card best" if best else "card"
    return (
        f'<article class="{kind}"><div class="view">{_view(row, still)}</div><div class="body">'
        f'<p class="prompt">{escape(row["prompt"])}</p><ul class="tags">{"".join(tags)}</ul>{error}{notes}'
        f'<div class="row">{_thumbnail(row)}<div class="links">{_links(row)}</div></div></div></article>'
    )


def _view(row: Mapping[str, Any], still: bool) -> str:
    poster = _url(row, "preview.png") if "preview.png" in row["shown"] else ""
    label = escape(f"turntable of {row['prompt']}", quote=True)
    if "turntable.mp4" in row["shown"]:
        play = 'controls preload="none"' if still else 'autoplay preload="metadata"'
        image = f' poster="{poster}"' if poster and still else ""
        source = _url(row, "turntable.mp4")
        return f'<video src="{source}"{image} {play} loop muted playsinline aria-label="{label}"></video>'
    for name in ("preview.png", "contact_sheet.png"):
        if name in row["shown"]:
            return f'<img src="{_url(row, name)}" loading="lazy" alt="{label}">'
    return "no picture yet"


def _thumbnail(row: Mapping[str, Any]) -> str:
    if "contact_sheet.png" not in row["shown"]:
        return ""
    url, label = _url(row, "contact_sheet.png"), escape(f"{row['prompt']} from nine sides", quote=True)
    return f'<a href="{url}"><img src="{url}" loading="lazy" alt="{label}"></a>'


def _links(row: Mapping[str, Any]) -> str:
    names = {"asset.glb": "glb", "config.yaml": "config", "manifest.json": "manifest"}
    shown = [(name, title) for name, title in names.items() if name in row["shown"]]
    return "".join(f'<a href="{_url(row, name)}">{title}</a>' for name, title in shown)


def _url(row: Mapping[str, Any], name: str) -> str:
    return quote(f"{row['folder']}/{name}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
