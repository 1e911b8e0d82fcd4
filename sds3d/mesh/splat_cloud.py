"""3D Gaussians outside a scene: in this package's world frame (+y up, front +z, metres) and natural units."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.errors import ExportError

SH_DC = 0.28209479177387814  # 1 / (2 sqrt(pi)), the constant spherical harmonic


@dataclass(frozen=True, kw_only=True)
class GaussianCloud:
    """What a splat file holds. Colour is constant over directions (spherical harmonics of degree 0)."""

    means: Float[Tensor, "g 3"]  # metres
    quats_wxyz: Float[Tensor, "g 4"]
    scales: Float[Tensor, "g 3"]  # metres
    opacity: Float[Tensor, " g"]  # [0, 1]
    color: Float[Tensor, "g 3"]  # sRGB

    def __len__(self) -> int:
        return len(self.means)

    def on_cpu(self) -> "GaussianCloud":
        """Detached float32 copies on the CPU, quaternions of unit length."""
        plain = {name: value.detach().cpu().float() for name, value in vars(self).items()}
        plain["quats_wxyz"] = torch.nn.functional.normalize(plain["quats_wxyz"], dim=-1)
        return GaussianCloud(**plain)

    def finite(self) -> "GaussianCloud":
        """The same cloud; ExportError if it is empty or holds a number that is not finite."""
        if not len(self):
            raise ExportError("splats: there are no Gaussians to write")
        bad = sum(
            int((~torch.isfinite(value)).any(-1).sum()) for value in (self.means, self.scales, self.color)
        )
        if bad:
            raise ExportError(f"splats: {bad} of {len(self)} Gaussians hold numbers that are not finite")
        return self


def flipped(cloud: GaussianCloud) -> GaussianCloud:
    """The cloud turned by 180 degrees about x; its own inverse up to the sign of quaternions.

    Between +y up, +z towards the viewer (glTF, spz) and the camera-like frame +y down, +z away in which viewers show
    3DGS .ply and .splat files.
    """
    signs = cloud.means.new_tensor([1.0, -1.0, -1.0])
    w, x, y, z = cloud.quats_wxyz.unbind(-1)
    turned = torch.stack([-x, w, -z, y], dim=-1)  # (0, 1, 0, 0) times q
    return replace(cloud, means=cloud.means * signs, quats_wxyz=turned)


def written(cloud: GaussianCloud) -> GaussianCloud:
    """What all encoders start from: checked, detached, on the CPU. Raises ExportError (see `finite`)."""
    return cloud.finite().on_cpu()
