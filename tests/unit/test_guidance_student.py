"""Rules that learn a score: VSD with its relatives, VDM and LMC; students that are known exactly, and tiny LoRAs."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from sds3d.cameras.light import ShadingConfig, ShadingLaw
from sds3d.cameras.orbit import turntable_cameras
from sds3d.cameras.sample import CameraConfig, CameraLaw
from sds3d.config.ramp import Ramp
from sds3d.errors import ConfigError
from sds3d.guidance.csd import CSD
from sds3d.guidance.fdiv import FACTORS, FDiv, importance
from sds3d.guidance.lmc import LMC
from sds3d.guidance.noise import FreshNoise
from sds3d.guidance.sds import SDS
from sds3d.guidance.student_loss import StudentConfig, denoising_loss, student_loss, student_of, told_student
from sds3d.guidance.terms import Term
from sds3d.guidance.time import UniformTime
from sds3d.guidance.vdm import VDM
from sds3d.guidance.vsd import VSD
from sds3d.guide import Guide
from sds3d.interfaces import Condition, Draw, Prior, Rule, Student, Told
from sds3d.mathx.predict import eps_from_v, eps_from_x0, v_from_eps, x0_from_eps
from sds3d.mathx.schedule import CosineSchedule, FlowSchedule
from sds3d.moment import Moment
from sds3d.optim import Optimizer, OptimizerConfig
from sds3d.optimize import Loop, Parts, PenaltyConfig
from sds3d.priors import PriorConfig
from sds3d.priors.analytic import AnalyticPrior, Mixture
from sds3d.priors.families import LoadOptions
from sds3d.priors.families.stable_diffusion import assemble
from sds3d.priors.flow_view import FlowView
from sds3d.priors.network import NetworkPrior
from sds3d.priors.text import PromptingConfig, TextBank
from sds3d.rng import Stream, Streams
from sds3d.toybox.model import build_scheduler, build_text_encoder, build_tokenizer, build_unet
from tests.toys import CanvasScene, draw_at, told

SHAPE = (3, 4, 4)
VARIANCE = 0.3
TIMES = [0.15, 0.4, 0.6, 0.85]
CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEAN_TEXT, MEAN_NULL, X, NOISE = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2), randn(4, *SHAPE, seed=3), None
NOISE = randn(4, *SHAPE, seed=4)


class FixedStudent(Student):
    """Predicts what a function says."""

    def __init__(self, predict: Callable[[Tensor, Tensor, Told], Tensor]) -> None:
        super().__init__()
        self.predict, self.rows = predict, 0

    def eps(self, x_t: Tensor, t: Tensor, *told: Told) -> tuple[Tensor, ...]:
        self.rows += len(told)
        return tuple(self.predict(x_t, t, bundle) for bundle in told)

    def groups(self) -> list:
        return []


def gaussian_prior(schedule=None, variance: float = VARIANCE) -> AnalyticPrior:
    return AnalyticPrior(
        {"y": Mixture.gaussian(MEAN_TEXT, variance), "": Mixture.gaussian(MEAN_NULL, variance)},
        schedule or CosineSchedule(),
    )


def condition(prior: Prior, count: int = 4, **more) -> Condition:
    text, null = prior.encode_text(["y", ""])
    plain = told(text, null, count)
    return Condition(text=plain.text, null=plain.null, **more)


def vsd(prior: AnalyticPrior, student: Student | None = None, **options) -> VSD:
    rule = VSD(VSD.Config(**options), prior, Stream(0, "rule"))
    if student is not None:
        rule.student = student
    return rule


def draw_of(prior: AnalyticPrior, step: int = 0) -> Draw:
    draw = draw_at(TIMES, NOISE, prior.schedule)
    return Draw(t=draw.t, noise=draw.noise, schedule=draw.schedule, stream=draw.stream, now=Moment(step, 100))


def grad(rule: Rule, prior: AnalyticPrior, cond: Condition | None = None, step: int = 0) -> Tensor:
    return rule.residual(X, draw_of(prior, step), cond or condition(prior)).grad


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# --- VSD, ESD, PG-SB with exact students -----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [CosineSchedule(), FlowSchedule()])
@pytest.mark.parametrize("weight", ["sds", "uniform", "recon"])
def test_vsd_whose_student_returns_the_noise_is_sds(schedule, weight: str) -> None:
    prior = gaussian_prior(schedule)
    own = FixedStudent(lambda x_t, t, bundle: NOISE)
    expected = grad(SDS(SDS.Config(cfg_scale=7.5, weight=weight), prior), prior)
    close(grad(vsd(prior, own, weight=weight), prior), expected)


def test_vsd_whose_student_knows_the_render_exactly_is_sds() -> None:
    """q = delta at x: the exact eps of a Gaussian student without variance is the noise that was added."""
    prior = gaussian_prior()
    rule = vsd(prior)
    x = X[:1].expand(4, -1, -1, -1)
    rule.student.mean.data[:] = x[0]
    rule.student.log_variance.data[:] = -math.inf
    draw, cond = draw_of(prior), condition(prior)
    expected = SDS(SDS.Config(weight="sds"), prior).residual(x, draw, cond).grad
    close(rule.residual(x, draw, cond).grad, expected)


def test_vsd_whose_student_is_the_null_prediction_is_csd() -> None:
    prior, scale = gaussian_prior(), 4.0
    null = condition(prior).as_null()
    own = FixedStudent(lambda x_t, t, bundle: prior.eps(x_t, t, null)[0])
    expected = scale * grad(CSD(CSD.Config(weight="sds"), prior), prior)
    close(grad(vsd(prior, own, cfg_scale=scale), prior), expected)


def test_vsd_whose_student_is_the_guided_prior_stands_still() -> None:
    prior = gaussian_prior()
    cond = condition(prior)

    def guided(x_t: Tensor, t: Tensor, bundle: Told) -> Tensor:
        null, text = prior.eps(x_t, t, cond.as_null(), cond.as_text())
        return null + 7.5 * (text - null)

    close(grad(vsd(prior, FixedStudent(guided)), prior), torch.zeros_like(X))


@pytest.mark.parametrize(
    ("mean", "spread", "still"), [(0.0, 1.0, True), (0.1, 1.0, False), (0.0, 1.5, False)]
)
def test_vsd_is_stationary_only_where_the_renders_have_the_prior_s_moments(
    mean: float, spread: float, still: bool
) -> None:
    prior = gaussian_prior()
    rule = vsd(prior, cfg_scale=1.0)
    rule.student.mean.data[0] = MEAN_TEXT + mean
    rule.student.log_variance.data[0] = math.log(VARIANCE * spread)
    assert (grad(rule, prior).abs().max() < 1e-12) == still


def test_vsd_costs_two_prior_evaluations_and_its_student_s() -> None:
    prior = gaussian_prior()
    own = FixedStudent(lambda x_t, t, bundle: torch.zeros_like(x_t))
    for options, rows in (({}, 1), ({"entropy": 0.3}, 2), ({"random_scale": (2.0, 3.0), "entropy": 0.3}, 3)):
        prior.calls, own.rows = 0, 0
        grad(vsd(prior, own, **options), prior)
        assert (prior.calls, own.rows) == (2, rows + 1)  # one more row to learn


def camera_student() -> FixedStudent:
    """Sees 1 more where it is told a camera, and 10 more where it is told the empty prompt."""

    def predict(x_t: Tensor, t: Tensor, bundle: Told) -> Tensor:
        return x_t + float(bundle.cameras is not None) + 10.0 * bundle.text[:, 0, 1, None, None, None]

    return FixedStudent(predict)


@pytest.mark.parametrize("eta", [0.0, 0.25, 1.0, -0.5])
def test_esd_mixes_the_student_with_and_without_camera(eta: float) -> None:
    prior = gaussian_prior()
    cond = condition(prior, cameras=turntable_cameras(4, 8))
    base = grad(vsd(prior, camera_student(), entropy=1.0, weight="uniform"), prior, cond)
    mixed = grad(vsd(prior, camera_student(), entropy=eta, weight="uniform"), prior, cond)
    close(mixed, base - (1.0 - eta))


def test_the_student_is_told_the_prompt_without_view_words() -> None:
    prior = gaussian_prior()
    null = condition(prior).null
    cond = condition(prior, plain=null, cameras=turntable_cameras(4, 8))
    assert torch.equal(told_student(cond).text, null)
    assert told_student(cond).cameras is cond.cameras
    assert told_student(cond, camera=False).cameras is None
    difference = grad(vsd(prior, camera_student(), weight="uniform"), prior, condition(prior)) - grad(
        vsd(prior, camera_student(), weight="uniform"), prior, cond
    )
    close(difference, torch.full_like(X, 11.0))


def test_random_scale_of_one_is_vsd_without_guidance() -> None:
    prior = gaussian_prior()
    plain = grad(vsd(prior, camera_student(), cfg_scale=1.0), prior)
    close(grad(vsd(prior, camera_student(), random_scale=(1.0, 1.0)), prior), plain)


def test_random_scale_is_one_number_for_both_sides() -> None:
    """G = A + k B is affine in k, so k can be read off; it lies in the range, and differs from step to step."""
    prior, cond = gaussian_prior(), condition(gaussian_prior())
    at_one, at_two = (grad(vsd(prior, camera_student(), random_scale=(k, k)), prior) for k in (1.0, 2.0))
    found = []
    for step in range(4):
        stream = Stream(0, "test", step)
        draw = Draw(t=draw_of(prior).t, noise=NOISE, schedule=prior.schedule, stream=stream)
        rule = vsd(prior, camera_student(), random_scale=(2.0, 6.0))
        k = 1.0 + (rule.residual(X, draw, cond).grad - at_one) / (at_two - at_one)
        close(k, k.mean().expand_as(k))
        found.append(float(k.mean()))
    assert all(2.0 <= k <= 6.0 for k in found)
    assert len(set(found)) == 4


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_random_scale_of_an_untrained_student_stands_still(scale: float) -> None:
    prior = gaussian_prior()
    close(grad(vsd(prior, random_scale=(scale, scale)), prior), torch.zeros_like(X))


# --- the student's loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["noise", "v", "x0"])
def test_denoising_loss_is_the_mean_squared_error_of_its_target(target: str) -> None:
    schedule, stream = CosineSchedule(), Stream(3, "s")
    own = FixedStudent(lambda x_t, t, bundle: x_t.sin() + t[:, None, None, None])
    cond = condition(gaussian_prior())
    loss = denoising_loss(own, X, told_student(cond), schedule, stream, target)
    t = 0.001 + 0.998 * stream.fork("t").uniform(4).double()
    noise = stream.fork("noise").normal(*X.shape).double()
    a, s = schedule.alpha(t), schedule.sigma(t)
    x_t = a * X + s * noise
    eps = own.predict(x_t, t, told_student(cond))
    errors = {
        "noise": eps - noise,
        "v": v_from_eps(x_t, eps, a, s) - (a * noise - s * X),
        "x0": x0_from_eps(x_t, eps, a, s) - X,
    }
    close(loss, errors[target].square().mean())


def test_a_gaussian_student_learns_mean_and_variance_of_the_renders() -> None:
    prior = gaussian_prior()
    own = prior.student(rank=4, lr=0.1, convolutions=False, stream=Stream(0, "s"))
    optimizer = Optimizer(own.groups(), OptimizerConfig(lr_factor=Ramp(start=1.0, end=0.02)))
    cond, mean, spread = condition(prior, 32), randn(*SHAPE, seed=8), 0.5
    for step in range(150):
        renders = mean + spread * Stream(1, "renders", step).normal(32, *SHAPE).double()
        loss = denoising_loss(own, renders, told_student(cond), prior.schedule, Stream(0, "loss", step))
        optimizer.step(loss, Moment(step, 150))
    assert (own.mean[0] - mean).abs().max() < 0.12
    assert float(own.log_variance[0].detach().exp()) == pytest.approx(spread**2, rel=0.1)
    assert torch.equal(own.mean[1], MEAN_NULL)  # the empty prompt was never asked


def test_dropout_hides_camera_and_text_in_its_share_of_steps() -> None:
    prior = gaussian_prior()
    cond = condition(prior, cameras=turntable_cameras(4, 8))
    seen: list[tuple[bool, bool]] = []

    def note(x_t: Tensor, t: Tensor, bundle: Told) -> Tensor:
        seen.append((bundle.cameras is not None, torch.equal(bundle.text, cond.null)))
        return x_t

    config = StudentConfig(camera_dropout=0.3, text_dropout=0.2)
    for step in range(400):
        draw = Draw(t=draw_of(prior).t, noise=NOISE, schedule=prior.schedule, stream=Stream(0, "d", step))
        student_loss(FixedStudent(note), config, X, draw, cond)
    share = {kind: seen.count(kind) / len(seen) for kind in set(seen)}
    assert share[True, False] == pytest.approx(0.56, abs=0.08)
    assert share[False, False] == pytest.approx(0.24, abs=0.08)
    assert share[False, True] == pytest.approx(0.2, abs=0.08)


def test_a_smaller_batch_goes_round_the_views_with_their_cameras() -> None:
    prior = gaussian_prior()
    cameras = turntable_cameras(4, 8)
    cond = condition(prior, cameras=cameras, background=torch.rand(4, 3, dtype=torch.float64))
    views: set[int] = set()

    def note(x_t: Tensor, t: Tensor, bundle: Told) -> Tensor:
        rows = [cameras.azimuth_deg.tolist().index(a) for a in bundle.cameras.azimuth_deg.tolist()]
        assert torch.equal(bundle.background, cond.background[rows])
        assert len(x_t) == len(bundle.text) == 2
        views.update(rows)
        return x_t

    for step in range(20):
        draw = Draw(t=draw_of(prior).t, noise=NOISE, schedule=prior.schedule, stream=Stream(0, "d", step))
        student_loss(FixedStudent(note), StudentConfig(batch=2, camera_dropout=0.0), X, draw, cond)
    assert views == {0, 1, 2, 3}


def test_a_prior_without_student_is_refused() -> None:
    class Plain(FlowView):
        student = None

    with pytest.raises(ConfigError, match="trains a student"):
        student_of(Plain(gaussian_prior()), StudentConfig(), None)


# --- f-divergences ---------------------------------------------------------------------------------------------------

# f of D_f = E_q f(p / q); h is compared up to a constant.
GENERATORS = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened": lambda r: (1 + r) * ((1 + r) / r).log() - 1,
    "hellinger": lambda r: (1 - r.sqrt()).square(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "pearson": lambda r: (r - 1).square(),
    "neyman": lambda r: (1 - r).square() / r,
}


@pytest.mark.parametrize("name", sorted(FACTORS))
def test_factors_are_r_squared_times_the_second_derivative(name: str) -> None:
    r = torch.linspace(0.2, 4.0, 9, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(GENERATORS[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    ratio = FACTORS[name](r.detach()) / (r.detach().square() * second)
    close(ratio, ratio[0].expand_as(ratio))


@pytest.mark.parametrize("name", sorted(FACTORS))
def test_importance_has_mean_one_and_is_one_for_a_constant_ratio(name: str) -> None:
    h = importance(name, torch.tensor([-30.0, -0.5, 0.3, 30.0]), (0.1, 20.0))
    assert float(h.mean()) == pytest.approx(1.0)
    assert h.max() < 4.0
    torch.testing.assert_close(importance(name, torch.full((4,), 0.7), (0.1, 20.0)), torch.ones(4))


def fdiv(prior: AnalyticPrior, **options) -> FDiv:
    return FDiv(FDiv.Config(**{"warmup_steps": 0, "critic_width": 8, **options}), prior, Stream(0, "rule"))


@pytest.mark.parametrize("name", ["js", "pearson"])
def test_fdiv_with_a_constant_ratio_is_vsd(name: str) -> None:
    prior = gaussian_prior()
    close(grad(fdiv(prior, divergence=name), prior), grad(vsd(prior), prior))  # an untrained net says 0


def test_fdiv_weighs_views_by_the_ratio_after_its_warm_up() -> None:
    prior = gaussian_prior()
    rule = fdiv(prior, divergence="forward_kl", warmup_steps=5)
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    rule.logit = lambda x_t, t: logits  # type: ignore[method-assign]
    plain = grad(vsd(prior), prior)
    close(grad(rule, prior, step=4), plain)
    share = logits.softmax(0) * 4
    close(grad(rule, prior, step=5), share[:, None, None, None] * plain)
    assert rule.config.clip[0] < float(logits.exp().min())


def test_the_ratio_net_learns_to_tell_renders_from_the_prior() -> None:
    prior = gaussian_prior(variance=0.01)
    rule = fdiv(prior, critic_lr=5e-3, vsd=VSD.Config(cfg_scale=1.0))
    optimizer = Optimizer(rule.groups(), OptimizerConfig(lr_factor=Ramp.constant(1.0)))
    cond, far = condition(prior), (MEAN_TEXT - 1.0).expand(4, -1, -1, -1)
    t = torch.full((4,), 0.3, dtype=torch.float64)
    for step in range(40):
        draw = Draw(
            t=t, noise=NOISE, schedule=prior.schedule, stream=Stream(0, "d", step), now=Moment(step, 40)
        )
        optimizer.step(rule.residual(far, draw, cond).aux_loss, Moment(step, 40))
    fresh = Draw(t=t, noise=randn(4, *SHAPE, seed=9), schedule=prior.schedule, stream=Stream(0, "d"))
    real, fake = (rule.logit(fresh.diffuse(x), t) for x in (MEAN_TEXT.expand(4, -1, -1, -1), far))
    assert real.min() > 0.5
    assert fake.max() < -0.5


# --- VDM and LMC -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kappa", "power"), [(0.0, 1.0), (0.4, 1.0), (1.0, 0.0)])
def test_vdm_whose_map_returns_the_render_is_sds(kappa: float, power: float) -> None:
    prior = gaussian_prior()
    rule = VDM(VDM.Config(kappa=Ramp.constant(kappa), power=power, width=8), prior)
    rule.mapped = lambda x0, t: X  # type: ignore[method-assign]
    close(grad(rule, prior), grad(SDS(SDS.Config(weight="sds"), prior), prior))


def test_vdm_with_the_identity_map_keeps_only_the_guidance() -> None:
    prior, scale = gaussian_prior(), 5.0
    rule = VDM(VDM.Config(cfg_scale=scale, kappa=Ramp.constant(1.0), power=0.0, width=8), prior)
    expected = (scale - 1.0) * grad(CSD(CSD.Config(weight="sds"), prior), prior)
    close(grad(rule, prior), expected)  # the identity is where it starts
    assert prior.calls == 4


def test_vdm_coefficient_grows_over_the_run_and_towards_clean_images() -> None:
    prior = gaussian_prior()
    rule = VDM(VDM.Config(width=8, weight="uniform"), prior)
    sds = grad(SDS(SDS.Config(weight="uniform"), prior), prior)
    close(grad(rule, prior, step=0), sds)
    away = (grad(rule, prior, step=50) - sds) / (grad(rule, prior, step=99) - sds)
    close(away, torch.full_like(away, 50 / 99))
    flat = VDM(VDM.Config(width=8, weight="uniform", power=0.0), prior)
    share = (grad(rule, prior, step=50) - sds) / (grad(flat, prior, step=50) - sds)
    close(share, 1.0 - torch.tensor(TIMES, dtype=torch.float64)[:, None, None, None].expand_as(share))


def test_lmc_with_the_identity_is_sds() -> None:
    prior = gaussian_prior()
    rule = LMC(LMC.Config(cfg_scale=6.0, width=8), prior)
    close(grad(rule, prior), grad(SDS(SDS.Config(cfg_scale=6.0, weight="recon"), prior), prior))


@pytest.mark.parametrize("trained", [VARIANCE, 0.1, 0.9])
def test_lmc_with_the_exact_corrective_of_a_gaussian_leaves_noise_and_the_mismatch(trained: float) -> None:
    """P' = (c(q_train) - c(q)) (x - mu) - c(q) lambda noise, c(q) = q / (q + lambda^2)."""
    prior = gaussian_prior()
    rule = LMC(LMC.Config(cfg_scale=0.0, width=8), prior)
    draw = draw_of(prior)
    square = (draw.sigma / draw.alpha).square()

    def keep(q: float) -> Tensor:
        return q / (q + square)

    rule.corrupted = lambda z, t: MEAN_NULL + keep(trained) * (z - MEAN_NULL)  # type: ignore[method-assign]
    expected = (keep(trained) - keep(VARIANCE)) * (X - MEAN_NULL) - keep(VARIANCE) * square.sqrt() * NOISE
    close(grad(rule, prior), expected)


