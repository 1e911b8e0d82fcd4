"""`MeshScene`: a given triangle mesh with a texture field; its vertices may learn, its faces stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.config.option import option
from sds3d.errors import NoSurfaceError
from sds3d.interfaces import Cameras, Material, ParamGroup, Render, Scene, Shading, Surface
from sds3d.mathx import mesh_penalty, penalty
from sds3d.ops.mesh_edges import MeshEdges, mesh_edges
from sds3d.rng import Stream
from sds3d.scenes.file_mesh import FileMesh
from sds3d.scenes.lazy import Lazy
from sds3d.scenes.surface_view import SurfaceView, render_surface
from sds3d.scenes.texture import TextureConfig, TextureField

_TEXTURE_REACH = 0.01  # of half_extent_m: how far apart colours are compared by tv_color


@dataclass(frozen=True)
class _View:
    """What one render keeps for its penalties."""

    vertices: Tensor
    seen: SurfaceView
    rng: Stream


class MeshScene(Scene):
    """Fixed faces, vertices v = given + edge x offset with edge the mean edge length (m), and a texture field.

    Checkpoints hold the mesh: a scene of any other mesh takes it over when it loads one.
    """

    needs_start = True
    takes_environment = True

    penalty_names = (
        "opacity",
        "entropy",
        "tv_color",
        "normal_consistency",
        "laplacian",
        "edge_length",
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of a mesh scene."""

        half_extent_m: float = option(1.05, help="half the side of the cube that the texture covers", ge=0.01)
        texture: TextureConfig = field(default_factory=TextureConfig)
        lr_vertices: float = option(
            0.0, help="learning rate of the vertices, in mean edge lengths; 0 = the shape stays", ge=0.0
        )
        nvdiffrast: bool = option(False, help="find visible faces with nvdiffrast (CUDA, if installed)")

    def __init__(self, config: Config, surface: Surface, rng: Stream, file: FileMesh | None = None) -> None:
        """A grey scene of this shape; with `file`, its asset keeps that file's mesh."""
        super().__init__()
        self.file = file
        self.config = config
        self.texture = TextureField(config.texture, config.half_extent_m, rng.fork("texture"))
        self.given: Tensor
        self.faces: Tensor
        self.register_buffer("given", surface.vertices.detach().clone().float())
        self.register_buffer("faces", surface.faces.detach().clone().long())
        self.offset = nn.Parameter(torch.zeros_like(self.given), requires_grad=config.lr_vertices > 0)
        self._edges: tuple[Tensor, MeshEdges, float] | None = None

    @classmethod
    def waiting(cls, config: Config, rng: Stream) -> "MeshScene":
        """A scene without a mesh of its own (an octahedron), for the checkpoint that it is about to load."""
        points = torch.cat([torch.eye(3), -torch.eye(3)]) * 0.5 * config.half_extent_m
        faces = torch.tensor(
            [[0, 1, 2], [1, 3, 2], [3, 4, 2], [4, 0, 2], [1, 0, 5], [3, 1, 5], [4, 3, 5], [0, 4, 5]]
        )
        return cls(config, Surface(vertices=points, faces=faces), rng)

    def topology(self) -> tuple[MeshEdges, float]:
        """The edges, and their mean length (m) in the given mesh; made anew when another mesh is loaded."""
        if self._edges is None or self._edges[0] is not self.faces:
            edges = mesh_edges(self.faces, len(self.given))
            ends = self.given[edges.ends]
            length = float((ends[:, 0] - ends[:, 1]).norm(dim=-1).mean()) if len(ends) else 1.0
            self._edges = (self.faces, edges, length)
        return self._edges[1:]

    def vertices(self) -> Float[Tensor, "v 3"]:
        """Where the vertices are now."""
        return self.given + self.topology()[1] * self.offset

    def surface_attributes(self, points: Float[Tensor, "n 3"]) -> Material:
        """The material at surface points, differentiable in the texture field."""
        return self.texture(points)

    def render(self, cameras: Cameras, shading: Shading, rng: Stream, *, progress: float = 1.0) -> Render:
        """Render b views; nothing is random."""
        vertices = self.vertices()
        seen = render_surface(
            vertices,
            self.faces,
            self.topology()[0],
            self.surface_attributes,
            cameras,
            shading,
            use_nvdiffrast=self.config.nvdiffrast,
        )
        return replace(seen.render, private=_View(vertices, seen, rng))

    def groups(self) -> Sequence[ParamGroup]:
        """The texture, and the vertices where they learn."""
        groups = list(self.texture.groups())
        if self.offset.requires_grad:
            groups.append(ParamGroup(name="vertices", params=[self.offset], lr=self.config.lr_vertices))
        return groups

    def penalties(self, view: Render) -> Mapping[str, Float[Tensor, ""]]:
        """All of `penalty_names`, see `TetMeshScene.penalties`; a value is computed only when it is looked up."""
        own = view.private
        if not isinstance(own, _View):
            raise TypeError("penalties() needs a Render made by this scene")
        edges, _ = self.topology()
        reach = _TEXTURE_REACH * self.config.half_extent_m
        return Lazy(
            {
                "opacity": lambda: view.alpha.mean(),
                "entropy": lambda: penalty.binary_entropy(view.alpha).mean(),
                "tv_color": lambda: self.texture.variation(own.seen.points, own.rng.fork("tv"), reach),
                "normal_consistency": lambda: mesh_penalty.normal_consistency(
                    own.vertices, self.faces, edges.inner().faces
                ),
                "laplacian": lambda: mesh_penalty.laplacian(own.vertices, edges.ends),
                "edge_length": lambda: mesh_penalty.edge_length(own.vertices, edges.ends),
            }
        )

    @torch.no_grad()
    def surface(self, cells_per_side: int, *, iso_factor: float = 1.0) -> Surface:
        """The mesh itself, whatever resolution is asked. Raises NoSurfaceError where it has no faces."""
        if len(self.faces) == 0:
            raise NoSurfaceError("the scene is empty: its mesh has no faces")
        return Surface(vertices=self.vertices().cpu(), faces=self.faces.cpu())

    def material(self, points: Float[Tensor, "n 3"]) -> Material:
        """The texture field at points."""
        return self.texture.sample(points)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take on the mesh of the state; the parameter stays the same object."""
        if self.file is None and f"{prefix}file.faces" in state_dict:
            self.file = FileMesh.waiting().to(self.given.device)
        for name in ("given", "faces", "offset"):
            stored, own = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and stored.shape[1:] == own.shape[1:] and len(stored) != len(own):
                own.data = own.new_zeros(stored.shape)
        self._edges = None
        super()._load_from_state_dict(state_dict, prefix, *rest)
