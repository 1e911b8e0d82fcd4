"""3D Gaussians outside a scene: in this package's world frame (+y up, front +z, metres) and natural units."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sds3d.errors import ExportError
from sds3d.mathx.harmonics import sh_basis

_TURN = (1.0, -1.0, -1.0)  # by 180 degrees about x


@dataclass(frozen=True, kw_only=True)
class GaussianCloud:
    """What a splat file holds. Without `harmonics` colour is constant over directions."""

    means: Float[Tensor, "g 3"]  # metres
    quats_wxyz: Float[Tensor, "g 4"]
    scales: Float[Tensor, "g 3"]  # metres
    opacity: Float[Tensor, " g"]  # [0, 1]
    color: Float[Tensor, "g 3"]  # sRGB
    harmonics: Float[Tensor, "g k 3"] | None = (
        None  # spherical harmonics beyond the constant, see `sh_colors`
    )

    def __len__(self) -> int:
        return len(self.means)

    def on_cpu(self) -> "GaussianCloud":
        """Detached float32 copies on the CPU, quaternions of unit length."""
        plain = {
            name: value.detach().cpu().float() for name, value in vars(self).items() if value is not None
        }
        plain["quats_wxyz"] = torch.nn.functional.normalize(plain["quats_wxyz"], dim=-1)
        return GaussianCloud(**plain)

    def to(self, device: torch.device | str) -> "GaussianCloud":
        """The same cloud on another device."""
        return GaussianCloud(
            **{name: value.to(device) for name, value in vars(self).items() if value is not None}
        )

    def take(self, index: Int[Tensor, " n"]) -> "GaussianCloud":
        """A selection of the Gaussians."""
        rows = {name: value[index] for name, value in vars(self).items() if value is not None}
        return GaussianCloud(**rows)

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
    signs = cloud.means.new_tensor(_TURN)
    w, x, y, z = cloud.quats_wxyz.unbind(-1)
    turned = torch.stack([-x, w, -z, y], dim=-1)  # (0, 1, 0, 0) times q
    harmonics = cloud.harmonics
    if harmonics is not None:
        # A basis function is a polynomial: the turn leaves it or changes its sign.
        probe = torch.nn.functional.normalize(harmonics.new_tensor([[0.48, 0.6, 0.64]]), dim=-1)
        parity = sh_basis(probe * signs, harmonics.shape[1]) * sh_basis(probe, harmonics.shape[1])
        harmonics = harmonics * parity.sign()[0, :, None]
    return replace(cloud, means=cloud.means * signs, quats_wxyz=turned, harmonics=harmonics)


def written(cloud: GaussianCloud) -> GaussianCloud:
    """What all encoders start from: checked, detached, on the CPU. Raises ExportError (see `finite`)."""
    return cloud.finite().on_cpu()
