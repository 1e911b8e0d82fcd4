"""A variance-preserving prior seen as a flow, and one exact prior under four parametrisations."""

import pytest
import torch

from sds3d import priors
from sds3d.config.ramp import Ramp
from sds3d.errors import PriorError
from sds3d.guidance.cds import CDS
from sds3d.guidance.ism import ISM
from sds3d.guidance.rfds import RFDS
from sds3d.guidance.sdi import SDI
from sds3d.guidance.sds import SDS
from sds3d.guidance.trajectory import follow, guided_eps
from sds3d.guidance.tsm import TSM
from sds3d.interfaces import Condition, Prior, Teacher
from sds3d.mathx.predict import (
    eps_from_flow,
    eps_from_v,
    eps_from_x0,
    flow_from_eps,
    v_from_eps,
    x0_from_eps,
)
from sds3d.mathx.schedule import CosineSchedule, FlowSchedule, TableSchedule
from sds3d.priors import PriorConfig, load_prior
from sds3d.priors.analytic import AnalyticPrior, Mixture
from sds3d.priors.flow_view import FlowView
from sds3d.rng import Stream
from tests.toys import draw_at, told

SHAPE = (3, 4, 4)
TABLE = TableSchedule(torch.cos(torch.linspace(0.01, 1.5, 1000, dtype=torch.float64)) ** 2)
COSINE = CosineSchedule()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


MIXTURES = {
    "y": Mixture(means=randn(2, *SHAPE, seed=1), variances=times(0.2, 0.4), weights=times(1.0, 1.0)),
    "": Mixture.gaussian(randn(*SHAPE, seed=2), 0.5),
}
X, NOISE = randn(2, *SHAPE, seed=4), randn(2, *SHAPE, seed=5)


def vp(schedule) -> AnalyticPrior:
    return AnalyticPrior(MIXTURES, schedule)


def condition(prior) -> Condition:
    return told(*prior.encode_text(["y", ""]), 2)


class Network:
    """A network that answers in its own parametrisation, and the conversion that a loader does."""

    def __init__(self, exact: AnalyticPrior, output: str) -> None:
        self.exact, self.output, self.schedule = exact, output, exact.schedule
        self.device, self.shape, self.image_px = exact.device, exact.shape, exact.image_px
        self.encode_text, self.warnings = exact.encode_text, exact.warnings
        self.encode, self.decode = exact.encode, exact.decode

    def eps(self, x_t, t, *told):
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        there = {"v": v_from_eps, "x0": x0_from_eps}[self.output]
        back = {"v": eps_from_v, "x0": eps_from_x0}[self.output]
        return tuple(back(x_t, there(x_t, eps, a, s), a, s) for eps in self.exact.eps(x_t, t, *told))


class FlowNetwork(Network):
    """Answers with u = noise - x."""

    def eps(self, x_t, t, *told):
        column = self.schedule.sigma(t)
        found = (flow_from_eps(x_t, eps, column) for eps in self.exact.eps(x_t, t, *told))
        return tuple(eps_from_flow(x_t, u, column) for u in found)


@pytest.mark.parametrize("schedule", [COSINE, TABLE])
def test_view_is_a_prior_and_delegates(schedule) -> None:
    inner = vp(schedule)
    view = FlowView(inner)
    assert isinstance(view, Prior)
    assert (view.device, view.shape, view.image_px) == (inner.device, inner.shape, inner.image_px)
    assert torch.equal(view.encode_text(["y", ""]), inner.encode_text(["y", ""]))
    assert view.warnings(["y"]) == []
    rgb = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(view.encode(rgb), inner.encode(rgb))
    assert torch.equal(view.decode(X), X)


@pytest.mark.parametrize("schedule", [COSINE, TABLE])
def test_times_match_levels_both_ways(schedule) -> None:
    """sigma / alpha agree, and the way there and back is the identity."""
    view = FlowView(vp(schedule)).schedule
    t = torch.linspace(0.002, 0.999, 777, dtype=torch.float64)
    flow = view.from_vp(t)
    assert (flow.diff() > 0).all()
    torch.testing.assert_close(view.to_vp(flow), t, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        view.sigma(flow) / view.alpha(flow), schedule.sigma(t) / schedule.alpha(t), rtol=1e-12, atol=0
    )
    assert view.to_vp(times(0.0)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_snap_lands_on_trained_times(dtype) -> None:
    view = FlowView(vp(TABLE)).schedule
    t = torch.linspace(0.0, 1.0, 501, dtype=dtype)
    snapped = view.snap(t)
    assert snapped.dtype == dtype
    assert torch.equal(view.snap(snapped), snapped)
    steps = view.to_vp(snapped).double() * 1000
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-7 if dtype == torch.float64 else 1e-2)
    assert steps.min() > 0.9
    assert snapped[-1] < 1.0  # the table ends before pure noise
    assert (snapped - t).abs()[10:-60].max() < 0.002


