"""The iso value is the one whose surface looks like the scene."""

import pytest
import torch
import trimesh

from sds3d.cameras.orbit import turntable_cameras
from sds3d.interfaces import Material, Render, Scene, Surface
from sds3d.mesh.fit_iso import FACTORS, fitted_surface, see, see_surface
from sds3d.ops.volume import camera_rays

COLOR = torch.tensor([0.8, 0.2, 0.1])
VIEWS = turntable_cameras(3, 64)


class Ball(Scene):
    """Looks like a ball of radius 0.5 m; its surface has that radius only at the factor `right`."""

    def __init__(self, right: float) -> None:
        super().__init__()
        self.right = right
        self.dummy = torch.nn.Parameter(torch.zeros(1))

    def render(self, cameras, shading, rng, *, progress=1.0):
        origins, directions, _ = camera_rays(
            cameras.c2w, cameras.intrinsics, cameras.width_px, cameras.height_px
        )
        along = (origins * directions).sum(-1)
        hit = (along.square() - origins.square().sum(-1) + 0.25 > 0)[:, None].float()
        rgb = hit * COLOR[None, :, None, None] + (1 - hit) * shading.background[:, :, None, None]
        return Render(rgb=rgb, alpha=hit, depth=hit * 2.8)

    def groups(self):
        return []

    def surface(self, cells_per_side, *, iso_factor=1.0):
        ball = trimesh.creation.icosphere(subdivisions=4, radius=0.5 * (self.right / iso_factor) ** 0.3)
        return Surface(
            vertices=torch.tensor(ball.vertices, dtype=torch.float32), faces=torch.tensor(ball.faces.copy())
        )

    def material(self, points):
        one = torch.ones(len(points), 1)
        return Material(base_color=COLOR.expand(len(points), 3), metallic=0 * one, roughness=one)


@pytest.mark.parametrize("right", FACTORS)
def test_the_factor_whose_surface_looks_right_is_found(right: float) -> None:
    surface = fitted_surface(Ball(right), 32, [VIEWS])
    assert surface.vertices.norm(dim=1).max() == pytest.approx(0.5, abs=1e-4)


def test_the_right_surface_shows_what_the_scene_shows() -> None:
    scene = Ball(1.0)
    seen, shown = see(scene, VIEWS), see_surface(scene, scene.surface(32), VIEWS)
    differs = (seen - shown).abs().amax(1) > 1e-5
    assert differs.float().mean() < 0.02  # pixels on the outline, where a mesh has corners
    wrong = see_surface(scene, scene.surface(32, iso_factor=0.5), VIEWS)
    assert (seen - wrong).square().mean() > 5 * (seen - shown).square().mean()
