"""Penalties that cost nothing unless a run gives them a weight."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor


class Lazy(Mapping[str, Tensor]):
    """Values by name, each computed when it is first asked for and not otherwise."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)
