"""A short fine-tune of a cloud to pictures of the original; spherical harmonics are distilled into plain colours."""

from dataclasses import replace

import torch
from torch import Tensor

from sds3d.compact.views import Pictures, look
from sds3d.mesh.splat_cloud import GaussianCloud
from sds3d.rng import Stream
from sds3d.scenes.gaussian_start import raw_values

BATCH = 4
_LR = {"means": 0.001, "log_scales": 0.01, "quats": 0.005, "opacity_logits": 0.03, "color_logits": 0.02}
_LR_END = 0.1  # of the first value, reached exponentially


def recover(cloud: GaussianCloud, teacher: Pictures, steps: int, rng: Stream) -> GaussianCloud:
    """The cloud after `steps` of Adam on the squared difference to the teacher's pictures, before random backgrounds.

    The result has plain colours: harmonics of the cloud are dropped, and what they showed is learned as far as one
    colour for all directions can (the distillation of LightGaussian, section 3.2, down to degree 0).
    """
    cloud = replace(cloud, harmonics=None)
    if steps <= 0:
        return cloud
    start = raw_values(cloud.means, cloud.quats_wxyz, cloud.scales, cloud.opacity, cloud.color)
    raw = {name: value.detach().clone().requires_grad_(True) for name, value in start.items()}
    adam = torch.optim.Adam(
        [{"params": [raw[name]], "lr": lr} for name, lr in _LR.items()], betas=(0.9, 0.99), eps=1e-15
    )
    for step in range(steps):
        for group, lr in zip(adam.param_groups, _LR.values(), strict=True):
            group["lr"] = lr * _LR_END ** (step / steps)
        now = rng.at(step)
        index = (now.fork("views").uniform(BATCH) * len(teacher.rgb)).long().clamp_max(len(teacher.rgb) - 1)
        wanted = teacher.some(index.to(teacher.rgb.device))
        behind = now.fork("background").uniform(BATCH, 3).to(wanted.rgb)
        made = look(_cloud(raw), wanted.cameras, behind)
        adam.zero_grad()
        (made.rgb - wanted.before(behind)).square().mean().backward()
        adam.step()
    return _cloud({name: value.detach() for name, value in raw.items()})


def _cloud(raw: dict[str, Tensor]) -> GaussianCloud:
    return GaussianCloud(
        means=raw["means"],
        quats_wxyz=torch.nn.functional.normalize(raw["quats"], dim=-1),
        scales=raw["log_scales"].exp(),
        opacity=torch.sigmoid(raw["opacity_logits"]),
        color=torch.sigmoid(raw["color_logits"]),
    )
