"""3D Gaussians as a .ply that splat viewers read: the fields and encodings of the 3DGS reference implementation.

x y z, nx ny nz (zero), f_dc_0..2 = (colour - 1/2) / 0.2821, opacity as logit, scale_0..2 as logarithms, rot_0..3 =
w x y z; binary little-endian float32. Positions stay in this package's world frame: +y up, front +z, metres.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.errors import ExportError, InputError
from sds3d.paths import write_atomic

SH_DC = 0.28209479177387814  # 1 / (2 sqrt(pi)), the constant spherical harmonic
_OPACITY_RANGE = (1e-6, 1.0 - 1e-6)
_FIELDS = (
    *("x", "y", "z", "nx", "ny", "nz"),
    *("f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
)


@dataclass(frozen=True, kw_only=True)
class GaussianCloud:
    """What a splat file holds, in natural units."""

    means: Float[Tensor, "g 3"]  # metres
    quats_wxyz: Float[Tensor, "g 4"]
    scales: Float[Tensor, "g 3"]  # metres
    opacity: Float[Tensor, " g"]  # [0, 1]
    color: Float[Tensor, "g 3"]  # sRGB


def write_splat_ply(path: Path, cloud: GaussianCloud) -> None:
    """Write the cloud whole or not at all. Raises ExportError if it is empty."""
    if not len(cloud.means):
        raise ExportError(f"{path}: there are no Gaussians to write")
    unit = torch.nn.functional.normalize(cloud.quats_wxyz, dim=-1)
    columns = [
        cloud.means,
        torch.zeros_like(cloud.means),
        (cloud.color - 0.5) / SH_DC,
        torch.logit(cloud.opacity.clamp(*_OPACITY_RANGE))[:, None],
        cloud.scales.log(),
        unit,
    ]
    table = torch.cat([column.detach().cpu().double() for column in columns], 1).numpy().astype("<f4")
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    header += [f"property float {name}" for name in _FIELDS] + ["end_header", ""]
    write_atomic(path, "\n".join(header).encode("ascii") + table.tobytes())


def read_splat_ply(path: Path) -> GaussianCloud:
    """Read a 3DGS .ply; spherical harmonics beyond the constant are ignored.

    Raises InputError if the file is missing, damaged, or not such a file.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error
    head, mark, body = raw.partition(b"end_header\n")
    lines = head.decode("ascii", "replace").split("\n")
    names = [
        line.split()[2] for line in lines if line.startswith("property float ") and len(line.split()) == 3
    ]
    counts = [line.split()[-1] for line in lines if line.startswith("element vertex ")]
    fits = (
        bool(mark) and "format binary_little_endian 1.0" in lines and len(counts) == 1 and counts[0].isdigit()
    )
    missing = [name for name in _FIELDS if name not in names and not name.startswith("n")]
    if not fits or missing or len(body) != int(counts[0]) * 4 * len(names):
        raise InputError(
            f"{path}: not a whole 3D-Gaussian .ply (binary little-endian float32"
            + (f"; it lacks {', '.join(missing)}" if missing else "")
            + "). Export it again."
        )
    table = torch.from_numpy(np.frombuffer(body, "<f4").reshape(-1, len(names)).astype(np.float32))

    def columns(*wanted: str) -> Tensor:
        return table[:, [names.index(name) for name in wanted]]

    return GaussianCloud(
        means=columns("x", "y", "z"),
        quats_wxyz=columns("rot_0", "rot_1", "rot_2", "rot_3"),
        scales=columns("scale_0", "scale_1", "scale_2").exp(),
        opacity=torch.sigmoid(columns("opacity")[:, 0]),
        color=columns("f_dc_0", "f_dc_1", "f_dc_2") * SH_DC + 0.5,
    )
