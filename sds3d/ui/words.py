"""What the form offers: presets, methods, priors and example prompts, in words."""

from functools import lru_cache

from sds3d.config.load import config_names
from sds3d.guidance import RULES
from sds3d.priors.listing import rows
from sds3d.ui.recipe import described_configs

EXAMPLES = (
    "a yellow duck",
    "a red mug",
    "a blue chair with yellow legs",
    "a purple rocket",
    "a green cactus",
    "a white snowman",
    "a pink donut",
)
QUALITIES = (
    ("Quick · ½ min", "fast"),
    ("Standard · 1 min", "default"),
    ("Fine · 3 min", "quality"),
    ("Finest · mesh in stages", "toybox/quality"),
)


def presets() -> list[tuple[str, str]]:
    """(label, name) of the shipped configs: the name and what its file says first."""
    return [(f"{name} — {text}" if text else name, name) for name, text in described_configs()]


def methods() -> list[tuple[str, str]]:
    """(label, kind) of the guidance rules; the first choice leaves it to the preset."""
    found = [("as the preset says", "")]
    for kind, rule in sorted(RULES.items()):
        needs = f" — needs {', '.join(rule.info.needs)}" if rule.info.needs else ""
        found.append((f"{kind} — {rule.info.title}{needs}", kind))
    return found


def preset_of(method: str) -> str | None:
    """The toybox preset with tuned settings for a method, if there is one."""
    name = f"toybox/{method}"
    return name if name in config_names() else None


@lru_cache(maxsize=1)
def priors() -> list[tuple[str, str]]:
    """(label, name) of the known priors, those on this disk first; the first choice leaves it to the preset."""
    here: list[tuple[str, str]] = [("as the preset says", "")]
    elsewhere: list[tuple[str, str]] = []
    for row in rows():
        on_disk = row["cached"] == "yes"
        size = "" if on_disk else f" — {row['size_gb']:.3g} GB to download"
        (here if on_disk else elsewhere).append((f"{row['name']}{size}", str(row["name"])))
    return here + elsewhere
