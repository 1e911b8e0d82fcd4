"""Files of 3D Gaussians: the table of formats, their encoders and decoders.

Encoders take the package's world frame and turn it where a format's viewers expect other axes:

    ply, splat   +y down, +z away (as captures of the 3DGS reference implementation are shown): turned about x
    spz          right, up, back: as our world
    splat-glb    glTF: as our world
"""

import gzip
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from sds3d.errors import ConfigError, InputError
from sds3d.mathx.color import to_linear
from sds3d.mathx.harmonics import SH_DC
from sds3d.mesh.gltf import GENERATOR, GlbWriter, read_glb_chunks
from sds3d.mesh.splat_cloud import GaussianCloud, flipped, written
from sds3d.mesh.splat_ply import decode_ply, encode_ply

Metadata = Mapping[str, object]
EXTENSION = "KHR_gaussian_splatting"


def encode_splat(cloud: GaussianCloud) -> bytes:
    """The 32-byte rows of antimatter15's web viewer: position, scale (float32), RGBA, rotation (bytes).

    Largest and most opaque first, so that a viewer that shows a file while it loads shows the gist first.
    """
    cloud = flipped(written(cloud))
    weight = cloud.scales.double().prod(-1) * cloud.opacity
    order = torch.argsort(weight, descending=True, stable=True)
    rows = np.zeros(len(cloud), _SPLAT_ROW)
    rows["position"], rows["scale"] = cloud.means[order].numpy(), cloud.scales[order].numpy()
    rgba = torch.cat([cloud.color, cloud.opacity[:, None]], dim=1)[order]
    rows["rgba"] = _bytes(rgba.numpy() * 255.0)
    rows["rotation"] = _bytes(cloud.quats_wxyz[order].numpy() * 128.0 + 128.0)
    return rows.tobytes()


