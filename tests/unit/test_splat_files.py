"""Files of 3D Gaussians: fields, axes, precision, round trips, refusals."""

import gzip
import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from sds3d.errors import ConfigError, ExportError, InputError
from sds3d.mathx.harmonics import SH_DC
from sds3d.mesh.gltf import read_glb_chunks
from sds3d.mesh.splat_cloud import GaussianCloud, flipped
from sds3d.mesh.splat_files import SPLAT_DECODERS, SPLAT_ENCODERS, check_splat_formats, read_splats
from sds3d.rng import Stream

# Largest error of each quantity after a round trip: (metres, relative scale, opacity, colour, 1 - |<q, q'>|).
PRECISION = {
    "ply": (1e-6, 1e-5, 1e-6, 1e-6, 1e-6),
    "glb": (1e-6, 1e-6, 1e-6, 1e-6, 1e-6),
    "splat": (1e-6, 1e-6, 0.5 / 255, 0.5 / 255, 1e-4),
    "spz": (0.5 / 4096, 0.5 / 16 + 1e-3, 0.5 / 255, 0.5 / 255 / 0.15 * SH_DC, 2e-3),  # w is not stored
}


def cloud(count: int = 40, seed: int = 0) -> GaussianCloud:
    stream = Stream(seed, "cloud")
    return GaussianCloud(
        means=stream.fork("m").normal(count, 3),
        quats_wxyz=3.0 * stream.fork("q").normal(count, 4),
        scales=0.01 + 0.2 * stream.fork("s").uniform(count, 3),
        opacity=0.02 + 0.96 * stream.fork("o").uniform(count),
        color=stream.fork("c").uniform(count, 3),
    )


