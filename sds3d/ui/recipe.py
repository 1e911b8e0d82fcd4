"""What a user asks for: a shipped config and changed settings, as YAML, as a command line, and as checked jobs."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sds3d.config.dump import dump_plain, leaves, to_plain
from sds3d.config.load import config_names, file_layers, find_config, resolve
from sds3d.config.tree import Leaf, Table, parse, plain, suggest
from sds3d.errors import ConfigError, Sds3dError
from sds3d.job import JobConfig
from sds3d.priors.listing import prompt_warnings
from sds3d.staged import checked_jobs, load_stages
from sds3d.ui.roots import Root
from sds3d.ui.store import RunRecord
from sds3d.workers.task import Task, layers_of

MAX_PROMPT, MAX_YAML = 1000, 60_000  # characters
SOURCE = "settings"
# What the page asks of a run so that there is something to watch; no result depends on it.
WATCHED = {"preview.every_s": 0.7, "preview.size_px": 768, "preview.views": 12, "preview.turn_deg": 0.0}
WATCHED_SLOWLY = {
    "preview.every_s": 0.7,
    "preview.size_px": 160,
    "preview.views": 1,
    "preview.turn_deg": 20.0,
}
SLOW_SCENES = ("nerf",)  # where twelve views would take seconds on a CPU


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A config by name, and dotted settings on top of it (plain data), in the order in which they apply."""

    config: str = "default"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def with_all(self, settings: Mapping[str, Any]) -> "Recipe":
        """With these settings on top."""
        return replace(self, settings=ordered({**self.settings, **settings}))

    def jobs(self, root: Root) -> list[JobConfig]:
        """The jobs of all stages, as they would run; raises what is wrong with them, in words."""
        check_config_name(self.config)
        stages = load_stages(self.config, layers_of(self._placed(root), SOURCE))
        if len(stages[0].job.text()) > MAX_PROMPT:
            raise ConfigError(f"prompt: longer than {MAX_PROMPT} characters")
        for stage in stages:  # before anything looks at those places
            root.check(stage.job)
        return checked_jobs(stages)

    def task(self, root: Root, folder: Path) -> Task:
        """What a worker is to do, checked, with pictures often enough to watch."""
        job = self.jobs(root)[0]
        slow = job.scene.kind in SLOW_SCENES
        given = self._placed(root)
        watched = {k: v for k, v in (WATCHED_SLOWLY if slow else WATCHED).items() if k not in given}
        return Task(kind="generate", folder=str(folder), config=self.config, settings={**given, **watched})

    def _placed(self, root: Root) -> dict[str, Any]:
        return {key: root.placed(key, value) for key, value in self.settings.items()}

    def to_yaml(self) -> str:
        """A short YAML file that gives the same run: the config it extends, and what is changed."""
        tree: dict[str, Any] = {"extends": self.config}
        for key, value in self.settings.items():
            *parents, last = key.split(".")
            here = tree
            for name in parents:
                if not isinstance(here.get(name), dict):
                    here[name] = {} if name not in here else {"kind": here[name]}
                here = here[name]
            here[last] = value
        return dump_plain(tree)

    @classmethod
    def from_yaml(cls, text: str) -> "Recipe":
        """The recipe of such a file; raises ConfigError with the line of what is wrong."""
        if len(text) > MAX_YAML:
            raise ConfigError(f"YAML: longer than {MAX_YAML} characters")
        root = parse(text, "YAML")
        if isinstance(root, Leaf) and root.value is None:
            return cls()
        if not isinstance(root, Table):
            raise ConfigError("YAML: expected `key: value` lines")
        tree = dict(plain(root))
        tree.pop("schema", None)
        name = tree.pop("extends", "default")
        check_config_name(name)
        return cls(config=name, settings=ordered(dict(leaves(tree)) if tree else {}))

    @classmethod
    def of_run(cls, record: RunRecord) -> "Recipe":
        """What a run was started with: its config, and what its own config.yaml says otherwise."""
        config = record.config if record.config in config_names() else "default"
        if record.facts.get("stages"):  # its stages hold whole configs; what the manifest knows has to do
            settings: dict[str, Any] = {"prompt": record.prompt, "seed": record.seed}
            return cls(config=config, settings=settings)
        own = resolve(JobConfig, file_layers(record.folder / "config.yaml")).config
        base = load_stages(config)[0].job
        before = dict(leaves(to_plain(base)))
        changed = {k: v for k, v in leaves(to_plain(own)) if k not in before or before[k] != v}
        kinds = {key.removesuffix(".kind") for key in changed if key.endswith(".kind")}
        whole = {k: v for k, v in leaves(to_plain(own)) if any(k.startswith(f"{part}.") for part in kinds)}
        settings = {k: v for k, v in {**changed, **whole}.items() if not k.startswith("preview.")}
        return cls(config=config, settings=ordered(settings))

    def command(self) -> str:
        """The same run as a command for a shell."""
        prompt = str(self.settings.get("prompt", ""))
        words = ["sds3d", "generate", prompt]
        if self.config != "default":
            words += ["--config", self.config]
        options = {
            "seed": "--seed",
            "steps": "--steps",
            "prior.name": "--prior",
            "negative_prompt": "--negative",
        }
        for key, value in self.settings.items():
            if key in options:
                words += [options[key], str(value)]
            elif key != "prompt":
                words.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
        return shlex.join(words)


def ordered(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Kinds before the settings that belong to them, since a change of kind drops what was said before it."""
    first = [key for key in settings if key.endswith(".kind")]
    first.sort(key=lambda key: key.count("."))
    return {key: settings[key] for key in [*first, *(key for key in settings if key not in first)]}


def check_config_name(name: Any) -> None:
    """Refuse anything but the name of a shipped config: files are not for the page to open."""
    if not isinstance(name, str) or name not in config_names():
        known = config_names()
        raise ConfigError(
            f"unknown config {str(name)[:60]!r}.{suggest(str(name), known)} Known: {', '.join(known)}."
        )


def described_configs() -> list[tuple[str, str]]:
    """(name, first line of its file) of the shipped configs that stand for a run."""
    found = []
    for name in config_names():
        first = find_config(name).read_text(encoding="utf-8").partition("\n")[0]
        if name != "image":
            found.append((name, first.lstrip("# ").strip() if first.startswith("#") else ""))
    return found


def word_warnings(recipe: Recipe, root: Root) -> list[str]:
    """Warnings for prompt words that a prior with a closed vocabulary does not know; none for other priors."""
    try:
        job = recipe.jobs(root)[0]
    except Sds3dError:
        return []
    return prompt_warnings(job.prior, [job.text(), job.negative_prompt])
