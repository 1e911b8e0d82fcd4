"""Image-based light against closed forms: white furnace, constant and cosine skies, mirrors, turns, files."""

import math
import struct
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from sds3d.errors import InputError
from sds3d.mathx.brdf import base_reflectance, ggx, smith_visibility, split_sum, split_sum_table
from sds3d.mathx.color import to_linear, to_srgb
from sds3d.ops.environment import compress, lat_long_directions, make_environment, shade_pbr
from sds3d.ops.skies import SKIES, read_environment, read_hdr, sky
from sds3d.rng import Stream

ROWS = 32


def constant(value: float = 1.0) -> torch.Tensor:
    return torch.full((ROWS, 2 * ROWS, 3), value)


def directions(count: int = 200) -> torch.Tensor:
    return normalize(Stream(0, "d").normal(count, 3), dim=1)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0])
def test_microfacet_normals_project_to_one(alpha: float) -> None:
    """The integral of D(h) n.h over the hemisphere is 1."""
    cosine = (torch.arange(200000, dtype=torch.float64) + 0.5) / 200000
    total = (ggx(cosine, torch.tensor(alpha, dtype=torch.float64)) * cosine).mean() * 2.0 * math.pi
    assert float(total) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(("roughness", "n_dot_v"), [(0.3, 0.7), (0.6, 0.3), (0.9, 0.95)])
def test_the_table_is_the_integral_of_the_brdf(roughness: float, n_dot_v: float) -> None:
    """Uniform quadrature over the hemisphere of lights, f0 = 0.3."""
    f0, alpha = 0.3, torch.tensor(roughness**2, dtype=torch.float64)
    cos_l = (torch.arange(600, dtype=torch.float64) + 0.5) / 600
    phi = (torch.arange(1200, dtype=torch.float64) + 0.5) / 1200 * 2 * math.pi
    cos_l, phi = torch.meshgrid(cos_l, phi, indexing="ij")
    sin_l = (1 - cos_l**2).sqrt()
    light = torch.stack([sin_l * phi.cos(), sin_l * phi.sin(), cos_l], -1)
    view = torch.tensor([math.sqrt(1 - n_dot_v**2), 0.0, n_dot_v], dtype=torch.float64)
    half = normalize(light + view, dim=-1)
    v_dot_h = (half * view).sum(-1)
    fresnel = f0 + (1 - f0) * (1 - v_dot_h) ** 5
    shadowed = smith_visibility(cos_l, torch.full_like(cos_l, n_dot_v), alpha)
    brdf = ggx(half[..., 2].clamp(max=1.0), alpha) * shadowed * fresnel
    expected = float((brdf * cos_l).mean() * 2.0 * math.pi)
    found = split_sum(torch.tensor([[roughness]]), torch.tensor([[n_dot_v]]), torch.full((1, 3), f0))
    assert float(found[0, 0]) == pytest.approx(expected, abs=0.015)


def test_no_surface_sends_back_more_than_it_gets() -> None:
    table = split_sum_table()
    assert (table.sum(0) <= 1.0 + 5e-3).all()  # quadrature
    assert (table >= 0).all()
    smooth = table[:, 1, 8:].sum(0)  # a mirror of reflectance 1
    assert (smooth > 0.97).all()


@pytest.mark.parametrize("roughness", [0.0, 0.35, 1.0])
def test_a_constant_sky_stays_constant_at_every_roughness(roughness: float) -> None:
    light = make_environment(constant(0.7), white=None)
    rough = torch.full((200, 1), roughness)
    torch.testing.assert_close(light.reflection(directions(), rough), torch.full((200, 3), 0.7))
    torch.testing.assert_close(light.diffuse(directions()), torch.full((200, 3), 0.7))


def test_a_matte_surface_under_a_cosine_sky() -> None:
    """L = 1 + y gives irradiance / pi = 1 + (2/3) n.y."""
    towards, _ = lat_long_directions(ROWS)
    radiance = (1.0 + towards[:, 1:2]).expand(-1, 3).reshape(ROWS, 2 * ROWS, 3)
    light = make_environment(radiance, white=None)
    normal = directions()
    expected = (1.0 + 2.0 / 3.0 * normal[:, 1:2]).expand(-1, 3)
    torch.testing.assert_close(light.diffuse(normal), expected, rtol=0, atol=0.01)


def test_a_mirror_shows_the_sky_and_roughness_blurs_it() -> None:
    light = sky("studio")
    towards = directions()
    mirror = light.reflection(towards, torch.zeros(200, 1))
    rough = light.reflection(towards, torch.ones(200, 1))
    assert mirror.std(0).mean() > 2.0 * rough.std(0).mean()
    spot = torch.tensor(
        [
            [
                math.sin(math.radians(-40)) * math.cos(math.radians(45)),
                math.sin(math.radians(45)),
                math.cos(math.radians(-40)) * math.cos(math.radians(45)),
            ]
        ]
    )
    assert light.reflection(spot, torch.zeros(1, 1)).mean() >= mirror.max() * 0.9


def test_directions_of_a_map_read_back_what_stands_there() -> None:
    """One bright texel per quadrant: looked up in its direction, it is found there, also across the seam."""
    towards, area = lat_long_directions(ROWS)
    assert float(area.sum()) == pytest.approx(4.0 * math.pi, rel=1e-5)
    for column in (0, 15, 33, 63):
        radiance = torch.zeros(ROWS, 2 * ROWS, 3)
        radiance[16, column] = 1.0
        light = make_environment(radiance, white=None)
        seen = light.reflection(towards, torch.zeros(len(towards), 1))[:, 0]
        assert int(seen.argmax()) == 16 * 2 * ROWS + column


