"""Occupancy grid: which cells of the scene hold matter, and the samples of rays that fall into them."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sds3d.ops.volume import RaySamples, nerfacc_cuda
from sds3d.rng import Stream


class OccupancyGrid(nn.Module):
    """A cube [-half_extent, half_extent]^3 of cells, occupied or empty; all occupied before the first update.

    The estimate is nerfacc's (an exponential maximum of sampled optical depths), on every device. Its state
    is in the state dict and its randomness comes from a passed stream, so a resumed run takes the same path.
    """

    def __init__(self, half_extent: float, cells_per_side: int) -> None:
        super().__init__()
        from nerfacc import OccGridEstimator

        self.half_extent, self.cells_per_side = half_extent, cells_per_side
        self.estimator = OccGridEstimator([-half_extent] * 3 + [half_extent] * 3, cells_per_side)
        self.estimator.binaries.fill_(True)

    @property
    def occupied(self) -> Bool[Tensor, "x y z"]:
        """Occupancy of every cell."""
        return self.estimator.binaries[0]

    def update(
        self,
        step: int,
        optical_depth: Callable[[Float[Tensor, "n 3"]], Float[Tensor, " n"]],
        rng: Stream,
        *,
        every: int = 16,
        warmup_steps: int = 256,
        threshold: float = 0.01,
    ) -> None:
        """Refresh on steps divisible by `every`: all cells until `warmup_steps`, then a sampled part of them.

        `optical_depth(points)` is density times the step length (no unit). A cell counts with the highest of its
        eight corners and one random point inside: a point alone would lose cells that a surface cuts.
        """
        if step % every != 0:
            return
        corner = self._lattice(optical_depth)
        highest = nn.functional.max_pool3d(corner[None, None], 2, stride=1)[0, 0]

        def cell_depth(points: Tensor) -> Tensor:
            x, y, z = self._cell(points).clamp(0, self.cells_per_side - 1).unbind(-1)
            return torch.maximum(optical_depth(points), highest[x, y, z])[:, None]

        devices = [self.occupied.device] if self.occupied.is_cuda else []
        # nerfacc draws from torch's global generators: lend it ours, then put theirs back.
        with torch.random.fork_rng(devices=devices):
            torch.random.set_rng_state(rng.torch_generator().get_state())
            for device in devices:
                torch.cuda.set_rng_state(rng.torch_generator(device).get_state(), device)
            self.estimator.train().update_every_n_steps(
                step,
                cell_depth,
                occ_thre=threshold,
                warmup_steps=warmup_steps,
                n=every,
            )

    def at(self, points: Float[Tensor, "n 3"]) -> Bool[Tensor, " n"]:
        """Whether points lie in occupied cells; outside the cube is empty."""
        cell = self._cell(points)
        inside = ((cell >= 0) & (cell < self.cells_per_side)).all(-1)
        x, y, z = cell.clamp(0, self.cells_per_side - 1).unbind(-1)
        return inside & self.occupied[x, y, z]

    @torch.no_grad()
    def march(
        self,
        origins: Float[Tensor, "r 3"],
        directions: Float[Tensor, "r 3"],
        near: Float[Tensor, " r"],
        far: Float[Tensor, " r"],
        hit: Bool[Tensor, " r"],
        offset: Float[Tensor, " r"],
        *,
        slots: int,
        step_m: float,
    ) -> RaySamples:
        """Live samples of rays with unit directions; `offset` in [0, 1) places a ray's samples in their bins.

        On the CPU, `slots` equal bins of [near, far] are culled by occupancy; on CUDA nerfacc walks the grid
        with bins of `step_m` (one step of offset later at the most) where its kernels build.
        """
        if origins.is_cuda and nerfacc_cuda():
            return self._march_nerfacc(
                origins, directions, near, far, hit, offset, slots=slots, step_m=step_m
            )
        ray = hit.nonzero()[:, 0]
        bins = torch.arange(slots, device=origins.device)
        width = ((far - near) / slots)[ray, None]
        at = near[ray, None] + (bins + offset[ray, None]) * width  # r' s
        points = origins[ray, None] + at[..., None] * directions[ray, None]
        live = self.at(points.reshape(-1, 3)).view(at.shape)
        which, slot = live.nonzero().unbind(-1)
        start = near[ray[which]] + slot * width[which, 0]
        return RaySamples(
            ray=ray[which],
            slot=slot,
            start=start,
            end=start + width[which, 0],
            at=at[live],
            rays=origins.shape[0],
            slots=slots,
        )

    def _cell(self, points: Tensor) -> Tensor:
        return ((points / self.half_extent + 1) * (0.5 * self.cells_per_side)).floor().long()

    @torch.no_grad()
    def _lattice(self, optical_depth: Callable[[Tensor], Tensor]) -> Tensor:
        """Optical depth (m m m) at the corners of all cells, m = cells + 1."""
        corners = self.cells_per_side + 1
        axis = torch.linspace(-self.half_extent, self.half_extent, corners, device=self.occupied.device)
        points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
        return optical_depth(points).view(corners, corners, corners)

    def _march_nerfacc(
        self,
        origins: Tensor,
        directions: Tensor,
        near: Tensor,
        far: Tensor,
        hit: Tensor,
        offset: Tensor,
        *,
        slots: int,
        step_m: float,
    ) -> RaySamples:
        first = torch.where(hit, near + offset * step_m, far)
        ray, start, end = self.estimator.sampling(
            origins, directions, t_min=first, t_max=far, render_step_size=step_m, early_stop_eps=0.0
        )
        count = torch.bincount(ray, minlength=origins.shape[0])
        slot = torch.arange(ray.shape[0], device=ray.device) - (count.cumsum(0) - count)[ray]
        return RaySamples(
            ray=ray,
            slot=slot,
            start=start,
            end=end,
            at=0.5 * (start + end),
            rays=origins.shape[0],
            slots=max(slots, int(count.max())) if ray.shape[0] else slots,
        )
