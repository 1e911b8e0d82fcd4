"""From the host to a device without making the host wait."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on `device`, and in `dtype` where given.

    A plain `.to("cuda")` of host memory waits until the device has caught up. A copy from pinned memory is only put
    in line; the pinned block is kept until the copy is done.
    """
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device=device, dtype=dtype)
    return tensor.to(dtype=dtype).pin_memory().to(device, non_blocking=True)
