"""Image sizes that a model can work at."""

from sds3d.errors import PriorError
from sds3d.priors.codec import Codec

UNET_MULTIPLE = 8  # three halvings inside the usual UNet


def side_of(trained: int, codec: Codec, image_px: int | None, multiple: int = UNET_MULTIPLE) -> int:
    """The side of x: the trained one, or that of `image_px`-sized images.

    Raises:
        PriorError: `image_px` is not divisible into whole latents that the network can halve.
    """
    if image_px is None:
        return trained
    step = codec.factor * multiple
    if image_px % step:
        lower, upper = image_px // step * step, -(-image_px // step) * step
        near = upper if lower == 0 else f"{lower} or {upper}"
        raise PriorError(f"prior.image_px: got {image_px}, expected a multiple of {step}, e.g. {near}")
    return image_px // codec.factor