@pytest.mark.parametrize(("learn_from", "calls"), [("estimate", 3), ("render", 2)])
def test_lmc_pays_one_pass_to_learn_from_estimates(learn_from: str, calls: int) -> None:
    prior = gaussian_prior()
    grad(LMC(LMC.Config(learn_from=learn_from, width=8), prior), prior)
    assert prior.calls == calls


@pytest.mark.parametrize("kind", ["vdm", "lmc"])
def test_small_nets_learn(kind: str) -> None:
    prior = gaussian_prior()
    rule: Rule
    if kind == "vdm":
        rule = VDM(VDM.Config(width=16, lr=5e-3), prior, Stream(0, "rule"))
    else:
        rule = LMC(LMC.Config(width=16, lr=5e-3, cfg_scale=1.0), prior, Stream(0, "rule"))
    optimizer = Optimizer(rule.groups(), OptimizerConfig(lr_factor=Ramp.constant(1.0)))
    cond, losses = condition(prior), []
    for step in range(80):
        stream = Stream(0, "d", step)
        draw = Draw(
            t=0.2 + 0.6 * stream.fork("t").uniform(4).double(),
            noise=stream.fork("n").normal(4, *SHAPE).double(),
            schedule=prior.schedule,
            stream=stream,
        )
        loss = rule.residual(X, draw, cond).aux_loss
        losses.append(loss.detach())
        optimizer.step(loss, Moment(step, 80))
    first, last = (float(torch.stack(part).mean()) for part in (losses[:15], losses[-15:]))
    assert last < 0.75 * first


