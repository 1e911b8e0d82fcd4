"""Unwrapping and baking: texels know their surface point, and no empty texel colours the chart borders."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh

from sds3d.errors import ExportError
from sds3d.interfaces import Material, Scene, Surface
from sds3d.mathx.brdf import bent_normal
from sds3d.mesh.bake import Baked, bake, find_texels
from sds3d.mesh.clean import vertex_normals
from sds3d.mesh.tangents import from_tangent_space, vertex_tangents
from sds3d.mesh.textured import TexturedMesh, sample_texture
from sds3d.mesh.unwrap import unwrap

SIZE = 128


class Painted(Scene):
    """Only a material: any function of the point."""

    def __init__(self, color) -> None:
        super().__init__()
        self.color = color

    def material(self, points):
        ones = torch.ones(len(points), 1)
        return Material(base_color=self.color(points), metallic=0 * ones, roughness=ones)

    def render(self, cameras, shading, rng, *, progress=1.0):
        raise NotImplementedError

    def groups(self):
        return []

    def surface(self, cells_per_side, *, iso_factor=1.0):
        raise NotImplementedError


@pytest.fixture(scope="module")
def parts():
    shape = trimesh.creation.torus(0.6, 0.25, major_sections=32, minor_sections=16)
    surface = Surface(
        vertices=torch.tensor(shape.vertices, dtype=torch.float32),
        faces=torch.tensor(shape.faces, dtype=torch.int64),
    )
    return surface, vertex_normals(surface), unwrap(surface, texture_px=SIZE, padding_px=2)


def baked(parts, color, **options) -> Baked:
    return bake(Painted(color), *parts, texture_px=SIZE, **options)


def test_unwrap_keeps_faces_and_lies_in_the_square(parts):
    surface, _, atlas = parts
    assert torch.equal(atlas.source[atlas.faces], surface.faces)
    assert atlas.uvs.min() >= 0
    assert atlas.uvs.max() <= 1
    assert len(atlas.source) > len(surface.vertices)  # a torus needs cuts
    again = unwrap(surface, texture_px=SIZE, padding_px=2)
    assert torch.equal(again.uvs, atlas.uvs)


def test_texels_are_square_on_the_surface(parts):
    """Edge lengths in the texture over those on the surface: one scale per chart, and the same both ways."""
    surface, _, atlas = parts
    uv, xyz = atlas.uvs[atlas.faces], surface.vertices[surface.faces]
    ratio = (uv - uv.roll(1, 1)).norm(dim=2) / (xyz - xyz.roll(1, 1)).norm(dim=2)
    assert float(ratio.std() / ratio.mean()) < 0.15


def test_charts_do_not_overlap(parts):
    _, _, atlas = parts
    corners = atlas.uvs[atlas.faces].double()
    a, b = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = float((a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).abs().sum() / 2) * SIZE**2
    covered = find_texels(*parts, SIZE).covered.sum()
    assert covered == pytest.approx(area, rel=0.02)


def test_texel_points_lie_on_the_surface(parts):
    texels = find_texels(*parts, SIZE)
    ring = texels.points[:, :2].norm(dim=1) - 0.6
    assert torch.allclose(
        torch.stack([ring, texels.points[:, 2]], 1).norm(dim=1), torch.tensor(0.25), atol=0.012
    )
    outward = torch.nn.functional.normalize(
        torch.cat([texels.points[:, :2] * (ring / (ring + 0.6))[:, None], texels.points[:, 2:]], dim=1), dim=1
    )
    assert (outward * texels.normals).sum(1).min() > 0.95


def test_a_linear_colour_is_reproduced_everywhere_even_at_seams(parts):
    """Colour = position: the texture looked up at any point of any face must give that point back."""
    surface, _, atlas = parts
    texture = baked(parts, lambda p: p / 2 + 0.5).base_color
    weights = torch.rand(len(atlas.faces), 3, 1, generator=torch.Generator().manual_seed(0))
    weights = weights / weights.sum(1, keepdim=True)
    found = sample_texture(texture, (atlas.uvs[atlas.faces] * weights).sum(1)) * 2 - 1
    error = (found - (surface.vertices[surface.faces] * weights).sum(1)).norm(dim=1)
    assert error.mean() < 0.012
    assert error.max() < 0.06  # within about one texel (0.025 m) of extrapolation at chart borders


def test_no_empty_texel_shows_at_mip_level_3(parts):
    """Each texel of level 3 averages 8 x 8; a one-colour object must stay that colour at every level."""
    texture = baked(parts, lambda p: torch.tensor([0.8, 0.2, 0.4]).expand(len(p), 3)).base_color.float()
    covered = find_texels(*parts, SIZE).covered
    assert not covered.all()  # otherwise the test says nothing
    for level in (1, 2, 3, 4):
        mip = torch.nn.functional.avg_pool2d(texture.permute(2, 0, 1)[None], 2**level)
        assert torch.equal(mip, torch.tensor([204.0, 51.0, 102.0])[None, :, None, None].expand_as(mip))


def test_empty_texels_copy_their_nearest_neighbour(parts):
    texture = baked(parts, lambda p: p / 2 + 0.5).base_color.numpy()
    covered = find_texels(*parts, SIZE).covered
    known = np.argwhere(covered)
    for texel in np.argwhere(~covered)[::97]:
        distance = ((known - texel) ** 2).sum(1)
        nearest = known[distance == distance.min()]
        assert any((texture[tuple(texel)] == texture[tuple(other)]).all() for other in nearest)


def test_inward_samples_are_averaged(parts):
    def depth(points):
        ring = points[:, :2].norm(dim=1) - 0.6
        below = 0.25 - torch.stack([ring, points[:, 2]], 1).norm(dim=1)
        return (below[:, None] * 5).expand(-1, 3)

    texture = baked(parts, depth, inward_m=(0.0, 0.1)).base_color.float() / 255
    assert torch.allclose(texture.mean(), torch.tensor(0.25), atol=0.03)  # mean of depths 0 and 0.1, times 5


def test_non_finite_colours_are_reported_with_their_count(parts):
    with pytest.raises(ExportError, match=r"not finite at \d+ of \d+ texels"):
        baked(parts, lambda p: torch.where(p[:, :1] > 0.5, torch.tensor(torch.nan), p))


def test_a_surface_without_faces_is_refused():
    nothing = Surface(vertices=torch.zeros(0, 3), faces=torch.zeros(0, 3, dtype=torch.int64))
    with pytest.raises(ExportError, match="no faces"):
        unwrap(nothing, texture_px=SIZE, padding_px=2)


def test_bumps_of_the_material_are_in_the_normal_texture(parts):
    """Decoded as a shader does it, the texture gives back the bent normal."""
    surface, normals, atlas = parts
    bump = torch.tensor([0.1, 0.3, -0.2])

    class Bumpy(Painted):
        def material(self, points):
            return replace(super().material(points), bump=bump.expand(len(points), 3))

    mesh = TexturedMesh(
        vertices=surface.vertices[atlas.source],
        faces=atlas.faces,
        normals=normals[atlas.source],
        uvs=atlas.uvs,
    )
    tangents = vertex_tangents(mesh)
    options = {"texture_px": SIZE, "fine": surface, "tangents": tangents}
    flat, bent = (bake(kind(lambda p: 0 * p), *parts, **options).normal for kind in (Painted, Bumpy))
    texels = find_texels(*parts, SIZE)
    covered = torch.from_numpy(texels.covered)
    frame = texels.interpolate(mesh.normals, atlas.faces), texels.interpolate(tangents, atlas.faces)
    found, plain = (from_tangent_space(image[covered] / 127.5 - 1.0, *frame) for image in (bent, flat))
    expected = bent_normal(plain, bump.expand_as(plain))
    assert (found * expected).sum(1).median() > 0.999
    assert (found * plain).sum(1).median() < 0.98


def mip(texture: torch.Tensor, level: int) -> torch.Tensor:
    """A smaller version of an (H, W, 3) picture by averaging 2 x 2 texels `level` times, values in [0, 1]."""
    image = texture.permute(2, 0, 1)[None].float() / 255.0
    return torch.nn.functional.avg_pool2d(image, 2**level)


def seen_on_surface(image: torch.Tensor, atlas, per_face: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear values of a picture at points all over the surface, corners and chart borders too; and the weights."""
    drawn = torch.rand(per_face, 3, generator=torch.Generator().manual_seed(1)) ** 3 + 1e-6
    weights = torch.cat([torch.eye(3), drawn / drawn.sum(1, keepdim=True)])
    uvs = torch.einsum("kc,fcd->fkd", weights, atlas.uvs[atlas.faces])
    found = torch.nn.functional.grid_sample(
        image, uvs[None] * 2.0 - 1.0, padding_mode="border", align_corners=False
    )
    return found[0].permute(1, 2, 0), weights


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_no_background_is_seen_on_the_surface_at_any_mip_level(parts, level):
    """Colours without blue, shine without red: what the surface reads has none either, however small the mip."""
    _, _, atlas = parts

    class Shiny(Painted):
        def material(self, points):
            x = points[:, :1] / 2 + 0.5
            return Material(
                base_color=torch.cat([x, 1 - x, 0 * x], 1), metallic=1 - 0.5 * x, roughness=0.5 + 0.5 * x
            )

    made = bake(Shiny(None), *parts, texture_px=SIZE)
    color, _ = seen_on_surface(mip(made.base_color, level), atlas)
    assert color[..., 2].max() == 0.0
    assert (
        color.sum(-1) - 1.0
    ).abs().max() < 0.01  # red + green = 1 everywhere on the object, and nowhere else
    shine, _ = seen_on_surface(mip(made.metallic_roughness, level), atlas)
    assert shine[..., 1:].min() > 0.49


