"""What happens inside a prior while a run goes on, told to the user between steps."""

from typing import Protocol, runtime_checkable

from sds3d.interfaces import Prior
from sds3d.priors.wrapped import WrappedPrior


@runtime_checkable
class Noting(Protocol):
    """A prior that has something to tell besides predictions."""

    def take_notes(self) -> list[str]:
        """What the user was not told yet; may read from the device."""
        ...


def notices(prior: Prior) -> list[str]:
    """What happened since this was last asked, for the user; reads a few flags back from the device."""
    while isinstance(prior, WrappedPrior):
        prior = prior.inner
    return prior.take_notes() if isinstance(prior, Noting) else []