# --- a LoRA on a small UNet ------------------------------------------------------------------------------------------


def small_prior(kind: str = "toybox", dtype: torch.dtype = torch.float32) -> NetworkPrior:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(("y", "mug"))
    if kind == "toybox":
        unet, scheduler = build_unet(channels=(16, 16, 16), text_width=32), build_scheduler()
        extra = {"pixel_unshuffle": 4, "condition": "camera_background_10", "coordinates": True}
    else:
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 16),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        scheduler, extra = DDIMScheduler(prediction_type="v_prediction"), {}
    text = build_text_encoder(len(tokenizer), width=32)
    parts = assemble(
        tokenizer=tokenizer,
        encoder=text,
        unet=unet,
        scheduler=scheduler,
        vae=None,
        extra=extra,
        options=LoadOptions(config=PriorConfig(), device=CPU, dtype=dtype),
    )
    return NetworkPrior(parts, CPU, dtype)


def lora_of(prior: NetworkPrior, convolutions: bool = False, seed: int = 0) -> Student:
    return prior.student(rank=2, lr=1e-2, convolutions=convolutions, stream=Stream(seed, "student"))


def views_of(prior: NetworkPrior, count: int = 2) -> tuple[Tensor, Draw, Condition]:
    x, noise = randn(count, *prior.shape, seed=5).float(), randn(count, *prior.shape, seed=6).float()
    t = prior.schedule.snap(torch.linspace(0.3, 0.8, count))
    text, null = prior.encode_text(["y mug", ""])
    cond = Condition(
        text=text.expand(count, -1, -1),
        null=null.expand(count, -1, -1),
        cameras=turntable_cameras(count, 16),
        background=torch.full((count, 3), 0.5),
    )
    return x, Draw(t=t, noise=noise, schedule=prior.schedule, stream=Stream(0, "d")), cond


