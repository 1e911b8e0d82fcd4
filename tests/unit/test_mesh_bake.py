"""Unwrapping and baking: texels know their surface point, and no empty texel colours the chart borders."""

import numpy as np
import pytest
import torch
import trimesh

from sds3d.errors import ExportError
from sds3d.interfaces import Material, Scene, Surface
from sds3d.mesh.bake import Baked, bake, find_texels
from sds3d.mesh.clean import vertex_normals
from sds3d.mesh.textured import sample_texture
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
