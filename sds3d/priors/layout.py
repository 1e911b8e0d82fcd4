"""Memory layout of networks."""

from typing import Any

import torch
from torch import nn


def channels_last(module: nn.Module) -> nn.Module:
    """The module with its convolution weights laid out as tensor cores read them; no copy where nothing changes."""
    if all(p.dim() != 5 for p in module.parameters()):  # there is no such layout for 3D convolutions here
        how: dict[str, Any] = {"memory_format": torch.channels_last}
        module.to(**how)
    return module
