"""Finds on a CPU where a step would make the host wait for a CUDA device.

Tensors that a run keeps on its device, those it uploads, and everything computed from them count as device tensors.
Whatever needs their values or a size that depends on them is a wait.
"""

import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sds3d
from sds3d import transfer

ROOT = Path(sds3d.__file__).resolve().parent
VALUE = {"_local_scalar_dense", "item", "is_nonzero", "equal", "_linalg_check_errors"}
SIZE = {"nonzero", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive", "bincount"}


class DeviceTensors(TorchDispatchMode):
    """Follows device tensors through every operator and counts the waits by "file:function"."""

    def __init__(self, start: Iterable[Tensor]) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.storages: dict[int, Any] = {}  # kept alive, so that an address names one storage
        for tensor in start:
            self.add(tensor)

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return tensor

    def holds(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self.storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if self.holds(value)]
        if given and self._waits(func, args):
            self.count()
        out = func(*args, **kwargs)
        if given:
            for value in tree_leaves(out):
                if isinstance(value, Tensor):
                    self.add(value)
        return out

    def _waits(self, func: Any, args: Any) -> bool:
        name = func._schema.name.removeprefix("aten::")
        if name in VALUE or name in SIZE:
            return True
        if name == "repeat_interleave":  # the one with a tensor of counts
            return func._overloadname == "Tensor"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            filled = len(args) > 2 and args[2].numel() == 1  # becomes masked_fill
            return bool(masks) and not filled
        return False

    def count(self) -> None:
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if ROOT in path.parents:
                self.waits[f"{path.relative_to(ROOT).as_posix()}:{frame.name}"] += 1
                return
        self.waits["elsewhere"] += 1


@contextmanager
def device_tensors(start: Iterable[Tensor]) -> Iterator[DeviceTensors]:
    """While this lasts, waits are counted; the code must run in this thread (SDS3D_THREADS=1)."""
    mode = DeviceTensors(start)
    plain = {name: getattr(Tensor, name) for name in ("tolist", "numpy", "cpu")}

    def watched(name: str) -> Any:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if mode.holds(tensor):
                mode.count()
            return plain[name](tensor, *args, **kwargs)

        return read

    original = transfer.upload

    def upload(tensor: Tensor, device: object, dtype: torch.dtype | None = None) -> Tensor:
        moved = original(tensor, device, dtype)
        # Streams draw for the host under the name "cpu"; a run's device is a torch.device.
        return mode.add(moved.clone()) if isinstance(device, torch.device) else moved

    users = [m for n, m in sys.modules.items() if n.startswith("sds3d.") and hasattr(m, "upload")]
    with pytest.MonkeyPatch.context() as patch:
        for name in plain:
            patch.setattr(Tensor, name, watched(name))
        for module in users:
            patch.setattr(module, "upload", upload)
        with mode:
            yield mode
