"""The optimiser: fused Adam over named groups, with non-finite gradients counted and never applied."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sds3d.config.option import option
from sds3d.config.ramp import Ramp
from sds3d.errors import CheckpointError
from sds3d.interfaces import ParamGroup
from sds3d.moment import Moment

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam settings shared by all groups; learning rates belong to the scene."""

    lr_factor: Ramp = option(
        Ramp(start=1.0, end=0.2), help="multiplies every learning rate over the run", ge=0.0, le=100.0
    )
    betas: tuple[float, float] = option((0.9, 0.99), help="Adam's decay rates")
    eps: float = option(1e-15, help="Adam's epsilon; tiny, because score gradients can be tiny", ge=0.0)
    max_grad_norm: float | None = option(None, help="clip the global gradient norm to this", ge=0.0)
    pixel_clip: float | None = option(
        None, help="pixel-wise gradient clipping (PGC-3D): largest |gradient| of a rendered channel", ge=0.0
    )
    score_clamp: Ramp | None = option(
        None, help="elementwise limit on the guidance gradient, e.g. {from: 2, to: 8} (Debiased-SDS)", ge=0.0
    )


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step did, as tensors, so that reading them is the caller's decision."""

    grad_norm: Float[Tensor, ""]
    skipped: Bool[Tensor, ""]  # gradients were not finite and nothing was changed


class Optimizer:
    """Adam over a scene's parameter groups.

    A step whose gradients hold a NaN or infinity changes nothing; `nonfinite` counts such steps. No value is read
    back from the device inside `step`.
    """

    def __init__(self, groups: Sequence[ParamGroup], config: OptimizerConfig) -> None:
        self.config = config
        self.lr_scale = 1.0  # on top of the schedule: lowered after steps that were not finite
        self.base_lr = {group.name: group.lr for group in groups}
        self.adam = torch.optim.Adam(
            [{"params": list(group.params), "lr": group.lr, "name": group.name} for group in groups],
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        device = self.params()[0].device
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)

    def params(self) -> list[nn.Parameter]:
        """All parameters, in group order."""
        return [p for group in self.adam.param_groups for p in group["params"]]

    def step(self, loss: Float[Tensor, ""], now: Moment) -> StepReport:
        """Clear the gradients, backward, update."""
        self.clear()
        loss.backward()
        return self.update(now)

    def clear(self) -> None:
        """Forget all gradients."""
        self.adam.zero_grad(set_to_none=True)

    def update(self, now: Moment) -> StepReport:
        """Check the gradients that backward passes have left, clip, update."""
        grads = [p.grad for p in self.params() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        bad = ~torch.isfinite(norm)
        self.nonfinite += bad
        if self.config.max_grad_norm is not None:
            scale = (self.config.max_grad_norm / (norm + 1e-12)).clamp(max=1.0)
            torch._foreach_mul_(grads, scale)
        factor = self.config.lr_factor.at(now) * self.lr_scale
        for group in self.adam.param_groups:
            group["lr"] = self.base_lr[group["name"]] * factor
        # Fused Adam skips the whole update where found_inf is 1, on the device, without a host read.
        self.adam.grad_scale = None  # type: ignore[attr-defined]
        self.adam.found_inf = bad.float()  # type: ignore[attr-defined]
        self.adam.step()
        return StepReport(norm, bad)

    def replace(
        self,
        name: str,
        old: nn.Parameter,
        new: nn.Parameter,
        gather: Int[Tensor, " m"],
        fresh: Bool[Tensor, " m"],
    ) -> None:
        """Swap a parameter (see `sds3d.interfaces.Optimizer.replace`)."""
        group = next(g for g in self.adam.param_groups if g["name"] == name)
        group["params"] = [new if p is old else p for p in group["params"]]
        state = self.adam.state.pop(old, None)
        if not state:
            return
        for key in _MOMENTS:
            rows = state[key][gather]
            rows[fresh] = 0.0
            state[key] = rows
        self.adam.state[new] = state

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for group in self.adam.param_groups:
            for index, param in enumerate(group["params"]):
                yield f"{group['name']}.{index}", param

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and step counts by group name and position."""
        tensors = {"nonfinite": self.nonfinite.clone()}
        for name, param in self._named():
            for key, value in self.adam.state.get(param, {}).items():
                tensors[f"{name}.{key}"] = value.detach().clone()
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave; the scene must be restored first."""
        self.nonfinite = tensors["nonfinite"].to(self.nonfinite.device).clone()
        for name, param in self._named():
            state = {
                key: tensors[f"{name}.{key}"].to(param.device).clone()
                for key in ("step", *_MOMENTS)
                if f"{name}.{key}" in tensors
            }
            if not state:
                continue
            if state["exp_avg"].shape != param.shape:
                raise CheckpointError(
                    f"optimiser state {name} has shape {tuple(state['exp_avg'].shape)}, "
                    f"the parameter {tuple(param.shape)}: the checkpoint belongs to another configuration"
                )
            self.adam.state[param] = state