@pytest.mark.parametrize("schedule", [COSINE, TABLE])
def test_view_of_an_exact_prior_is_the_exact_flow_prior(schedule) -> None:
    inner, flow = vp(schedule), AnalyticPrior(MIXTURES, FlowSchedule())
    view, t = FlowView(inner), times(0.15, 0.8)
    cond = condition(inner)
    seen = view.eps(X, t, cond.as_text(), cond.as_null())
    assert inner.calls == 2
    for ours, theirs in zip(seen, flow.eps(X, t, cond.as_text(), cond.as_null()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", [COSINE, TABLE])
def test_sampling_along_the_view_is_ddim_on_the_prior(schedule) -> None:
    inner = vp(schedule)
    view, cond = FlowView(inner), condition(inner)
    path = [times(t, t) for t in (0.95, 0.8, 0.6, 0.4, 0.2, 0.05)]
    flow_path = [view.schedule.from_vp(t) for t in path]
    start = schedule.alpha(path[0]) * X + schedule.sigma(path[0]) * NOISE
    flow_start = view.schedule.alpha(flow_path[0]) * X + view.schedule.sigma(flow_path[0]) * NOISE
    ddim = follow(start, guided_eps(inner, cond, 5.0), schedule, path)
    euler = follow(flow_start, guided_eps(view, cond, 5.0), view.schedule, flow_path)
    torch.testing.assert_close(euler.eps, ddim.eps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        euler.x / view.schedule.alpha(flow_path[-1]), ddim.x / schedule.alpha(path[-1]), rtol=1e-9, atol=1e-9
    )


def rules(clock, lower: float, upper: float, start: float) -> dict:
    """Rules whose times, given on the diffusion clock, are set on the clock of a prior."""
    t, low, first = (float(clock(times(value))) for value in (upper, lower, start))
    inversion = {"delta": Ramp.constant(t - low), "start": first, "stride": 1.0, "strides": 1}
    return {
        "sds": (SDS, {"cfg_scale": 4.0}, upper),
        "sds-multi": (SDS, {"cfg_scale": 4.0, "target_steps": 1, "weight": "recon"}, lower),
        "ism": (ISM, inversion, upper),
        "tsm": (TSM, {**inversion, "ratio": 1.0}, upper),
        "cds": (CDS, {"cfg_scale": Ramp.constant(4.0), "gap": t - low, "perturb": 0.0}, lower),
        "sdi": (SDI, {"steps": 1, "start": first, "jitter": 0.0}, upper),
    }


NAMES = list(rules(lambda t: t, 0.3, 0.6, 0.1))


@pytest.mark.parametrize("schedule", [COSINE, TABLE])
@pytest.mark.parametrize("name", NAMES)
def test_all_parametrisations_of_one_prior_give_the_same_gradient(schedule, name: str) -> None:
    """eps-, v-, x0- and flow-networks, and the flow views of the first three: equal to 1e-10."""
    exact, lower, upper, start = vp(schedule), 0.3, 0.6, 0.1
    candidates = {
        "eps": exact,
        "v": Network(exact, "v"),
        "x0": Network(exact, "x0"),
        "eps as flow": FlowView(exact),
        "v as flow": FlowView(Network(exact, "v")),
        "x0 as flow": FlowView(Network(exact, "x0")),
        "flow": FlowNetwork(AnalyticPrior(MIXTURES, FlowSchedule()), "flow"),
    }
    found = {}
    to_flow = FlowView(exact).schedule.from_vp
    for kind, prior in candidates.items():
        clock = to_flow if "flow" in kind else lambda t: t
        rule, settings, at = rules(clock, lower, upper, start)[name]
        t = float(clock(times(at)))
        found[kind] = (
            rule(rule.Config(**settings), prior)
            .residual(X, draw_at([t, t], NOISE, prior.schedule), condition(exact))
            .grad
        )
    for grad in found.values():
        torch.testing.assert_close(grad, found["eps"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", [COSINE, TABLE])
def test_rfds_on_the_view_is_sds_on_the_prior_over_the_flow_time(schedule) -> None:
    inner = vp(schedule)
    view = FlowView(inner)
    t = float(view.schedule.from_vp(times(0.5)))
    cond = condition(inner)
    rfds = RFDS(RFDS.Config(cfg_scale=Ramp.constant(7.5)), view)
    sds = SDS(SDS.Config(cfg_scale=7.5), inner)
    flow_grad = rfds.residual(X, draw_at([t, t], NOISE, view.schedule), cond).grad
    vp_grad = sds.residual(X, draw_at([0.5, 0.5], NOISE, schedule), cond).grad
    torch.testing.assert_close(flow_grad, vp_grad / t, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", [COSINE, TABLE])
def test_student_of_the_view_is_the_prior_s_student_at_equivalent_samples(schedule) -> None:
    inner = vp(schedule)
    view, cond = FlowView(inner), condition(inner)
    assert isinstance(view, Teacher)
    settings = {"rank": 4, "lr": 0.1, "convolutions": False, "stream": Stream(0, "student")}
    student, plain = view.student(**settings), inner.student(**settings)
    t = times(0.3, 0.7)
    flow_t = view.schedule.from_vp(t)
    x_t = schedule.alpha(t) * X + schedule.sigma(t) * NOISE
    flow_x_t = view.schedule.alpha(flow_t) * X + view.schedule.sigma(flow_t) * NOISE
    (ours,), (theirs,) = student.eps(flow_x_t, flow_t, cond.as_text()), plain.eps(x_t, t, cond.as_text())
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert ours.requires_grad
    assert [group.lr for group in student.groups()] == [0.1]
    with pytest.raises(PriorError, match="no student"):
        FlowView(Network(inner, "v")).student(**settings)


def test_float32_times_reach_the_right_network_step() -> None:
    """The index that the wrapped network is asked for is the one that was snapped to, over the whole range."""
    view = FlowView(vp(TABLE)).schedule
    trained = torch.arange(1, 1001, dtype=torch.float64) / 1000
    asked = view.to_vp(view.from_vp(trained).float()).float()
    assert torch.equal(TABLE.index(asked), torch.arange(1000))


def test_as_flow_wraps_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sds3d.priors.open_prior", lambda folder, config, device: vp(TABLE))
    device = torch.device("cpu")
    assert isinstance(load_prior(PriorConfig(), device), AnalyticPrior)
    assert isinstance(load_prior(PriorConfig(as_flow=True), device), FlowView)
    assert "flow" in priors.prior_offers(PriorConfig(as_flow=True))
