"""3D Gaussians as a .ply that splat viewers read: the fields and encodings of the 3DGS reference implementation.

x y z, nx ny nz (zero), f_dc_0..2 = (colour - 1/2) / 0.2821, opacity as logit, scale_0..2 as logarithms, rot_0..3 =
w x y z; binary little-endian float32. Viewers take such files for a capture in camera-like axes (+y down), so the
cloud is turned when it is written and turned back when it is read.
"""

import numpy as np
import torch
from torch import Tensor

from sds3d.errors import InputError
from sds3d.mathx.harmonics import COUNTS, SH_DC
from sds3d.mesh.splat_cloud import GaussianCloud, flipped, written

_OPACITY_RANGE = (1e-6, 1.0 - 1e-6)
_FIELDS = (
    *("x", "y", "z", "nx", "ny", "nz"),
    *("f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
)


def encode_ply(cloud: GaussianCloud) -> bytes:
    """File contents. Raises ExportError if the cloud is empty or not finite."""
    cloud = flipped(written(cloud))
    columns = [
        cloud.means,
        torch.zeros_like(cloud.means),
        (cloud.color - 0.5) / SH_DC,
        torch.logit(cloud.opacity.double().clamp(*_OPACITY_RANGE))[:, None],
        cloud.scales.double().log(),
        cloud.quats_wxyz,
    ]
    table = torch.cat([column.double() for column in columns], 1).numpy().astype("<f4")
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    header += [f"property float {name}" for name in _FIELDS] + ["end_header", ""]
    return "\n".join(header).encode("ascii") + table.tobytes()


def decode_ply(raw: bytes, where: str) -> GaussianCloud:
    """The cloud of a 3DGS .ply, with its spherical harmonics (f_rest_*: all of red, then green, then blue).

    Raises InputError if the contents are damaged, or not such a file.
    """
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
            f"{where}: not a whole 3D-Gaussian .ply (binary little-endian float32"
            + (f"; it lacks {', '.join(missing)}" if missing else "")
            + "). Export it again."
        )
    table = torch.from_numpy(np.frombuffer(body, "<f4").reshape(-1, len(names)).astype(np.float32))

    def columns(*wanted: str) -> Tensor:
        return table[:, [names.index(name) for name in wanted]]

    rest = sum(name.startswith("f_rest_") for name in names)
    if rest not in {3 * count for count in COUNTS.values()}:
        raise InputError(
            f"{where}: got {rest} values f_rest_*, expected 0, 9, 24 or 45 (harmonics of degree 0 to 3)"
        )
    wanted = [f"f_rest_{i}" for i in range(rest)]
    harmonics = columns(*wanted).reshape(-1, 3, rest // 3).transpose(1, 2).contiguous() if rest else None
    cloud = GaussianCloud(
        means=columns("x", "y", "z"),
        quats_wxyz=columns("rot_0", "rot_1", "rot_2", "rot_3"),
        scales=columns("scale_0", "scale_1", "scale_2").exp(),
        opacity=torch.sigmoid(columns("opacity")[:, 0]),
        color=columns("f_dc_0", "f_dc_1", "f_dc_2") * SH_DC + 0.5,
        harmonics=harmonics,
    )
    return flipped(cloud)
