"""What a coarse mesh cannot hold itself: normals of the fine surface behind it, and how much sky each point sees."""

import math

import torch
from jaxtyping import Float
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn import functional

from sds3d.interfaces import Cameras, Surface
from sds3d.mesh.clean import vertex_normals
from sds3d.ops.raster import project, rasterize_mesh

NEIGHBOURS = 4  # fine vertices that a texel's normal is averaged over
FACING = 0.2  # a fine normal at a larger angle than this cosine to the coarse one belongs to another wall
FAR_RADII = 40.0  # distance of the nearly parallel cameras that stand for directions, in object radii
SHADOW_PX, BIAS = 192, 0.012  # depth maps of the occlusion, and the depth error they forgive, in object radii


def fine_normals(
    fine: Surface, points: Float[Tensor, "n 3"], normals: Float[Tensor, "n 3"]
) -> Float[Tensor, "n 3"]:
    """Unit normals of the surface `fine` nearest to `points` of a coarse one with unit `normals`.

    Where the nearest vertices look another way (the far side of a thin wall) the coarse normal stays.
    """
    known = vertex_normals(fine)
    tree = cKDTree(fine.vertices.double().numpy())
    distance, index = tree.query(points.double().numpy(), k=min(NEIGHBOURS, len(known)), workers=-1)
    index = torch.from_numpy(index.reshape(len(points), -1))
    near = 1.0 / (torch.from_numpy(distance.reshape(len(points), -1)) + 1e-9)
    around = known[index]
    agrees = (around * normals[:, None]).sum(-1) > FACING
    total = (around.double() * (near * agrees)[..., None]).sum(1)
    lost = total.norm(dim=1) < 1e-12
    return torch.where(lost[:, None], normals, functional.normalize(total, dim=1).to(normals.dtype))


def sky_visibility(
    surface: Surface, points: Float[Tensor, "n 3"], normals: Float[Tensor, "n 3"], directions: int = 96
) -> Float[Tensor, "n 1"]:
    """Ambient visibility in [0, 1]: the cosine-weighted share of the hemisphere that the surface leaves open.

    Directions are spread evenly (Fibonacci); each is a depth map seen from far away, so the cost does not depend on
    the number of faces along a ray.
    """
    centre = (surface.vertices.amax(0) + surface.vertices.amin(0)) / 2.0
    radius = float((surface.vertices - centre).norm(dim=1).max())
    moved = surface.vertices - centre
    opened = torch.zeros(len(points), 1)
    total = torch.zeros(len(points), 1)
    for towards in fibonacci_sphere(directions).split(8):
        cameras = far_cameras(towards, radius)
        seen = rasterize_mesh(moved, surface.faces, cameras)
        screen, depth = project(points - centre, cameras)
        pixel = screen.floor().long().clamp(0, SHADOW_PX - 1)
        view = torch.arange(len(towards))[:, None]
        in_front = seen.depth[view, pixel[..., 1], pixel[..., 0]]
        empty = ~seen.covered[view, pixel[..., 1], pixel[..., 0]]
        cosine = (normals @ towards.T).clamp(min=0.0)
        # Surfaces seen at a grazing angle change depth within a pixel: forgive in proportion to the slope.
        slope = (1.0 - cosine.square()).sqrt() / cosine.clamp(min=0.15)
        bias = BIAS * radius * (1.0 + slope)
        free = empty | (depth <= in_front + bias.T)
        opened += (free.T * cosine).sum(1, keepdim=True)
        total += cosine.sum(1, keepdim=True)
    return opened / total.clamp(min=1e-6)


def fibonacci_sphere(count: int) -> Float[Tensor, "n 3"]:
    """Unit vectors spread evenly over the sphere."""
    k = torch.arange(count, dtype=torch.float32) + 0.5
    height = 1.0 - 2.0 * k / count
    turn = math.pi * (1.0 + math.sqrt(5.0)) * k
    ring = (1.0 - height.square()).sqrt()
    return torch.stack([ring * turn.cos(), height, ring * turn.sin()], dim=1)


def far_cameras(towards: Float[Tensor, "b 3"], radius: float) -> Cameras:
    """Nearly parallel views of a ball around the origin from these directions."""
    helper = torch.where(
        towards[:, 1:2].abs() < 0.9, torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    )
    right = functional.normalize(torch.linalg.cross(helper, towards), dim=1)
    c2w = torch.zeros(len(towards), 4, 4)
    c2w[:, :3, 0], c2w[:, :3, 1], c2w[:, :3, 2] = right, torch.linalg.cross(-towards, right), -towards
    c2w[:, :3, 3] = towards * radius * FAR_RADII
    c2w[:, 3, 3] = 1.0
    intrinsics = torch.zeros(len(towards), 3, 3)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = 0.48 * SHADOW_PX * (FAR_RADII - 1.0)
    intrinsics[:, 0, 2] = intrinsics[:, 1, 2] = 0.5 * SHADOW_PX
    intrinsics[:, 2, 2] = 1.0
    none = torch.zeros(len(towards))
    return Cameras(
        c2w=c2w,
        intrinsics=intrinsics,
        width_px=SHADOW_PX,
        height_px=SHADOW_PX,
        azimuth_deg=none,
        elevation_deg=none,
        radius=none + radius * FAR_RADII,
        fov_deg=none,
    )
