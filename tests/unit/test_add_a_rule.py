"""The walk-through docs/add_a_rule.md, done exactly as it says."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from sds3d.cameras.light import ShadingConfig, ShadingLaw
from sds3d.cameras.sample import CameraConfig, CameraLaw
from sds3d.config.load import override_layers
from sds3d.config.ramp import Ramp
from sds3d.guidance import SDS
from sds3d.guidance.noise import FreshNoise
from sds3d.guidance.table import RULES
from sds3d.guidance.terms import build_terms
from sds3d.guidance.time import UniformTime
from sds3d.guide import Guide
from sds3d.job import load_job
from sds3d.optim import Optimizer, OptimizerConfig
from sds3d.optimize import Loop, Parts, PenaltyConfig
from sds3d.priors.analytic import AnalyticPrior, Mixture
from sds3d.priors.text import PromptingConfig, TextBank
from sds3d.rng import Stream, Streams
from tests.toys import CanvasScene, draw_at, told

DOC = Path(__file__).parents[2] / "docs" / "add_a_rule.md"


@pytest.fixture
def midpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The printed file, imported and put into the table under the printed name."""
    text = DOC.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) < 60
    file = tmp_path / "midpoint.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("midpoint", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "midpoint", module)
    spec.loader.exec_module(module)
    name, rule = re.search(r'^    "(\w+)": (\w+),$', text, re.MULTILINE).groups()
    monkeypatch.setitem(RULES, name, getattr(module, rule))
    return name


def prior_of(target: torch.Tensor) -> AnalyticPrior:
    return AnalyticPrior({"y": Mixture.gaussian(target, 0.02), "": Mixture.gaussian(1 - target, 0.02)})


def test_the_printed_rule_runs_from_a_config(midpoint: str) -> None:
    target = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1))
    prior = prior_of(target)
    job = load_job(
        "default", override_layers(["prompt=y", f"guidance={midpoint}", "guidance.share=1.0"])
    ).config
    guide = Guide(
        prior=prior,
        terms=build_terms(job.guidance, prior, Stream(0, "rules")),
        bank=TextBank(prior, "y", "", PromptingConfig(view_dependent=False)),
        time=UniformTime(UniformTime.Config()),
        noise=FreshNoise(FreshNoise.Config()),
        streams=Streams(0),
        hold=2,
    )
    scene = CanvasScene()
    parts = Parts(
        scene=scene,
        guide=guide,
        camera=CameraLaw(CameraConfig(batch=2, render_px=Ramp.constant(8.0), hold_steps=2)),
        shading=ShadingLaw(ShadingConfig()),
        optimizer=Optimizer(scene.groups(), OptimizerConfig(lr_factor=Ramp(start=1.0, end=0.02))),
        penalties=PenaltyConfig(),
        streams=Streams(0),
    )
    Loop(parts, 300).run(300, lambda event: None)
    assert (scene.image.detach() - target).abs().max() < 0.1
    assert prior.calls == 2 * 150


def test_the_printed_identity_holds(midpoint: str) -> None:
    prior = prior_of(torch.rand(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    text, null = prior.encode_text(["y", ""])
    x, noise = torch.rand(2, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    draw, cond = draw_at([0.3, 0.8], noise, prior.schedule), told(text, null, 2)
    rule = RULES[midpoint](RULES[midpoint].Config(share=Ramp.constant(1.0)), prior)
    sds = SDS(SDS.Config(cfg_scale=1.0, weight="recon"), prior)
    torch.testing.assert_close(rule.residual(x, draw, cond).grad, sds.residual(x, draw, cond).grad)
