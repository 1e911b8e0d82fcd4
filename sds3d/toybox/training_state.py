"""The state of a training run on disk: tensors and numbers, no Python objects."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sds3d.paths import write_atomic

STATE = "state.safetensors"


def save_state(
    path: Path,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    numbers: Mapping[str, float],
    averages: Sequence[Tensor] = (),
) -> None:
    """Write network, optimiser moments, averages and counters, whole or not at all."""
    tensors = {f"net.{name}": value for name, value in net.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors |= {f"average.{index}": value for index, value in enumerate(averages)}
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_atomic(path, save(plain, metadata={"numbers": json.dumps(dict(numbers))}))


def load_state(
    path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[dict[str, float], list[Tensor]]:
    """(counters, averages); network and optimiser take on what was saved. Learning rates stay as they are."""
    with safe_open(str(path), framework="pt", device=str(device)) as file:
        numbers = json.loads(file.metadata()["numbers"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    net.load_state_dict({n.removeprefix("net."): v for n, v in tensors.items() if n.startswith("net.")})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            moments.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    count = sum(name.startswith("average.") for name in tensors)
    return numbers, [tensors[f"average.{index}"] for index in range(count)]
