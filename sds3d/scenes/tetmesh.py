"""`TetMeshScene`: signed distances on a tetrahedral lattice, turned into a closed mesh at every step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.config.option import option
from sds3d.errors import ConfigError, NoSurfaceError
from sds3d.interfaces import Cameras, Material, ParamGroup, Render, Scene, Shading, Surface
from sds3d.mathx import mesh_penalty, penalty
from sds3d.mesh.tets import SAFE_OFFSET_CELLS, TetLattice, TetSurface, extract
from sds3d.ops.mesh_edges import MeshEdges
from sds3d.ops.signed_distance import lattice_distance
from sds3d.rng import Stream
from sds3d.scenes.lazy import Lazy
from sds3d.scenes.surface_view import SurfaceView, render_surface
from sds3d.scenes.texture import TextureConfig, TextureField

_TEXTURE_REACH_CELLS = 0.5  # how far apart colours are compared by tv_color


@dataclass(frozen=True)
class _View:
    """What one render keeps for its penalties."""

    sdf: Tensor
    positions: Tensor
    surface: TetSurface
    edges: MeshEdges
    seen: SurfaceView
    rng: Stream


class TetMeshScene(Scene):
    """A signed distance and an offset at every vertex of a body-centred cubic lattice, and a texture field.

    s = start + sum of levels, each in units of its own spacing, coarse ones upsampled: at one learning rate a coarse
    level moves far more than the finest, so the shape changes smoothly and detail comes last. Vertices move by at most
    0.2 cells per axis. The mesh is closed at every step, whatever the values. Colour (and metallic, roughness) belongs
    to points in space, so it stays while the mesh changes under it.

    Sources: Shen et al. 2021, DMTet, arXiv:2111.04276; Chen et al. 2023, Fantasia3D, arXiv:2303.13873.
    """

    takes_environment = True
    penalty_names = (
        "opacity",
        "entropy",
        "tv_color",
        "normal_consistency",
        "laplacian",
        "edge_length",
        "eikonal",
        "sdf_sign",
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`kind: tetmesh`."""

        cells: int = option(40, help="lattice cells per side", ge=4, le=256)
        coarse: tuple[int, ...] = option(
            (6, 11, 21), help="points per side of the coarse levels; empty = none", ge=2, le=256
        )
        half_extent_m: float = option(1.05, help="half the side of the cube that can hold matter", ge=0.01)
        radii_m: tuple[float, float, float] = option(
            (0.45, 0.45, 0.45), help="half axes x, y, z of the ellipsoid at the start", ge=0.01
        )
        texture: TextureConfig = field(default_factory=TextureConfig)
        lr_sdf: float = option(
            0.01, help="learning rate of the signed distances, in spacings of each level", ge=0.0
        )
        lr_offset: float = option(0.01, help="learning rate of the vertex offsets", ge=0.0)
        nvdiffrast: bool = option(False, help="find visible faces with nvdiffrast (CUDA, if installed)")

    def __init__(self, config: Config, rng: Stream) -> None:
        """A scene that starts as an ellipsoid."""
        super().__init__()
        if max(config.radii_m) > 0.9 * config.half_extent_m:
            raise ConfigError(
                f"scene.radii_m: got {list(config.radii_m)}, expected at most 0.9 half_extent_m = "
                f"{0.9 * config.half_extent_m:.3g}, so that the start fits into its cube"
            )
        self.config = config
        self.lattice = TetLattice(config.cells, config.half_extent_m)
        self.texture = TextureField(config.texture, config.half_extent_m, rng.fork("texture"))
        self.coarse = nn.ParameterList(torch.zeros(1, 1, n, n, n) for n in config.coarse)
        self.fine = nn.Parameter(torch.zeros(self.lattice.count))
        self.offset = nn.Parameter(torch.zeros(self.lattice.count, 3))
        grid = self.lattice.positions()
        self.start: Tensor
        self.grid: Tensor
        self.border: Tensor
        self.register_buffer("start", ellipsoid_distance(grid, torch.tensor(config.radii_m)))
        self.register_buffer("grid", grid, persistent=False)
        self.register_buffer("border", self.lattice.border(), persistent=False)

    @torch.no_grad()
    def start_from(self, surface: Surface) -> None:
        """Take a closed surface as the start, in place of the ellipsoid; learned values are reset."""
        half, cell, cells = self.config.half_extent_m, self.lattice.cell_m, self.config.cells
        parts = [
            lattice_distance(surface.vertices, surface.faces, low=low, step=cell, count=count).reshape(-1)
            for low, count in ((-half, cells + 1), (-half + 0.5 * cell, cells))
        ]
        self.start.copy_(torch.cat(parts))
        for value in (*self.coarse, self.fine, self.offset):
            value.zero_()

    def sdf(self) -> Float[Tensor, " v"]:
        """Signed distances (m, negative inside) at the lattice vertices; the outermost layer is outside."""
        sdf = self.start + self.lattice.cell_m * self.fine
        if len(self.coarse):
            size = (self.config.cells + 1,) * 3
            extent = 2 * self.config.half_extent_m
            corner = torch.stack(
                [
                    extent
                    / (level.shape[-1] - 1)
                    * F.interpolate(level, size=size, mode="trilinear", align_corners=True)
                    for level in self.coarse
                ]
            ).sum(0)
            centre = F.avg_pool3d(corner, 2, stride=1)
            sdf = sdf + torch.cat([corner.flatten(), centre.flatten()])
        return self.lattice.closed(sdf, self.border)

    def positions(self) -> Float[Tensor, "v 3"]:
        """The lattice vertices where they have moved to."""
        return self.grid + SAFE_OFFSET_CELLS * self.lattice.cell_m * torch.tanh(self.offset)

    def surface_attributes(self, points: Float[Tensor, "n 3"]) -> Material:
        """The material at surface points, differentiable in the texture field."""
        return self.texture(points)

    def render(self, cameras: Cameras, shading: Shading, rng: Stream, *, progress: float = 1.0) -> Render:
        """Render b views; nothing is random. Where the mesh is gone, views show the background."""
        sdf, positions = self.sdf(), self.positions()
        surface = extract(self.lattice, positions, sdf)
        edges = surface.mesh_edges()
        seen = render_surface(
            surface.vertices,
            surface.faces,
            edges,
            self.surface_attributes,
            cameras,
            shading,
            use_nvdiffrast=self.config.nvdiffrast,
        )
        return replace(seen.render, private=_View(sdf, positions, surface, edges, seen, rng))

    def groups(self) -> Sequence[ParamGroup]:
        """Signed distances, offsets, texture."""
        return [
            ParamGroup(name="sdf", params=[*self.coarse, self.fine], lr=self.config.lr_sdf),
            ParamGroup(name="offset", params=[self.offset], lr=self.config.lr_offset),
            *self.texture.groups(),
        ]

    def penalties(self, view: Render) -> Mapping[str, Float[Tensor, ""]]:
        """All of `penalty_names`, see mathx/mesh_penalty.py; a value is computed only when it is looked up.

        opacity: mean alpha. entropy: mean binary entropy of alpha (nats). tv_color: mean squared difference of base
        colour between visible points and their surroundings.
        """
        own = view.private
        if not isinstance(own, _View):
            raise TypeError("penalties() needs a Render made by this scene")
        mesh, cell = own.surface, self.lattice.cell_m
        return Lazy(
            {
                "opacity": lambda: view.alpha.mean(),
                "entropy": lambda: penalty.binary_entropy(view.alpha).mean(),
                "tv_color": lambda: self.texture.variation(
                    own.seen.points, own.rng.fork("tv"), _TEXTURE_REACH_CELLS * cell
                ),
                "normal_consistency": lambda: mesh_penalty.normal_consistency(
                    mesh.vertices, mesh.faces, own.edges.inner().faces
                ),
                "laplacian": lambda: mesh_penalty.laplacian(mesh.vertices, own.edges.ends),
                "edge_length": lambda: mesh_penalty.edge_length(mesh.vertices, own.edges.ends),
                "eikonal": lambda: mesh_penalty.eikonal(own.positions, own.sdf, mesh.tets),
                "sdf_sign": lambda: mesh_penalty.sdf_sign(own.sdf, mesh.edges, cell),
            }
        )

    @torch.no_grad()
    def surface(self, cells_per_side: int, *, iso_factor: float = 1.0) -> Surface:
        """The mesh as it is rendered: the lattice is the resolution and zero the iso value, whatever is asked.

        Raises NoSurfaceError where no mesh is left.
        """
        mesh = extract(self.lattice, self.positions(), self.sdf())
        if len(mesh.faces) == 0:
            raise NoSurfaceError("the scene is empty: its signed distances are positive everywhere")
        return Surface(vertices=mesh.vertices.cpu(), faces=mesh.faces.cpu())

    def material(self, points: Float[Tensor, "n 3"]) -> Material:
        """The texture field at points."""
        return self.texture.sample(points)


def ellipsoid_distance(points: Float[Tensor, "n 3"], radii: Float[Tensor, "3"]) -> Float[Tensor, " n"]:
    """About the signed distance to an ellipsoid around the origin: exact for a ball, and zero on the surface.

    k (k - 1) / |p / r^2| with k = |p / r|: the level over its slope.
    """
    k = (points / radii).norm(dim=-1)
    slope = (points / radii.square()).norm(dim=-1)
    return torch.where(slope > 0, k * (k - 1) / slope.clamp_min(1e-12), -radii.min())