_SPLAT_ROW = np.dtype([("position", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("rotation", "u1", 4)])


def decode_splat(data: bytes, where: str) -> GaussianCloud:
    """Rows of a .splat file; InputError where it is cut."""
    if not data or len(data) % _SPLAT_ROW.itemsize:
        raise InputError(f"{where}: not a whole .splat file (rows of {_SPLAT_ROW.itemsize} bytes)")
    rows = np.frombuffer(data, _SPLAT_ROW)
    rgba = torch.from_numpy(rows["rgba"].astype(np.float32) / 255.0)
    cloud = GaussianCloud(
        means=torch.from_numpy(rows["position"].copy()),
        quats_wxyz=torch.from_numpy((rows["rotation"].astype(np.float32) - 128.0) / 128.0),
        scales=torch.from_numpy(rows["scale"].copy()),
        opacity=rgba[:, 3],
        color=rgba[:, :3].contiguous(),
    )
    return flipped(cloud.on_cpu())


SPZ_MAGIC, SPZ_VERSION, SPZ_COLOR_SCALE = 0x5053474E, 2, 0.15


def encode_spz(cloud: GaussianCloud) -> bytes:
    """Niantic's .spz, version 2: 24-bit positions, 8-bit everything else, gzipped; column by column.

    The number of fractional bits is the largest with which all positions fit into 24 bits (at most 12, as usual).
    """
    cloud = written(cloud)
    reach = float(cloud.means.abs().max())
    bits = max(0, min(12, 22 - max(0, int(np.ceil(np.log2(max(reach, 1e-9)))))))
    fixed = np.rint(cloud.means.double().numpy() * (1 << bits)).astype("<i4")
    positions = fixed.view(np.uint8).reshape(len(cloud), 3, 4)[:, :, :3]
    q = cloud.quats_wxyz * torch.where(cloud.quats_wxyz[:, :1] < 0, -1.0, 1.0)  # w >= 0 is not stored
    columns = [
        np.ascontiguousarray(positions),
        _bytes(cloud.opacity.numpy() * 255.0),
        _bytes(((cloud.color - 0.5) / SH_DC * SPZ_COLOR_SCALE + 0.5).numpy() * 255.0),
        _bytes((cloud.scales.double().log().numpy() + 10.0) * 16.0),
        _bytes(q[:, 1:].numpy() * 127.5 + 127.5),
    ]
    header = struct.pack("<IIIBBBB", SPZ_MAGIC, SPZ_VERSION, len(cloud), 0, bits, 0, 0)
    return gzip.compress(header + b"".join(column.tobytes() for column in columns), mtime=0)


def decode_spz(data: bytes, where: str) -> GaussianCloud:
    """A version 2 file without higher spherical harmonics; InputError for anything else."""
    try:
        raw = gzip.decompress(data)
        magic, version, count, degree, bits, _, _ = struct.unpack_from("<IIIBBBB", raw)
    except (OSError, EOFError, struct.error) as error:
        raise InputError(f"{where}: not a .spz file ({error})") from error
    if magic != SPZ_MAGIC or version != SPZ_VERSION or degree != 0 or len(raw) != 16 + 19 * count:
        raise InputError(f"{where}: not a whole version 2 .spz file with plain colours")
    widths, at, parts = (9, 1, 3, 3, 3), 16, []
    for width in widths:
        parts.append(np.frombuffer(raw, np.uint8, count * width, at).reshape(count, width))
        at += count * width
    low = parts[0].reshape(count, 3, 3).astype(np.int32)
    fixed = low[:, :, 0] | low[:, :, 1] << 8 | low[:, :, 2] << 16
    fixed = np.where(fixed >= 1 << 23, fixed - (1 << 24), fixed)
    opacity, color, scale, turn = (torch.from_numpy(part.astype(np.float32)) for part in parts[1:])
    xyz = turn / 127.5 - 1.0
    w = (1.0 - xyz.square().sum(-1, keepdim=True)).clamp(min=0.0).sqrt()
    return GaussianCloud(
        means=torch.from_numpy((fixed / (1 << bits)).astype(np.float32)),
        quats_wxyz=torch.cat([w, xyz], dim=1),
        scales=(scale / 16.0 - 10.0).exp(),
        opacity=opacity[:, 0] / 255.0,
        color=(color / 255.0 - 0.5) / SPZ_COLOR_SCALE * SH_DC + 0.5,
    ).on_cpu()


def encode_splat_glb(cloud: GaussianCloud, metadata: Metadata | None = None) -> bytes:
    """A GLB with the extension KHR_gaussian_splatting; readers without it show coloured points."""
    cloud = written(cloud)
    writer = GlbWriter()
    means = cloud.means.numpy().astype("<f4")
    linear = to_linear(cloud.color)
    fallback = torch.cat([linear, cloud.opacity[:, None]], dim=1).clamp(0.0, 1.0)
    xyzw = cloud.quats_wxyz[:, [1, 2, 3, 0]]
    attributes = {
        "POSITION": writer.floats(means, bounds=True),
        "COLOR_0": writer.floats(fallback.numpy()),
        f"{EXTENSION}:ROTATION": writer.floats(xyzw.numpy()),
        f"{EXTENSION}:SCALE": writer.floats(_scale_column(cloud)),
        f"{EXTENSION}:OPACITY": writer.floats(cloud.opacity.clamp(0.0, 1.0).numpy()[:, None]),
        f"{EXTENSION}:SH_DEGREE_0_COEF_0": writer.floats(((cloud.color - 0.5) / SH_DC).numpy()),
    }
    kind = {
        "kernel": "ellipse",
        "colorSpace": "srgb_rec709_display",
        "projection": "perspective",
        "sortingMethod": "cameraDistance",
    }
    primitive = {"attributes": attributes, "mode": 0, "extensions": {EXTENSION: kind}}
    return writer.finish(
        {
            "asset": {"version": "2.0", "generator": GENERATOR, "extras": dict(metadata or {})},
            "extensionsUsed": [EXTENSION],
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [{"name": "splats", "mesh": 0}],
            "meshes": [{"name": "splats", "primitives": [primitive]}],
        }
    )


def _scale_column(cloud: GaussianCloud) -> np.ndarray:
    """Linear scales, as the ratified text of the extension has them (its drafts had logarithms)."""
    return cloud.scales.numpy()


def decode_splat_glb(data: bytes, where: str) -> GaussianCloud:
    """A GLB written by `encode_splat_glb`; InputError for anything else."""
    try:
        tree, body = read_glb_chunks(data)
        attributes = tree["meshes"][0]["primitives"][0]["attributes"]

        def column(name: str) -> torch.Tensor:
            accessor = tree["accessors"][attributes[name]]
            width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor["type"]]
            view = tree["bufferViews"][accessor["bufferView"]]
            flat = np.frombuffer(body, "<f4", accessor["count"] * width, view["byteOffset"])
            return torch.from_numpy(flat.reshape(-1, width).astype(np.float32))

        return GaussianCloud(
            means=column("POSITION"),
            quats_wxyz=column(f"{EXTENSION}:ROTATION")[:, [3, 0, 1, 2]],
            scales=column(f"{EXTENSION}:SCALE"),
            opacity=column(f"{EXTENSION}:OPACITY")[:, 0],
            color=column(f"{EXTENSION}:SH_DEGREE_0_COEF_0") * SH_DC + 0.5,
        )
    except (KeyError, IndexError, ValueError, TypeError, struct.error, json.JSONDecodeError) as error:
        raise InputError(f"{where}: not a GLB with {EXTENSION} ({type(error).__name__}: {error})") from error


SPLAT_ENCODERS: dict[str, Callable[[GaussianCloud], bytes]] = {
    "ply": encode_ply,  # the standard 3DGS fields, full precision
    "splat": encode_splat,  # 32 bytes each
    "spz": encode_spz,  # about a tenth of the .ply
    "glb": encode_splat_glb,  # glTF with KHR_gaussian_splatting
}
SPLAT_DECODERS: dict[str, Callable[[bytes, str], GaussianCloud]] = {
    "ply": decode_ply,
    "splat": decode_splat,
    "spz": decode_spz,
    "glb": decode_splat_glb,
}


def check_splat_formats(formats: tuple[str, ...]) -> None:
    """Raise ConfigError unless all formats are known."""
    unknown = [name for name in formats if name not in SPLAT_ENCODERS]
    if unknown:
        raise ConfigError(
            f"splat formats: unknown format {unknown[0]!r}; known formats: {', '.join(SPLAT_ENCODERS)}"
        )


def read_splats(path: Path) -> GaussianCloud:
    """A splat file of any known format, by its ending. Raises InputError if it cannot be read."""
    kind = path.suffix.lower().lstrip(".")
    if kind not in SPLAT_DECODERS:
        raise InputError(f"{path}: unknown splat format; known endings: .ply, .splat, .spz, .glb")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error
    return SPLAT_DECODERS[kind](data, str(path))


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
