"""A prior around another prior."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import Prior
from sds3d.priors.conditions import conditions_of
from sds3d.priors.text import ReleasesText


class WrappedPrior:
    """Hands everything but `schedule` and `eps` on to the prior inside; subclasses say how those differ."""

    def __init__(self, inner: Prior) -> None:
        self.inner = inner
        self.device, self.shape, self.image_px = inner.device, inner.shape, inner.image_px
        self.conditions = conditions_of(inner)

    def encode_text(self, prompts: Sequence[str]) -> Float[Tensor, "p n d"]:
        """As the wrapped prior does."""
        return self.inner.encode_text(prompts)

    def release_text(self) -> None:
        """As the wrapped prior does, where it can."""
        if isinstance(self.inner, ReleasesText):
            self.inner.release_text()

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """As the wrapped prior does."""
        return self.inner.warnings(prompts)

    def encode(self, rgb: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """As the wrapped prior does."""
        return self.inner.encode(rgb)

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """As the wrapped prior does."""
        return self.inner.decode(x)
