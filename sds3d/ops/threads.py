"""One thread pool for all numba kernels (compiled with nogil).

A plain pool instead of numba's parallel layers: `workqueue` aborts the process when two Python threads enter it,
`omp` hangs in forked children, `tbb` needs another wheel. Results must not depend on the number of threads, so
kernels split their work into fixed tasks that write to disjoint memory or to per-task buffers summed in order.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def thread_count() -> int:
    """Threads for numba kernels: SDS3D_THREADS, else the CPUs this process may use, at most 16."""
    asked = os.environ.get("SDS3D_THREADS")
    if asked:
        return max(1, int(asked))
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(available, 16)


@lru_cache(maxsize=4)
def _pool(pid: int, threads: int) -> ThreadPoolExecutor:
    # Keyed by process id: a pool inherited through fork() has no threads behind it.
    return ThreadPoolExecutor(
        threads, thread_name_prefix="sds3d-kernel", initializer=torch.set_num_threads, initargs=(1,)
    )


@contextmanager
def one_thread_per_call(device: torch.device) -> Iterator[None]:
    """On the CPU, torch operators inside the block use one thread each.

    Parallelism comes from our own tasks instead: an OpenMP team that waits for a busy core makes a run on a shared
    machine many times slower, and sums inside operators no longer depend on the number of cores.
    """
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_tasks(kernel: Callable[..., None], tasks: Sequence[tuple[Any, ...]]) -> None:
    """Call `kernel(*task)` for every task and wait; exceptions propagate."""
    threads = thread_count()
    if threads == 1 or len(tasks) <= 1:
        for task in tasks:
            kernel(*task)
        return
    futures = [_pool(os.getpid(), threads).submit(kernel, *task) for task in tasks]
    for future in futures:
        future.result()


def map_slices(call: Callable[[slice], Result], count: int) -> list[Result]:
    """`call` on consecutive slices of range(count), one per thread, in order; exceptions propagate.

    For torch code whose operators are too small to thread from inside. The cut depends on the number of threads;
    rows must be independent.
    """
    pieces = max(1, min(thread_count(), count))
    edges = [count * i // pieces for i in range(pieces + 1)]
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    if pieces == 1:
        return [call(parts[0])]
    pool = _pool(os.getpid(), pieces)
    return [future.result() for future in [pool.submit(call, part) for part in parts]]
