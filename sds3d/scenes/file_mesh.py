"""`FileMesh`: what a mesh scene remembers of the file it came from, so that its asset can be that mesh again."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sds3d.interfaces import Surface
from sds3d.mathx.pose import Pose


class FileMesh(nn.Module):
    """The file's vertices as it splits them (at texture seams and hard edges); the scene's are joined by place.

    Buffers, so that they travel in checkpoints: `source` (w) the scene's vertex behind each of the file's, `faces`
    (f 3) in the order of the scene's, `normals` (w 3) in the scene's axes, `uvs` (w 2, or no rows), `positions` (w 3)
    as in the file, and the pose (4 4, float64) that brought them into the scene.
    """

    NAMES = ("source", "faces", "normals", "uvs", "positions", "placed")

    def __init__(
        self,
        source: Int[Tensor, " w"],
        faces: Int[Tensor, "f 3"],
        normals: Float[Tensor, "w 3"],
        uvs: Float[Tensor, "w 2"] | None,
        positions: Float[Tensor, "w 3"],
        pose: Pose,
    ) -> None:
        super().__init__()
        placed = torch.eye(4, dtype=torch.float64)
        placed[:3, :3], placed[:3, 3], placed[3, 3] = pose.turn, pose.shift, pose.scale
        rows = torch.zeros(0, 2) if uvs is None else uvs
        for name, value in zip(self.NAMES, (source, faces, normals, rows, positions, placed), strict=True):
            self.register_buffer(name, value.detach().clone())

    source: Tensor
    faces: Tensor
    normals: Tensor
    uvs: Tensor
    positions: Tensor
    placed: Tensor  # rotation and shift, with the scale in the last corner

    @classmethod
    def waiting(cls) -> "FileMesh":
        """One without rows, for the checkpoint that it is about to load."""
        none = torch.zeros(0, 3)
        long = torch.zeros(0, dtype=torch.long)
        return cls(long, long.reshape(0, 3), none, None, none, Pose.identity())

    @property
    def pose(self) -> Pose:
        """From the file's axes and units to the scene's."""
        placed = self.placed.cpu()
        return Pose(scale=float(placed[3, 3]), turn=placed[:3, :3], shift=placed[:3, 3])

    def surface(self, vertices: Float[Tensor, "v 3"]) -> Surface:
        """The file's mesh where the scene's vertices are now, in the scene's metres, on the CPU."""
        return Surface(vertices=vertices[self.source].detach().cpu(), faces=self.faces.cpu())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take on the rows of the state."""
        for name in self.NAMES:
            stored = state_dict.get(prefix + name)
            if stored is not None:
                setattr(self, name, torch.zeros_like(stored, device=self.placed.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)
