"""What a batch file says, before anything is made of it: prompts.txt or jobs.yaml to entries with their places.

prompts.txt holds one prompt per line, # begins a comment. jobs.yaml is a list of prompts and of settings:

    config: fast
    sweep: {guidance.cfg_scale: [7.5, 30], seed: [0, 1]}
    jobs:
      - a red mug
      - {prompt: a yellow duck, name: duck, config: default, steps: 300}
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sds3d.config.load import is_override, nested
from sds3d.config.tree import Items, Leaf, Node, Origin, Table, fail, parse, read_text, suggest
from sds3d.errors import ConfigError

MAX_FILE_BYTES = 16_000_000
MAX_NODES = 500_000
MAX_PROMPT_CHARS = 4000
TOP_KEYS = ("jobs", "sweep", "config", "settings")
OWN_KEYS = ("prompt", "config", "name", "sweep")  # every other key of a job is a setting

Sweep = Mapping[str, tuple[Node, ...]]
_SWEEP_WORD = re.compile(r"([^=]+)=(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One job as it was written."""

    prompt: str
    origin: Origin
    name: str | None = None
    config: str | None = None
    config_origin: Origin | None = None
    layers: tuple[Table, ...] = ()
    sweep: Sweep = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BatchFile:
    """The entries of a batch file, and the faults that made others unreadable."""

    entries: tuple[Entry, ...]
    faults: tuple[str, ...] = ()


def read_batch(path: Path) -> BatchFile:
    """The entries of a .yaml, .yml or text file, in order.

    Raises:
        ConfigError: the file as a whole cannot be used; faults of single entries are listed in the result.
    """
    is_yaml = path.suffix.lower() in (".yaml", ".yml")
    text = read_text(path, "batch file", MAX_FILE_BYTES)
    found = _read_jobs(text, str(path)) if is_yaml else _read_prompts(text, str(path))
    entries: list[Entry] = []
    faults: list[str] = []
    for entry in found:
        if isinstance(entry, Entry):
            entries.append(entry)
        else:
            faults.append(str(entry))
    if not entries and not faults:
        hint = "a list of jobs, e.g. - prompt: a red mug" if is_yaml else "one prompt per line"
        raise ConfigError(f"{path}: holds no job; expected {hint}")
    return BatchFile(entries=tuple(entries), faults=tuple(faults))


def _read_prompts(text: str, source: str) -> Iterator[Entry | ConfigError]:
    for number, line in enumerate(text.split("\n"), start=1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            origin = Origin(source, number)
            try:
                yield Entry(prompt=_checked(prompt, origin), origin=origin)
            except ConfigError as error:
                yield error


def _read_jobs(text: str, source: str) -> Iterator[Entry | ConfigError]:
    root = parse(text, source, max_nodes=MAX_NODES)
    top = root if isinstance(root, Table) else Table({"jobs": root}, root.origin, {"jobs": root.origin})
    _refuse_unknown(top, TOP_KEYS)
    jobs = top.entries.get("jobs")
    if not isinstance(jobs, Items):
        fail(root.origin, "jobs", "expected a list of prompts or of settings with a prompt")
    config, config_origin = _text(top, "config")
    shared = _settings(top.entries["settings"]) if "settings" in top.entries else ()
    sweep = _sweep(top.entries.get("sweep"))
    for node in jobs.nodes:
        try:
            yield _entry(node, config, config_origin, shared, sweep)
        except ConfigError as error:
            yield error


def _entry(
    node: Node, config: str | None, config_origin: Origin | None, shared: tuple[Table, ...], sweep: Sweep
) -> Entry:
    if isinstance(node, Leaf):
        node = Table({"prompt": node}, node.origin, {"prompt": node.origin})
    if not isinstance(node, Table):
        fail(node.origin, "jobs", "got a list, expected a prompt, or settings with a prompt")
    prompt, _ = _text(node, "prompt")
    if prompt is None:
        fail(node.origin, "prompt", "required, but not given")
    own_config, own_origin = _text(node, "config")
    name, _ = _text(node, "name")
    settings = {key: value for key, value in node.entries.items() if key not in OWN_KEYS}
    return Entry(
        prompt=_checked(prompt, node.origin),
        origin=node.origin,
        name=name,
        config=own_config or config,
        config_origin=own_origin or config_origin,
        layers=(*shared, *_settings(Table(settings, node.origin, node.key_origins))),
        sweep={**sweep, **_sweep(node.entries.get("sweep"))},
    )


def _checked(prompt: str, origin: Origin) -> str:
    if not prompt.strip():
        fail(origin, "prompt", "empty; say what to make, e.g. a red mug")
    if len(prompt) > MAX_PROMPT_CHARS:
        fail(origin, "prompt", f"got {len(prompt)} characters, expected at most {MAX_PROMPT_CHARS}")
    if any((ord(char) < 32 and char not in "\t\n") or 0xD800 <= ord(char) < 0xE000 for char in prompt):
        fail(origin, "prompt", "holds control characters; remove them")
    return prompt


def _text(table: Table, key: str) -> tuple[str | None, Origin | None]:
    node = table.entries.get(key)
    if node is None:
        return None, None
    if not isinstance(node, Leaf) or node.value is None:
        fail(table.key_origins[key], key, "expected one line of text")
    return node.text, node.origin


def _settings(node: Node) -> tuple[Table, ...]:
    """One layer per setting; keys may be dotted."""
    if not isinstance(node, Table):
        fail(node.origin, "settings", "expected `key: value` settings")
    layers = []
    for key, value in node.entries.items():
        _check_key(key, node.key_origins[key])
        layers.append(nested(key, value))
    return tuple(layers)


def _sweep(node: Node | None) -> Sweep:
    if node is None:
        return {}
    if not isinstance(node, Table):
        fail(node.origin, "sweep", "expected `key: [values]`, e.g. seed: [0, 1, 2]")
    found: dict[str, tuple[Node, ...]] = {}
    for key, values in node.entries.items():
        _check_key(key, node.key_origins[key])
        if not isinstance(values, Items) or not values.nodes:
            fail(values.origin, f"sweep.{key}", "expected a list of values, e.g. [0, 1, 2]")
        found[key] = values.nodes
    return found


def sweep_of(words: Sequence[str]) -> Sweep:
    """The sweep of `--sweep key=a,b` words."""
    found: dict[str, tuple[Node, ...]] = {}
    for word in words:
        match = _SWEEP_WORD.fullmatch(word)
        if match is None or not match[2].strip():
            raise ConfigError(f"--sweep: got {word!r}, expected key=value,value, e.g. seed=0,1,2")
        key, text = match[1].strip(), match[2].strip()
        _check_key(key, Origin("--sweep"))
        node = parse(text if text.startswith("[") else f"[{text}]", "--sweep", lines=False)
        if not isinstance(node, Items) or not node.nodes:
            raise ConfigError(f"--sweep: got {word!r}, expected key=value,value, e.g. seed=0,1,2")
        found[key] = node.nodes
    return found


def _check_key(key: str, origin: Origin) -> None:
    if not is_override(f"{key}="):
        fail(origin, repr(key), "expected the name of a setting, e.g. guidance.cfg_scale")
    if key == "prompt":
        fail(origin, key, "prompts are jobs of their own")


def _refuse_unknown(table: Table, known: Sequence[str]) -> None:
    for key in table.entries:
        if key not in known:
            where = table.key_origins[key]
            fail(where, key, f"unknown here.{suggest(key, known)} Known: {', '.join(known)}")
