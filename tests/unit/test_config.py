"""The loader: every refusal names its place, every value keeps its origin, and dump is the inverse of resolve."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sds3d.config.docs import reference
from sds3d.config.dump import config_hash, dump, show, to_plain
from sds3d.config.load import file_layers, is_override, override_layers, resolve, setting
from sds3d.config.option import Chosen, kinds, option
from sds3d.config.ramp import Ramp
from sds3d.errors import ConfigError


class Ball:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of a ball."""

        radius: float = option(1.0, help="metres", ge=0.0, le=10.0)
        glow: Ramp = option(Ramp.constant(0.5), ge=0.0, le=1.0)


class Cube:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        side: float = 2.0  # edge length in metres
        sharp: bool = True


class Pair:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        left: Chosen = kinds(lambda: SHAPES, "cube")


SHAPES: dict[str, type] = {"ball": Ball, "cube": Cube, "pair": Pair}


@dataclass(frozen=True, kw_only=True)
class Light:
    power: float = option(1.0, ge=0.0)
    color: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Job:
    prompt: str | None = None
    steps: int = option(10, help="how long", ge=1)
    mode: Literal["fast", "slow", "on"] = "fast"
    names: tuple[str, ...] = ()
    cap: float | None = None
    ramp: Ramp = option(Ramp(start=0.9, end=0.1, over_frac=(0.0, 0.8), shape="sqrt"), ge=0.0, le=1.0)
    shape: Chosen = kinds(SHAPES, "ball", radius=3.0)
    light: Light = field(default_factory=lambda: Light(power=5.0))
    dry: bool = False


def write(folder: Path, text: str, name: str = "ship.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *overrides: str) -> Job:
    return resolve(Job, [*file_layers(write(folder, text)), *override_layers(overrides)]).config


def test_nothing_stated_gives_the_defaults() -> None:
    assert resolve(Job, []).config == Job()


def test_values_of_every_type(tmp_path: Path) -> None:
    job = load(
        tmp_path,
        "prompt: a mug\nsteps: 20\nmode: on\nnames: [a, no]\ncap: 1e-3\n"
        "ramp: {from: 0.5, to: 0.25, over_steps: [0, 100], shape: cosine}\n"
        "shape: {kind: cube, side: 4}\nlight: {color: [0, 0.5, 1]}\ndry: true\n",
    )
    assert job == Job(
        prompt="a mug",
        steps=20,
        mode="on",
        names=("a", "no"),
        cap=0.001,
        ramp=Ramp(start=0.5, end=0.25, over_steps=(0, 100), shape="cosine"),
        shape=Chosen("cube", Cube.Config(side=4.0)),
        light=Light(power=5.0, color=(0.0, 0.5, 1.0)),
        dry=True,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "ship.yaml:1: stepz: unknown field. Did you mean steps? Fields: prompt, steps"),
        ("\nsteps: three", "ship.yaml:2: steps: got 'three', expected an integer."),
        ("steps: 3.0", "steps: got 3.0, expected an integer."),
        ("steps: true", "steps: got true, expected an integer."),
        ('steps: "3"', "steps: got '3', expected an integer."),
        ("steps: 0", "steps: got 0, expected >= 1."),
        ("steps: 99999999999999999999", "expected an integer."),
        ("cap: .inf", "expected a number."),
        ("cap: 1e999", "expected a number."),
        ("dry: yes", "dry: got 'yes', expected true or false."),
        ("dry: 1", "dry: got 1, expected true or false."),
        ("mode: fats", "mode: got 'fats', expected one of fast, slow, on. Did you mean fast?"),
        ("light: 3", "light: got 3, expected `key: value` settings."),
        ("light: {color: [1, 2]}", "light.color: got a list of 2, expected a list of 3 values."),
        ("light: {color: [1, 2, x]}", "light.color[2]: got 'x', expected a number."),
        ("light:\n  power: -1", "ship.yaml:2: light.power: got -1.0, expected >= 0.0."),
        ("light:\n\n  powr: 1", "ship.yaml:3: light.powr: unknown field. Did you mean power?"),
        ("shape: {kind: bal}", "shape.kind: got 'bal', expected one of ball, cube, pair. Did you mean ball?"),
        ("shape: {side: 1}", "shape.side: unknown field of 'ball'. Fields: radius, glow."),
        ("shape: {radius: 11}", "shape.radius: got 11.0, expected 0.0 to 10.0."),
        ("shape: {glow: {from: 0, to: 2}}", "shape.glow.to: got 2.0, expected 0.0 to 1.0."),
        ("shape: [1]", "shape: got a list of 1, expected a kind"),
        ("ramp: {from: 0.1, too: 1}", "ramp.too: unknown field of 'ramp'. Did you mean to?"),
        ("ramp: {from: 0, to: 1, shape: log}", "a log ramp needs from > 0 and to > 0."),
        ("ramp: {over_frac: [0, 1], over_steps: [0, 1]}", "give over_frac or over_steps, not both."),
        ("ramp: {over_frac: [0.5, 0.2]}", "got an interval from 0.5 to 0.2"),
        ("shape: {kind: ball, glow: {over_frac: [0, 1]}}\nshape: 1", "written twice (first at"),
        ("names: {a: 1}", "names: got a mapping, expected a list of str."),
        ("schema: 2", "schema: got 2, this version of sds3d reads schema 1."),
        ("extends: [a, b]", "extends: expected exactly one config name or file."),
        ("extends: nowhere.yaml", "extends: no such file"),
        ("extends: no-such-name", "extends: unknown config 'no-such-name'."),
        ("- 1", "expected `key: value` lines at the top level."),
        ("a: [1", "ship.yaml:1: not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("prompt: !!python/object/apply:os.getcwd []", "tag"),
        ("prompt: !env HOME", "ship.yaml:1: the tag '!env' is not allowed"),
        ("light: &a {power: *a}", "an alias may not contain itself"),
        ("? [1, 2]\n: 3", "a key must be a plain word"),
    ],
)
def test_refusals_say_where_what_and_expected(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert "ship.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_aliases_cannot_explode(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match="too large or too deep"):
        load(tmp_path, "\n".join(lines))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"x: \x00"])
