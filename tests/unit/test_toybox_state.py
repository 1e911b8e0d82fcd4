"""The state of a training run survives the disk: training goes on as if it had not stopped."""

from pathlib import Path

import torch
from torch import nn

from sds3d.toybox.training_state import STATE, load_state, save_state


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return net, torch.optim.AdamW(
        [{"params": list(net.parameters()), "weight_decay": 0.1}], lr=0.1, fused=True
    )


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.rand(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def test_going_on_equals_not_stopping(tmp_path: Path) -> None:
    whole, half, again = made(), made(), made()
    train(*whole, range(20))
    train(*half, range(10))
    averages = [p.detach() * 2 for p in half[0].parameters()]
    save_state(tmp_path / STATE, *half, {"step": 10, "seconds": 1.5}, averages)
    numbers, loaded = load_state(tmp_path / STATE, *again, torch.device("cpu"))
    assert numbers == {"step": 10, "seconds": 1.5}
    assert all(torch.equal(a, b) for a, b in zip(loaded, averages, strict=True))
    train(*again, range(10, 20))
    for a, b in zip(whole[0].state_dict().values(), again[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
