"""Similarities of space: how a file's object is turned, scaled and moved into the scene, and back."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

UpAxis = Literal["x", "y", "z", "-x", "-y", "-z"]


@dataclass(frozen=True, kw_only=True)
class Pose:
    """p -> scale * turn p + shift, reckoned in float64."""

    scale: float
    turn: Float[Tensor, "3 3"]  # a rotation
    shift: Float[Tensor, " 3"]

    @classmethod
    def identity(cls) -> "Pose":
        """Everything stays where it is."""
        return cls(
            scale=1.0, turn=torch.eye(3, dtype=torch.float64), shift=torch.zeros(3, dtype=torch.float64)
        )

    def points(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        """Where points come to lie, in their own dtype."""
        return (self.scale * points.double() @ self.turn.T + self.shift).to(points.dtype)

    def directions(self, vectors: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        """Directions, turned only."""
        return (vectors.double() @ self.turn.T).to(vectors.dtype)

    def inverse(self) -> "Pose":
        """The way back."""
        return Pose(scale=1.0 / self.scale, turn=self.turn.T, shift=-(self.shift @ self.turn) / self.scale)

    def then(self, other: "Pose") -> "Pose":
        """This pose first, `other` after it."""
        return Pose(
            scale=self.scale * other.scale,
            turn=other.turn @ self.turn,
            shift=other.scale * (other.turn @ self.shift) + other.shift,
        )


def upright(up: UpAxis, front_deg: float = 0.0) -> Float[Tensor, "3 3"]:
    """The rotation (float64) that brings the file's `up` axis to +y and its front to +z.

    With `front_deg` 0 the front is +z where up is +y or -y, and -y where up is +z, as modelling programs have it; a
    front that lies `front_deg` degrees from there, counter-clockwise seen from above, is turned back by that angle.
    """
    axis = "xyz".index(up[-1])
    ahead = {"x": 2, "y": 2, "z": 1}[up[-1]]
    y, z = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    y[axis] = -1.0 if up[0] == "-" else 1.0
    z[ahead] = -1.0 if up == "z" else 1.0
    rows = torch.stack([torch.linalg.cross(y, z), y, z])
    angle = torch.deg2rad(torch.tensor(-front_deg, dtype=torch.float64))
    c, s = float(angle.cos()), float(angle.sin())
    about = torch.tensor([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]], dtype=torch.float64)
    return about @ rows


def fitting(points: Float[Tensor, "n 3"], turn: Float[Tensor, "3 3"], reach: float) -> Pose:
    """Turned, the middle of the bounding box at the origin, the farthest point at the distance `reach`.

    Raises ValueError where all points are one.
    """
    turned = points.double() @ turn.T
    middle = (turned.amin(0) + turned.amax(0)) / 2.0
    far = float((turned - middle).norm(dim=1).max())
    if not far > 0.0:
        raise ValueError("all points are at one place")
    scale = reach / far
    return Pose(scale=scale, turn=turn, shift=-scale * middle)