def test_files_that_are_not_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        file_layers(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read this config"):
            file_layers(path)


def test_empty_file_is_an_empty_layer(tmp_path: Path) -> None:
    assert load(tmp_path, "") == Job()
    assert load(tmp_path, "# only a comment\n") == Job()


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    job = load(tmp_path, "light: &l {power: 2, color: [1, 0, 0]}\n")
    assert job.light.power == 2.0
    merged = resolve(
        Light, file_layers(write(tmp_path, "<<: {power: 7, color: [0, 0, 0]}\ncolor: [1, 1, 0]\n"))
    ).config
    assert merged == Light(power=7.0, color=(1.0, 1.0, 0.0))


def test_extends_merges_key_by_key_and_keeps_origins(tmp_path: Path) -> None:
    write(tmp_path, "steps: 7\nlight: {power: 2}\nshape: {radius: 4}\n", "base.yaml")
    layers = file_layers(write(tmp_path, "extends: base.yaml\nlight:\n  color: [0, 0, 0]\n"))
    found = resolve(Job, [*layers, *override_layers(["shape.glow=0.25", "dry=true"])])
    assert found.config.steps == 7
    assert found.config.light == Light(power=2.0, color=(0.0, 0.0, 0.0))
    assert found.config.shape == Chosen("ball", Ball.Config(radius=4.0, glow=Ramp.constant(0.25)))
    assert found.origin("steps") == f"{tmp_path}/base.yaml:1"
    assert found.origin("light.color") == f"{tmp_path}/ship.yaml:3"
    assert found.origin("dry") == "command line"
    assert found.origin("mode") == "default"
    assert f"steps: 7  # {tmp_path}/base.yaml:1" in show(found)


def test_cycles_in_extends_are_found(tmp_path: Path) -> None:
    write(tmp_path, "extends: ship.yaml\n", "base.yaml")
    with pytest.raises(ConfigError, match="extends itself"):
        file_layers(write(tmp_path, "extends: base.yaml\n"))


def test_a_new_kind_drops_the_settings_of_the_old_one() -> None:
    layers = override_layers(["shape.radius=4", "shape.kind=cube", "shape.side=5"])
    assert resolve(Job, layers).config.shape == Chosen("cube", Cube.Config(side=5.0))
    assert resolve(Job, override_layers(["shape=cube"])).config.shape == Chosen("cube", Cube.Config())
    assert resolve(Job, override_layers(["shape.kind=ball"])).config.shape.config.radius == 3.0


def test_kinds_can_nest_in_their_own_table() -> None:
    job = resolve(
        Job, override_layers(["shape.kind=pair", "shape.left.kind=ball", "shape.left.radius=2"])
    ).config
    assert job.shape == Chosen("pair", Pair.Config(left=Chosen("ball", Ball.Config(radius=2.0))))


def test_ramps_merge_with_their_default() -> None:
    job = resolve(Job, override_layers(["ramp.to=0.2"])).config
    assert job.ramp == Ramp(start=0.9, end=0.2, over_frac=(0.0, 0.8), shape="sqrt")
    stepped = resolve(Job, override_layers(["ramp={over_steps: [0, 5]}"])).config.ramp
    assert (stepped.over_steps, stepped.over_frac) == ((0, 5), (0.0, 1.0))
    assert resolve(Job, override_layers(["ramp=0.3"])).config.ramp == Ramp.constant(0.3)


def test_null_resets_an_optional() -> None:
    assert resolve(Job, override_layers(["cap=3", "cap=null"])).config.cap is None
    assert resolve(Job, override_layers(["cap=3", "cap=null", "cap=4"])).config.cap == 4.0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps", "expected key=value"),
        ("steps=x", "command line: steps: got 'x', expected an integer."),
        ("light.powr=2", "command line: light.powr: unknown field. Did you mean power?"),
        ("light.power.x=2", "command line: light.power: got a mapping, expected a number."),
        ("names=[a", "command line: not valid YAML"),
    ],
)
def test_refused_overrides(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(Job, override_layers([word]))
    assert message in str(caught.value)


def test_what_counts_as_an_override() -> None:
    assert all(map(is_override, ["a.b_2=c d", "a="]))
    assert not any(map(is_override, ["a red mug", "x y=z", "=3"]))


def test_settings_from_options_are_never_parsed() -> None:
    job = resolve(
        Job, [setting("prompt", "null: {a}\n# b", "--prompt"), setting("steps", 4, "--steps")]
    ).config
    assert job.prompt == "null: {a}\n# b"
    assert job.steps == 4


def test_text_fields_take_plain_words_literally() -> None:
    assert resolve(Job, override_layers(["prompt=1984"])).config.prompt == "1984"
    assert resolve(Job, override_layers(["prompt=on"])).config.prompt == "on"
    assert resolve(Job, override_layers(["prompt=12:30:00"])).config.prompt == "12:30:00"


def test_post_init_checks_are_reported_with_their_place() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Even:
        n: int = 0

        def __post_init__(self) -> None:
            if self.n % 2:
                raise ValueError("n must be even")

    with pytest.raises(ConfigError, match="command line: n must be even"):
        resolve(Even, override_layers(["n=3"]))


def test_reference_lists_every_key() -> None:
    page = reference(Job)
    for key in (
        "steps",
        "ramp",
        "shape.kind",
        "shape.radius",
        "shape.side",
        "light.power",
        "shape.left.kind",
    ):
        assert f"| `{key}` |" in page
    assert "how long" in page
    assert "edge length in metres" in page


def test_hash_sees_settings_but_not_ignored_ones() -> None:
    assert config_hash(Job()) != config_hash(Job(steps=11))
    assert config_hash(Job(), ["steps"]) == config_hash(Job(steps=11), ["steps"])


unit_floats = st.floats(0.0, 1.0, allow_nan=False)
ramps = st.one_of(
    unit_floats.map(Ramp.constant),
    st.builds(
        lambda start, end, first, width, shape, steps: Ramp(
            start=start,
            end=end,
            shape=shape,
            **(
                {"over_steps": (first, first + width)}
                if steps
                else {"over_frac": (first / 7, (first + width) / 7)}
            ),
        ),
        unit_floats.filter(lambda x: x > 0),
        unit_floats.filter(lambda x: x > 0),
        st.integers(0, 10**6),
        st.integers(0, 10**6),
        st.sampled_from(["linear", "sqrt", "cosine", "log", "step"]),
        st.booleans(),
    ),
)
shapes = st.one_of(
    st.builds(lambda r, g: Chosen("ball", Ball.Config(radius=r, glow=g)), st.floats(0, 10), ramps),
    st.builds(
        lambda s, b: Chosen("cube", Cube.Config(side=s, sharp=b)),
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
    ),
)
jobs = st.builds(
    lambda shape, **given: replace(Job(), shape=shape, **given),
    shapes,
    prompt=st.none() | st.text(),
    steps=st.integers(1, 10**17),
    mode=st.sampled_from(["fast", "slow", "on"]),
    names=st.lists(st.text(), max_size=3).map(tuple),
    cap=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    ramp=ramps,
    dry=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(jobs)
def test_dump_is_the_inverse_of_resolve(job: Job) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.yaml"
        path.write_bytes(dump(job).encode("utf-8"))
        again = resolve(Job, file_layers(path)).config
    assert again == job
    assert to_plain(again) == to_plain(job)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    from sds3d.config.tree import parse

    said = "x.yaml"
    try:
        parse(text, "x.yaml")
    except ConfigError as error:
        said = str(error)
    assert said.startswith("x.yaml")


def test_a_setting_that_did_not_exist_yet_does_not_change_the_hash_of_a_run() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Inner:
        depth: int = 3

    @dataclass(frozen=True, kw_only=True)
    class Older:
        inner: Inner = field(default_factory=Inner)
        width: int = 5

    @dataclass(frozen=True, kw_only=True)
    class Newer:
        inner: Inner = field(default_factory=Inner)
        width: int = 5
        colour: str = "red"

    assert config_hash(Older(width=7)) == config_hash(Newer(width=7))
    assert config_hash(Newer(width=7)) != config_hash(Newer(width=7, colour="blue"))
    assert config_hash(Older(width=7)) != config_hash(Older(width=8))
    assert config_hash(Older(inner=Inner(depth=4))) != config_hash(Older())