def test_turning_the_light_turns_what_is_seen() -> None:
    light = sky("sunset")
    towards = directions()
    angle = math.radians(50.0)
    turn = torch.tensor(
        [[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]]
    )
    rough = torch.full((200, 1), 0.4)
    turned = light.reflection(towards @ turn.T, rough, turn_deg=50.0)
    torch.testing.assert_close(turned, light.reflection(towards, rough), rtol=1e-3, atol=2e-3)


def test_white_furnace() -> None:
    """Under a white sky a white matte surface and a white mirror vanish, and nothing is brighter than the sky."""
    light = make_environment(constant(0.5), white=None)
    normal = directions()
    eye = normalize(normal + 0.5 * directions().flip(0), dim=1)
    white, ones = torch.ones(200, 3), torch.ones(200, 1)
    for metallic in (0.0, 1.0):
        for roughness in (0.05, 0.5, 1.0):
            seen = to_linear(shade_pbr(light, white, metallic * ones, roughness * ones, normal, eye))
            assert seen.max() <= 0.5 + 1e-3
            if metallic == 0.0 or roughness < 0.1:
                assert seen.min() > 0.48


def test_metals_have_no_diffuse_part() -> None:
    diffuse, f0 = base_reflectance(torch.tensor([[0.9, 0.5, 0.1]] * 2), torch.tensor([[0.0], [1.0]]))
    torch.testing.assert_close(diffuse, torch.tensor([[0.9, 0.5, 0.1], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(f0, torch.tensor([[0.04, 0.04, 0.04], [0.9, 0.5, 0.1]]))


def test_shading_is_differentiable_in_everything() -> None:
    light = sky("studio")
    parts = {
        "base": torch.full((4, 3), 0.6),
        "metallic": torch.full((4, 1), 0.4),
        "roughness": torch.full((4, 1), 0.45),
        "normal": normalize(torch.tensor([[0.1, 0.3, 1.0]] * 4), dim=1),
    }
    for part in parts.values():
        part.requires_grad_()
    eye = normalize(torch.tensor([[0.4, 0.1, 1.0]] * 4), dim=1)
    shade_pbr(light, *parts.values(), eye).sum().backward()
    for name, part in parts.items():
        assert torch.isfinite(part.grad).all(), name
        assert part.grad.abs().max() > 1e-4, name


def test_compression_is_smooth_monotone_and_bounded() -> None:
    light = torch.linspace(0.0, 20.0, 2001, dtype=torch.float64, requires_grad=True)
    shown = compress(light.expand(3, -1).T)[:, 0]
    (slope,) = torch.autograd.grad(shown.sum(), light)
    assert (shown < 1.0).all()
    assert (slope > 0.0).all()
    assert slope.diff().abs().max() < 0.12
    torch.testing.assert_close(shown[:80], light[:80])


def test_transfer_functions_are_inverse() -> None:
    values = torch.linspace(0.0, 1.0, 1001, dtype=torch.float64)
    torch.testing.assert_close(to_srgb(to_linear(values)), values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(SKIES))
def test_every_sky_lights_a_white_ball_alike(name: str) -> None:
    """Scaled to the same mean, so that relighting does not change the exposure."""
    mean = sky(name).diffuse(directions(4000)).mean()
    assert 0.6 < float(mean) < 1.0


def hdr_bytes(rgbe: list[list[tuple[int, int, int, int]]], *, coded: bool) -> bytes:
    height, width = len(rgbe), len(rgbe[0])
    head = f"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y {height} +X {width}\n".encode()
    if not coded:
        return head + b"".join(bytes(pixel) for row in rgbe for pixel in row)
    body = b""
    for row in rgbe:
        body += bytes([2, 2]) + struct.pack(">H", width)
        for channel in range(4):
            values = [pixel[channel] for pixel in row]
            body += bytes([128 + 4, values[0]]) if len(set(values[:4])) == 1 else bytes([4, *values[:4]])
            body += bytes([len(values) - 4, *values[4:]])
    return head + body


@pytest.mark.parametrize("coded", [False, True])
def test_hdr_pictures_are_read(tmp_path: Path, coded: bool) -> None:
    row = [(128, 64, 0, 129)] * 4 + [(255, k, 3, 130) for k in range(4)]
    path = tmp_path / "sky.hdr"
    path.write_bytes(hdr_bytes([row, row[::-1], row, row], coded=coded))
    light = read_hdr(path)
    assert light.shape == (4, 8, 3)
    torch.testing.assert_close(light[0, 0], torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(light[0, 4], torch.tensor([255.0, 0.0, 3.0]) / 64.0)
    assert read_environment(str(path)).specular.shape[2] == 6


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.hdr", b"nothing", "not a Radiance"),
        ("a.hdr", hdr_bytes([[(1, 1, 1, 128)] * 16] * 8, coded=False)[:-5], "cut off"),
        ("a.hdr", hdr_bytes([[(1, 1, 1, 128)] * 16] * 8, coded=True)[:-5], "cut off"),
        ("a.hdr", hdr_bytes([[(1, 1, 1, 128)] * 8] * 8, coded=True), "twice as wide"),
        ("a.hdr", hdr_bytes([[(0, 0, 0, 0)] * 16] * 8, coded=True), "some light"),
        ("a.png", b"nothing", "cannot be read"),
    ],
)
def test_bad_environments_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_environment(str(tmp_path / name))


def test_unknown_environments_name_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="studio, sunset, noon"):
        read_environment("studioo")
    with pytest.raises(InputError, match="cannot read"):
        read_environment(str(tmp_path / "missing.hdr"))