def rotations(quats: torch.Tensor) -> torch.Tensor:
    w, x, y, z = normalize(quats, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def covariances(made: GaussianCloud) -> torch.Tensor:
    turned = rotations(made.quats_wxyz) * made.scales[:, None, :]
    return turned @ turned.transpose(1, 2)


def by_place(made: GaussianCloud) -> GaussianCloud:
    """Sorted by x: some formats reorder."""
    order = made.means[:, 0].argsort()
    return made.take(order)


@pytest.mark.parametrize("kind", sorted(SPLAT_ENCODERS))
def test_round_trip_within_the_precision_of_the_format(kind: str) -> None:
    before = by_place(cloud())
    after = by_place(SPLAT_DECODERS[kind](SPLAT_ENCODERS[kind](cloud()), "file"))
    metres, scale, opacity, color, turn = PRECISION[kind]
    assert (after.means - before.means).abs().max() <= metres * 1.01
    assert (after.scales / before.scales).log().abs().max() <= scale * 1.01
    assert (after.opacity - before.opacity).abs().max() <= opacity * 1.01
    assert (after.color - before.color).abs().max() <= color * 1.01
    agreement = (normalize(before.quats_wxyz, dim=-1) * after.quats_wxyz).sum(-1).abs()
    assert (1.0 - agreement).max() <= turn


def test_turning_by_half_about_x_turns_means_and_covariances_and_undoes_itself() -> None:
    made, turned = cloud(), flipped(cloud())
    half = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(turned.means, made.means @ half)
    torch.testing.assert_close(covariances(turned), half @ covariances(made) @ half, rtol=1e-4, atol=1e-6)
    back = flipped(turned)
    torch.testing.assert_close(back.means, made.means)
    torch.testing.assert_close(back.quats_wxyz, -made.quats_wxyz)


def test_every_format_writes_its_own_axes() -> None:
    """One Gaussian above, in front and to the right: where does it end up in each file?"""
    one = GaussianCloud(
        means=torch.tensor([[0.5, 1.0, 2.0]]),
        quats_wxyz=torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        scales=torch.full((1, 3), 0.1),
        opacity=torch.tensor([0.5]),
        color=torch.full((1, 3), 0.5),
    )
    ply = trimesh.load(trimesh.util.wrap_as_stream(SPLAT_ENCODERS["ply"](one)), file_type="ply")
    np.testing.assert_allclose(ply.vertices, [[0.5, -1.0, -2.0]])
    splat = np.frombuffer(SPLAT_ENCODERS["splat"](one)[:12], "<f4")
    np.testing.assert_allclose(splat, [0.5, -1.0, -2.0])
    spz = gzip.decompress(SPLAT_ENCODERS["spz"](one))
    places = [int.from_bytes(spz[16 + 3 * i : 19 + 3 * i], "little", signed=True) / 4096 for i in range(3)]
    np.testing.assert_allclose(places, [0.5, 1.0, 2.0])
    tree, body = read_glb_chunks(SPLAT_ENCODERS["glb"](one))
    np.testing.assert_allclose(np.frombuffer(body[:12], "<f4"), [0.5, 1.0, 2.0])
    assert tree["extensionsUsed"] == ["KHR_gaussian_splatting"]


def test_the_ply_holds_the_standard_fields() -> None:
    made = cloud()
    head, body = SPLAT_ENCODERS["ply"](made).split(b"end_header\n", 1)
    names = [line.split()[-1] for line in head.decode().splitlines() if line.startswith("property")]
    assert names == [
        *["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"],
        *["scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"],
    ]
    assert head.startswith(b"ply\nformat binary_little_endian 1.0\nelement vertex 40\n")
    table = np.frombuffer(body, "<f4").reshape(40, 17)
    np.testing.assert_allclose(table[:, 6:9] * 0.28209479 + 0.5, made.color, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(1 / (1 + np.exp(-table[:, 9])), made.opacity, rtol=1e-4)
    np.testing.assert_allclose(np.exp(table[:, 10:13]), made.scales, rtol=1e-5)


def test_the_glb_says_what_a_reader_without_the_extension_shows() -> None:
    made = cloud()
    tree, _ = read_glb_chunks(SPLAT_ENCODERS["glb"](made))
    (primitive,) = tree["meshes"][0]["primitives"]
    assert primitive["mode"] == 0
    assert {"POSITION", "COLOR_0"} < set(primitive["attributes"])
    assert primitive["extensions"]["KHR_gaussian_splatting"]["kernel"] == "ellipse"


def test_far_positions_lose_fraction_bits_but_never_wrap() -> None:
    far = replace(cloud(), means=cloud().means * 3000.0)
    raw = gzip.decompress(SPLAT_ENCODERS["spz"](far))
    assert raw[13] < 12
    back = SPLAT_DECODERS["spz"](SPLAT_ENCODERS["spz"](far), "file")
    assert (back.means - far.means).abs().max() <= 0.51 / (1 << raw[13])


def test_spz_is_about_a_tenth_of_the_ply() -> None:
    made = cloud(5000)
    assert len(SPLAT_ENCODERS["spz"](made)) < 0.3 * len(SPLAT_ENCODERS["ply"](made))


def test_the_most_visible_gaussian_comes_first_in_a_splat_file() -> None:
    made = replace(cloud(), opacity=torch.linspace(0.1, 0.9, 40), scales=torch.full((40, 3), 0.1))
    assert SPLAT_ENCODERS["splat"](made)[27] == round(0.9 * 255)


@pytest.mark.parametrize("kind", sorted(SPLAT_ENCODERS))
def test_nothing_and_nonsense_are_not_written(kind: str) -> None:
    empty = cloud().take(torch.arange(0))
    with pytest.raises(ExportError, match="no Gaussians"):
        SPLAT_ENCODERS[kind](empty)
    broken = cloud()
    broken.means[3, 1] = math.nan
    with pytest.raises(ExportError, match="1 of 40"):
        SPLAT_ENCODERS[kind](broken)


@pytest.mark.parametrize("kind", sorted(SPLAT_ENCODERS))
@given(cut=st.floats(0.0, 0.999), junk=st.binary(max_size=40))
@settings(max_examples=25, deadline=None)
def test_damaged_files_are_refused_with_their_name(kind: str, cut: float, junk: bytes) -> None:
    whole = SPLAT_ENCODERS[kind](cloud(5))
    for data in (whole[: int(cut * len(whole))], junk):
        if kind == "splat" and data and len(data) % 32 == 0:
            continue
        with pytest.raises(InputError, match="the file"):
            SPLAT_DECODERS[kind](data, "the file")


def test_files_are_read_by_their_ending(tmp_path: Path) -> None:
    for kind, encode in SPLAT_ENCODERS.items():
        (tmp_path / f"splats.{kind}").write_bytes(encode(cloud()))
        assert len(read_splats(tmp_path / f"splats.{kind}")) == 40
    with pytest.raises(InputError, match="unknown splat format"):
        read_splats(tmp_path / "splats.obj")
    with pytest.raises(InputError, match="cannot read"):
        read_splats(tmp_path / "missing.ply")
    with pytest.raises(ConfigError, match=r"unknown format 'sog'; known formats: ply, splat, spz, glb"):
        check_splat_formats(("sog",))


def test_json_of_the_glb_is_strict() -> None:
    data = SPLAT_ENCODERS["glb"](cloud())
    length = struct.unpack_from("<I", data, 12)[0]
    json.loads(data[20 : 20 + length], parse_constant=lambda name: pytest.fail(name))
