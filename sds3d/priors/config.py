"""Settings of the frozen prior."""

from dataclasses import dataclass
from typing import Literal

from sds3d.config.option import option


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Which frozen diffusion model guides the run."""

    name: str = option("toybox", help="a name listed by `sds3d priors`, or a diffusers pipeline folder")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="network precision; auto = bfloat16 (schedule algebra stays in float32)"
    )
    as_flow: bool = option(
        False, help="see the model through its equivalent rectified flow, for rules written for flows"
    )
    image_px: int | None = option(
        None, help="side of the image the model sees; null = the size it was trained at", ge=8, le=4096
    )
