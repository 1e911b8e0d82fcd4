"""Several rules in one run: each term has its weight, its window of the run, and what of the render it sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sds3d.config.option import Chosen, kinds, option
from sds3d.config.ramp import Ramp
from sds3d.errors import ConfigError
from sds3d.guidance.table import RULES
from sds3d.interfaces import Buffer, Need, Prior, Rule
from sds3d.moment import Moment
from sds3d.rng import Stream

Sees = Literal["rgb", "normal", "albedo", "shaded", "normal_latent"]
_BUFFERS: Mapping[Sees, Buffer] = {"normal": "normal", "normal_latent": "normal", "albedo": "albedo"}


@dataclass(frozen=True, kw_only=True)
class TermConfig:
    """One rule of a mix."""

    rule: Chosen = kinds(RULES, "sds", help="the rule of this term")
    weight: Ramp = option(Ramp.constant(1.0), help="factor on this rule's gradient", ge=0.0)
    window: tuple[float, float] = option(
        (0.0, 1.0), help="part of the run in which it acts, from (inclusive) to (exclusive)", ge=0.0, le=1.0
    )
    sees: Sees = option(
        "rgb",
        help="what the prior is shown: rgb = as this step is lit, normal, albedo = without light, shaded = only steps "
        "with light, normal_latent = normals and mask as 4-channel latents (Fantasia3D)",
    )


class Mix:
    """Several rules at once or one after the other: grad = sum_i weight_i(step) grad_i."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of a mix."""

        terms: tuple[TermConfig, ...] = option(help="list of {rule, weight, window, sees}")

        def __post_init__(self) -> None:
            if not self.terms:
                raise ConfigError("a mix needs at least one term")


def guidance_table() -> Mapping[str, type]:
    """What a run's guidance may be: any rule, or a mix of rules."""
    return {**RULES, "mix": Mix}


@dataclass(frozen=True, kw_only=True)
class Term:
    """A rule at work."""

    rule: Rule
    weight: Ramp = Ramp.constant(1.0)
    window: tuple[float, float] = (0.0, 1.0)
    sees: Sees = "rgb"

    def acts(self, now: Moment) -> bool:
        """Whether the moment lies in the window."""
        return self.window[0] <= now.progress < self.window[1]


def term_configs(guidance: Chosen) -> tuple[TermConfig, ...]:
    """The terms of a run's guidance: those of a mix, else the one rule."""
    return guidance.config.terms if guidance.kind == "mix" else (TermConfig(rule=guidance),)


def build_terms(guidance: Chosen, prior: Prior, stream: Stream) -> tuple[Term, ...]:
    """Rules ready to be asked; `stream` seeds their own parameters."""
    return tuple(
        Term(
            rule=RULES[term.rule.kind](term.rule.config, prior, stream.fork(str(index))),
            weight=term.weight,
            window=term.window,
            sees=term.sees,
        )
        for index, term in enumerate(term_configs(guidance))
    )


def buffers(terms: Sequence[Term]) -> tuple[Buffer, ...]:
    """The pictures that renders must hold for these terms."""
    return tuple(sorted({_BUFFERS[term.sees] for term in terms if term.sees in _BUFFERS}))


def guidance_needs(guidance: Chosen) -> dict[Need, str]:
    """What the run must offer, with the kind of the rule that asks for it."""
    found: dict[Need, str] = {}
    for term in term_configs(guidance):
        for need in RULES[term.rule.kind].needs(term.rule.config):
            found.setdefault(need, term.rule.kind)
    return found


def extra_prompts(terms: tuple[Term, ...]) -> Mapping[str, str]:
    """The rules' own prompts by name; two rules may share a name only for the same text."""
    prompts: dict[str, str] = {}
    for term in terms:
        for name, text in term.rule.prompts().items():
            if prompts.setdefault(name, text) != text:
                raise ConfigError(
                    f"guidance: two rules give different texts for the prompt {name!r}: "
                    f"{prompts[name]!r} and {text!r}; use the same text in both"
                )
    return prompts
