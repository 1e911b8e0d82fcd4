"""Which of a scene's regularisers a run uses, and how much."""

from dataclasses import dataclass, fields

from sds3d.config.option import option
from sds3d.config.ramp import Ramp


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig:
    """Weights of the scene's regularisers; the guidance gradient is a sum over the elements of x, per view."""

    opacity: Ramp = option(Ramp.constant(0.0), help="mean alpha: keeps space empty", ge=0.0)
    entropy: Ramp = option(
        Ramp.constant(0.0), help="binary entropy of alpha: solid or empty, no haze", ge=0.0
    )
    orientation: Ramp = option(
        Ramp.constant(0.0), help="normals that face away from the camera (Ref-NeRF)", ge=0.0
    )
    distortion: Ramp = option(Ramp.constant(0.0), help="spread of density along rays (mip-NeRF 360)", ge=0.0)
    tv_density: Ramp = option(Ramp.constant(0.0), help="total variation of density", ge=0.0)
    tv_color: Ramp = option(Ramp.constant(0.0), help="total variation of colour", ge=0.0)
    scale: Ramp = option(Ramp.constant(0.0), help="mean size of Gaussians", ge=0.0)
    anisotropy: Ramp = option(Ramp.constant(0.0), help="needle-like Gaussians", ge=0.0)
    normal_consistency: Ramp = option(
        Ramp.constant(0.0), help="bends between neighbouring faces of a mesh", ge=0.0
    )
    laplacian: Ramp = option(
        Ramp.constant(0.0), help="mesh vertices away from their neighbours' mean", ge=0.0
    )
    edge_length: Ramp = option(Ramp.constant(0.0), help="uneven edges of a mesh", ge=0.0)
    eikonal: Ramp = option(Ramp.constant(0.0), help="signed distances whose slope is not 1 (tetmesh)", ge=0.0)
    sdf_sign: Ramp = option(Ramp.constant(0.0), help="floaters and bubbles of a tetmesh", ge=0.0)

    def active(self) -> dict[str, Ramp]:
        """Weights that are not zero throughout."""
        ramps = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        return {name: ramp for name, ramp in ramps.items() if ramp.start != 0.0 or ramp.end != 0.0}
