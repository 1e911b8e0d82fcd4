"""What is checked on the prior of every family alike."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sds3d.interfaces import Told
from sds3d.mathx.cfg import cfg
from sds3d.mathx.ode import ddim_step
from sds3d.priors.network import NetworkPrior
from sds3d.rng import Stream

PROMPT = "a red mug, front view"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(size_px: int, seed: int = 0) -> Tensor:
    """A smooth random image (1 3 size size) in [0, 1]."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(size_px, size_px), mode="bilinear")


@torch.no_grad()
def sample(
    prior: NetworkPrior, x: Tensor, times: Sequence[float], scale: float = 1.0, null: str = ""
) -> Tensor:
    """The clean x of the prompt by DDIM (Euler on a flow) over these falling times, with guidance where scale != 1.

    In float64 around the network: near t = 1 eps says little of a flow's x.
    """
    text, empty = (prior.encode_text([words]) for words in (PROMPT, null))
    x = x.double()
    for pair in itertools.pairwise(times):
        t, s = (torch.full((len(x),), time, dtype=torch.float64) for time in pair)
        if scale == 1.0:
            (eps,) = prior.eps(x, t, Told(text=text))
        else:
            eps = cfg(*prior.eps(x, t, Told(text=empty), Told(text=text)), scale)
        x = ddim_step(x, eps, prior.schedule, t, s)
    return x.float()


def check_codec(prior: NetworkPrior, pipeline: Any) -> None:
    """Scaling, shift and value ranges are those of the pipeline; the gradient goes through, none stays in the VAE."""
    vae, size = pipeline.vae, prior.image_px
    shift = vae.config.shift_factor or 0.0
    rgb = picture(size).requires_grad_()
    x = prior.encode(rgb)
    assert x.shape == (1, *prior.shape)
    with torch.no_grad():
        expected = vae.encode(pipeline.image_processor.preprocess(rgb.detach())).latent_dist.mode()
        torch.testing.assert_close(x.detach(), (expected - shift) * vae.config.scaling_factor)
        back = pipeline.image_processor.postprocess(
            vae.decode(x.detach() / vae.config.scaling_factor + shift).sample, output_type="pt"
        )
    torch.testing.assert_close(prior.decode(x.detach()).clamp(0.0, 1.0), back)
    x.square().sum().backward()
    assert rgb.grad is not None
    assert rgb.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in prior.codec.vae.parameters())
    assert all(p.grad is None and not p.requires_grad for p in prior.denoiser.module.parameters())
    assert prior.encode(picture(size + 8)).shape == (1, *prior.shape)


def check_bundles(prior: NetworkPrior) -> None:
    """Several bundles of several views in one call are the same as one by one."""
    x, t = randn(2, *prior.shape), torch.tensor([0.3, 0.8])
    bundles = [Told(text=prior.encode_text(pair)) for pair in ((PROMPT, "a blue car"), ("", ""))]
    for bundle, eps in zip(bundles, prior.eps(x, t, *bundles), strict=True):
        torch.testing.assert_close(prior.eps(x, t, bundle)[0], eps, rtol=1e-4, atol=1e-5)


def check_half(half: NetworkPrior, exact: NetworkPrior) -> None:
    """The same network in bfloat16, schedule algebra in float32, says about the same."""
    x, t = randn(1, *exact.shape), torch.tensor([0.5])
    (rough,), (fine,) = (prior.eps(x, t, Told(text=prior.encode_text([PROMPT]))) for prior in (half, exact))
    assert next(half.denoiser.module.parameters()).dtype == torch.bfloat16
    assert rough.dtype == torch.float32
    assert (rough - fine).norm() < 0.05 * fine.norm()


def check_student(prior: NetworkPrior) -> None:
    """A fresh LoRA is its base; once it has left it, it has a gradient and the prior none."""
    student = prior.student(rank=2, lr=1e-3, convolutions=False, stream=Stream(0, "student"))
    x, t, told = randn(1, *prior.shape), torch.tensor([0.6]), Told(text=prior.encode_text([PROMPT]))
    with torch.no_grad():
        torch.testing.assert_close(student.eps(x, t, told), prior.eps(x, t, told))
        before = prior.eps(x, t, told)[0]
        for index, parameter in enumerate(student.parameters()):
            parameter += 0.1 * randn(*parameter.shape, seed=index)
        assert (student.eps(x, t, told)[0] - before).abs().max() > 1e-5
    student.eps(x, t, told)[0].square().sum().backward()
    grads = {name: p.grad for name, p in student.lora.named_parameters()}
    assert len(grads) >= 8
    # The last block of a joint transformer drops its text, so an adapter of its text queries sees nothing.
    alive = [name for name, grad in grads.items() if grad is not None and grad.abs().max() > 0]
    assert len(alive) >= 0.75 * len(grads), sorted(grads.keys() - alive)
    assert all(p.grad is None for p in prior.denoiser.module.parameters())
    torch.testing.assert_close(prior.eps(x, t, told)[0], before, rtol=0, atol=0)
