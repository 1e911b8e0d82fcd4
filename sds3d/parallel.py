"""Several processes on one machine that share the views of one run: data parallelism over views.

    torchrun --nproc_per_node 2 -m sds3d generate "a red mug"

Every process holds the whole scene and samples the joint batch from the shared seed, renders and guides its own slice
of the views, and adds its gradients to those of the others. All else is the same everywhere; the first process alone
writes files. gloo on the CPU, nccl on CUDA.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sds3d.errors import ConfigError, InputError, Sds3dError
from sds3d.slices import Slice

TIMEOUT_S = 600.0  # longest wait for another process, e.g. while it writes a checkpoint
_FAILED = 2
CPU = torch.device("cpu")


@dataclass
class Team:
    """The processes of one run; alone by default, and then nothing here does anything.

    Methods that exchange something must be called by all processes in the same order. Where another process has
    failed or vanished they raise Sds3dError.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    over: bool = False  # nothing is exchanged any more, because another process has failed or all are done

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def check(self, views: int, multiple: int = 1) -> None:
        """ConfigError where the views of a step cannot be dealt out evenly in groups of `multiple`."""
        step = self.size * multiple
        if views % step:
            upper = -(-views // step) * step
            near = upper if views < step else f"{upper - step} or {upper}"
            groups = f" times {multiple} views per object" if multiple > 1 else ""
            raise ConfigError(
                f"camera.batch: got {views} for {self.size} processes{groups}, expected a multiple of {step}, "
                f"e.g. {near}"
            )

    def slice(self, views: int) -> Slice:
        """The views of this process."""
        each = views // self.size
        return Slice(self.rank * each, (self.rank + 1) * each, views)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        return self._highest(int(flag)) > 0

    def least(self, value: int) -> int:
        """The smallest of all processes' numbers (each at least 0)."""
        if self.size == 1:
            return value
        return -self._highest(-value)

    def part(self) -> None:
        """From here on nothing is exchanged: this process goes its own way."""
        self.over = True

    def fail(self) -> None:
        """Let the others know that this process gives up; they raise at their next exchange."""
        if self.size > 1 and not self.over:
            self.over = True
            with suppress(Sds3dError):
                self._reduce(torch.tensor(_FAILED, dtype=torch.int64), dist.ReduceOp.MAX)

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, value by value."""
        if self.size == 1 or not values:
            return list(values)
        return self._reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM).tolist()

    def gather(self, own: Tensor) -> Tensor:
        """The rows of all processes, in the order of the views."""
        if self.size == 1:
            return own
        parts = [torch.zeros_like(own) for _ in range(self.size)]
        with self._exchange():
            dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    def add_gradients(self, params: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of all processes, in place; one exchange per precision.

        A parameter that no process has a gradient for keeps none.
        """
        if self.size == 1 or not params:
            return
        told = torch.tensor([p.grad is not None for p in params], dtype=torch.int64)
        known = self._reduce(told, dist.ReduceOp.MAX).tolist()
        used = [p for p, has in zip(params, known, strict=True) if has]
        for _, group in groupby(sorted(used, key=lambda p: str(p.dtype)), key=lambda p: p.dtype):
            members = list(group)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
            flat = torch.cat([grad.flatten() for grad in grads])
            with self._exchange():
                dist.all_reduce(flat)
            for p, grad, part in zip(members, grads, flat.split([g.numel() for g in grads]), strict=True):
                p.grad = part.view_as(grad).clone()

    def _highest(self, status: int) -> int:
        highest = int(self._reduce(torch.tensor(status, dtype=torch.int64), dist.ReduceOp.MAX))
        if highest == _FAILED:
            self.over = True
            raise Sds3dError(
                f"process {self.rank} of {self.size}: another process of this run failed and said why; "
                "this one ends too"
            )
        return highest

    def _reduce(self, values: Tensor, how: "dist.ReduceOp.RedOpType") -> Tensor:
        here = values.to(self.device)
        with self._exchange():
            dist.all_reduce(here, how)
        return here.cpu()

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # closed connections and timeouts, of gloo and nccl alike
            self.over = True
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise Sds3dError(
                f"process {self.rank} of {self.size}: lost the other processes of this run ({reason[:200]}); "
                "look for their message, then continue with sds3d resume"
            ) from error


def asked_for() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR"} <= os.environ.keys()


@contextmanager
def joined(device: torch.device, timeout_s: float = TIMEOUT_S) -> Iterator[Team]:
    """The team of this process inside the block: the one that torchrun set up, else this process alone.

    An error that leaves the block reaches the other processes. Raises InputError where there are fewer CUDA devices
    than processes, or the processes do not find each other.
    """
    if not asked_for():
        yield Team()
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device.type == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
        if local >= count:
            raise InputError(f"{size} processes, but {count} CUDA devices; use --nproc_per_node {count}")
        torch.cuda.set_device(local)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"process {rank} of {size}: cannot reach the others ({error})") from error
    team = Team(
        rank, size, torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else device
    )
    try:
        yield team
    except BaseException:
        team.fail()
        raise
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()