@pytest.mark.parametrize("kind", ["toybox", "plain"])
@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_lora_equals_its_base_to_the_last_bit(
    kind: str, convolutions: bool, dtype: torch.dtype
) -> None:
    prior = small_prior(kind, dtype)
    x, draw, cond = views_of(prior)
    before = prior.eps(x, draw.t, cond.as_text(), cond.as_null())
    own = lora_of(prior, convolutions)
    with torch.no_grad():
        seen = own.eps(x, draw.t, cond.as_text(), cond.as_null())
    after = prior.eps(x, draw.t, cond.as_text(), cond.as_null())
    for a, b, c in zip(before, seen, after, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert all(p.dtype == torch.float32 for p in own.parameters())


def test_a_lora_shares_the_weights_of_its_base_and_stores_none_of_them() -> None:
    prior = small_prior()
    own, wide = lora_of(prior), lora_of(prior, convolutions=True)
    prior_weights = {p.data_ptr() for p in prior.denoiser.module.parameters()}
    unet = own._frozen[1].module
    frozen = {p.data_ptr() for p in unet.parameters() if not p.requires_grad}
    assert frozen == prior_weights
    stored = sum(v.numel() for v in own.state_dict().values())
    assert stored == sum(p.numel() for group in own.groups() for p in group.params)
    assert stored < 0.2 * sum(p.numel() for p in prior.denoiser.module.parameters())
    assert len(wide.state_dict()) > len(own.state_dict())


def test_lora_starts_depend_on_the_stream_alone() -> None:
    state = torch.random.get_rng_state()
    prior = small_prior("plain")
    torch.random.set_rng_state(state)
    a, b, c = lora_of(prior), lora_of(prior), lora_of(prior, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    down = [name for name in a.state_dict() if "lora_A" in name]
    assert all(torch.equal(a.state_dict()[name], b.state_dict()[name]) for name in down)
    assert not any(torch.equal(a.state_dict()[name], c.state_dict()[name]) for name in down)


def perturb(own: Student) -> None:
    for index, p in enumerate(own.parameters()):
        p.data += 0.1 * randn(*p.shape, seed=index).float()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_lora_speaks_eps_whatever_its_network_predicts(prediction: str) -> None:
    prior = small_prior("plain")
    prior.prediction = prediction
    own = lora_of(prior)
    perturb(own)
    x, draw, cond = views_of(prior)
    unet = own._frozen[1].module
    with torch.no_grad():
        poses = cond.cameras.c2w.reshape(-1, 16)
        raw = unet(x, prior.schedule.index(draw.t), cond.text, class_labels=poses, return_dict=False)[0]
        (eps,) = own.eps(x, draw.t, cond.as_text())
    expected = {
        "epsilon": raw,
        "v_prediction": eps_from_v(x, raw, draw.alpha.float(), draw.sigma.float()),
        "sample": eps_from_x0(x, raw, draw.alpha.float(), draw.sigma.float()),
    }
    torch.testing.assert_close(eps, expected[prediction], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["toybox", "plain"])
def test_a_trained_lora_sees_the_camera(kind: str) -> None:
    prior = small_prior(kind)
    own = lora_of(prior)
    perturb(own)
    x, draw, cond = views_of(prior)
    with torch.no_grad():
        seen, blind = own.eps(x, draw.t, told_student(cond), told_student(cond, camera=False))
    assert (seen - blind).abs().max() > 1e-3


def test_gradients_stay_on_their_side() -> None:
    """The guidance gradient carries no graph; the student's loss reaches the LoRA and nothing else."""
    prior = small_prior()
    rule = VSD(VSD.Config(), prior, Stream(0, "rule"))
    perturb(rule.student)
    x, draw, cond = views_of(prior)
    x.requires_grad_()
    residual = rule.residual(x.detach(), draw, cond)
    assert not residual.grad.requires_grad
    residual.aux_loss.backward()
    assert x.grad is None
    assert all(p.grad is None and not p.requires_grad for p in prior.denoiser.module.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in rule.student.parameters())
    assert {id(p) for p in rule.parameters()} == {id(p) for g in rule.groups() for p in g.params}


def test_a_learning_lora_lowers_its_loss_and_leaves_the_prior_alone() -> None:
    prior = small_prior()
    x, draw, cond = views_of(prior, 1)
    x = torch.full_like(x, 0.5)
    weights = {name: p.clone() for name, p in prior.denoiser.module.named_parameters()}
    (before,) = prior.eps(x, draw.t, cond.as_text())
    own = prior.student(rank=8, lr=0.1, convolutions=False, stream=Stream(0, "student"))
    optimizer = Optimizer(own.groups(), OptimizerConfig(lr_factor=Ramp.constant(1.0)))
    losses = []
    for step in range(12):
        loss = denoising_loss(own, x, told_student(cond), prior.schedule, Stream(0, "l", step), "x0")
        losses.append(float(loss.detach()))
        optimizer.step(loss, Moment(step, 12))
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    assert torch.equal(prior.eps(x, draw.t, cond.as_text())[0], before)
    assert all(torch.equal(p, weights[name]) for name, p in prior.denoiser.module.named_parameters())


def test_random_scale_of_a_new_lora_stands_still() -> None:
    prior = small_prior()
    rule = VSD(VSD.Config(random_scale=(0.5, 6.0)), prior, Stream(0, "rule"))
    x, draw, cond = views_of(prior)
    torch.testing.assert_close(rule.residual(x, draw, cond).grad, torch.zeros_like(x), rtol=0, atol=1e-4)


# --- whole runs ------------------------------------------------------------------------------------------------------


def loop_of(prior: Prior, rule: Rule, steps: int = 20) -> Loop:
    scene, streams = CanvasScene(), Streams(0)
    guide = Guide(
        prior=prior,
        terms=(Term(rule=rule),),
        bank=TextBank(prior, "y", "", PromptingConfig(view_dependent=False)),
        time=UniformTime(UniformTime.Config()),
        noise=FreshNoise(FreshNoise.Config()),
        streams=streams,
    )
    parts = Parts(
        scene=scene,
        guide=guide,
        camera=CameraLaw(CameraConfig(batch=2, render_px=Ramp.constant(8.0))),
        shading=ShadingLaw(ShadingConfig()),
        optimizer=Optimizer(scene.groups(), OptimizerConfig()),
        penalties=PenaltyConfig(),
        streams=streams,
    )
    return Loop(parts, steps)


RUNS: dict[str, Callable[[Prior], Rule]] = {
    "vsd": lambda prior: VSD(VSD.Config(student=StudentConfig(lr=0.01)), prior, Stream(0, "r")),
    "fdiv": lambda prior: FDiv(FDiv.Config(warmup_steps=5, critic_width=8), prior, Stream(0, "r")),
    "vdm": lambda prior: VDM(VDM.Config(width=8), prior, Stream(0, "r")),
    "lmc": lambda prior: LMC(LMC.Config(width=8), prior, Stream(0, "r")),
}


@pytest.mark.parametrize(("kind", "backbone"), [*((kind, "gaussian") for kind in RUNS), ("vsd", "lora")])
def test_saving_and_loading_halfway_changes_nothing(kind: str, backbone: str) -> None:
    def build() -> Loop:
        if backbone == "lora":
            prior: Prior = small_prior()
        else:
            mean = MEAN_TEXT.float()
            prior = AnalyticPrior({"y": Mixture.gaussian(mean, 0.1), "": Mixture.gaussian(mean - 0.5, 0.1)})
        return loop_of(prior, RUNS[kind](prior))

    steps = 4 if backbone == "lora" else 20
    whole, first, second = build(), build(), build()
    start = whole.state_dict()
    whole.run(steps, lambda event: None)
    first.run(steps // 2, lambda event: None)
    second.load_state_dict(first.state_dict())
    second.run(steps, lambda event: None)
    end, resumed = whole.state_dict(), second.state_dict()
    assert end.keys() == resumed.keys()
    for key, value in end.items():
        assert torch.equal(value, resumed[key]), key
    learned = [key for key in start if key.startswith("guide.rule.")]
    assert learned
    assert all(
        not torch.equal(start[key], end[key]) for key in learned if "." in key and "log_var" not in key
    )


def test_vsd_with_a_learning_student_ends_at_the_prior_s_mean() -> None:
    """At first the student is the prior and nothing pulls; it comes to know the scene, and then VSD pulls."""
    mean = 0.5 + 0.3 * MEAN_TEXT.float()
    prior = AnalyticPrior({"y": Mixture.gaussian(mean, 0.01), "": Mixture.gaussian(mean - 0.5, 0.01)})
    config = VSD.Config(cfg_scale=1.0, student=StudentConfig(lr=0.15))
    loop = loop_of(prior, VSD(config, prior, Stream(0, "r")), steps=100)
    loop.run(100, lambda event: None)
    assert (loop.parts.scene.image.detach() - mean).abs().max() < 0.15


def test_a_student_that_says_nan_changes_nothing_in_that_step_and_is_not_spoiled() -> None:
    prior = gaussian_prior()
    loop = loop_of(prior, RUNS["vsd"](prior), steps=40)
    student, rule = loop.parts.guide.terms[0].rule.student, loop.parts.guide.terms[0].rule
    loop.run(10, lambda event: None)
    scene = loop.parts.scene.image.detach().clone()
    own = [p.detach().clone() for p in rule.parameters()]
    eps = student.eps
    student.eps = lambda *a: tuple(e * float("nan") for e in eps(*a))
    loop.run(11, lambda event: None)
    assert torch.equal(loop.parts.scene.image, scene)
    assert all(torch.equal(p, before) for p, before in zip(rule.parameters(), own, strict=True))
    assert loop.parts.optimizer.lr_scale == 0.5
    student.eps = eps
    loop.run(40, lambda event: None)
    assert not torch.equal(loop.parts.scene.image, scene)
    assert all(bool(torch.isfinite(p).all()) for p in [*rule.parameters(), loop.parts.scene.image])
