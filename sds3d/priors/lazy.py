"""A text encoder that is read from disk when it is first asked, and can be let go again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class LazyEncoder(nn.Module):
    """Stands for a network: its settings are known at once, its weights are read at the first call.

    Whatever else it is asked for (`get_input_embeddings()`, a layer) is answered by the network, which that loads.
    """

    def __init__(self, config: Any, load: Callable[[], nn.Module]) -> None:
        """`load` reads the network, frozen, onto the CPU."""
        super().__init__()
        self.config, self.device = config, torch.device("cpu")
        self._load, self._changes = load, list[Callable[[nn.Module], None]]()

    def after_loading(self, change: Callable[[nn.Module], None]) -> None:
        """Change the network in place whenever it is read (styles, learned words)."""
        if self.is_loaded:
            change(self.network)
        self._changes.append(change)

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return "network" in self._modules

    def forward(self, *args: Any, **options: Any) -> Any:
        """The network's own answer."""
        return self._loaded()(*args, **options)

    def to(self, device: torch.device | str) -> "LazyEncoder":  # type: ignore[override]
        """Where the network is, or will be once it is loaded."""
        self.device = torch.device(device)
        return super().to(self.device)

    def release(self) -> None:
        """Free the weights; the next call reads them again."""
        self._modules.pop("network", None)

    def _loaded(self) -> nn.Module:
        if not self.is_loaded:
            network = self._load()
            for change in self._changes:
                change(network)
            self.network = network.to(self.device)
        return self.network

    def __getattr__(self, name: str) -> Any:
        if name == "network" or name.startswith("__"):
            return super().__getattr__(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._loaded(), name)