def test_the_background_would_be_noticed(parts):
    """Guards the test above: with an unfilled background the surface reads it, from mip level 0 on."""
    _, _, atlas = parts
    covered = torch.from_numpy(find_texels(*parts, SIZE).covered)
    filled = baked(parts, lambda p: torch.tensor([1.0, 0.5, 0.0]).expand(len(p), 3)).base_color
    canary = torch.where(covered[..., None], filled, torch.tensor([255, 0, 255], dtype=torch.uint8))
    blue = [seen_on_surface(mip(canary, level), atlas)[0][..., 2].mean() for level in (0, 1, 2, 3)]
    assert blue[0] > 0.001
    assert blue == sorted(blue)


def test_at_mip_level_3_the_surface_still_has_its_colours(parts):
    """Colour = position: how far the colours of a texel 8 texels wide are off, neighbouring charts included."""
    surface, _, atlas = parts
    texture = baked(parts, lambda p: p / 2 + 0.5).base_color
    found, weights = seen_on_surface(mip(texture, 3), atlas)
    true = torch.einsum("kc,fcd->fkd", weights, surface.vertices[surface.faces])
    uv, xyz = atlas.uvs[atlas.faces], surface.vertices[surface.faces]
    texel_m = float(((xyz - xyz.roll(1, 1)).norm(dim=2) / (uv - uv.roll(1, 1)).norm(dim=2)).mean()) / SIZE
    error = (2 * found - 1 - true).norm(dim=-1)
    assert error.mean() < 0.5 * 8 * texel_m
    assert error.flatten().quantile(0.99) < 2 * 8 * texel_m  # bilinear reads reach over two of its texels
