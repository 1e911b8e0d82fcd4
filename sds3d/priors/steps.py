"""At which of its trained steps a network is good: all of them, or the few of a distilled model."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sds3d.errors import PriorError
from sds3d.mathx.schedule import TableSchedule, least_alpha
from sds3d.priors.config import PriorConfig
from sds3d.priors.folder import PipelineFolder, alphas_cumprod_of
from sds3d.priors.network import Prediction

LCM_STEPS = 50  # of the sampler that consistency models are distilled from, where their folder does not say
DISTILLED_STEPS = 4  # of adversarially distilled models: SD-Turbo and SDXL-Turbo, SDXL-Lightning
DISTILLED_NAMES = ("turbo", "lightning")


def allowed_steps(folder: PipelineFolder, scheduler: Any, config: PriorConfig) -> Int[Tensor, " k"] | None:
    """The steps that a folder or the user declares for a distilled network; None = all trained ones.

    In this order: `prior.allowed_steps`; `allowed_steps` in sds3d_prior.json; LCMScheduler as the folder's scheduler
    (every step of the sampler it was distilled from: 19, 39, ... 999 of 1000); "trailing" spacing in a model that is
    called turbo or lightning (249, 499, 749, 999, the steps of adversarial diffusion distillation).

    Raises:
        PriorError: a declared step lies outside the trained ones.

    Sources: Luo et al. 2023 (LCM, arXiv:2310.04378), section 4.3; Sauer et al. 2023 (arXiv:2311.17042), section 3.2.
    """
    trained = int(scheduler.config.get("num_train_timesteps", 1000))
    said = folder.extra.get("allowed_steps") if config.allowed_steps is None else config.allowed_steps
    if said is not None:
        return _checked(said, trained)
    sampler = str((folder.index.get("scheduler") or [None, ""])[1])
    if sampler == "LCMScheduler":
        return _trailing(int(scheduler.config.get("original_inference_steps") or LCM_STEPS), trained)
    if scheduler.config.get("timestep_spacing") == "trailing" and _is_distilled(folder):
        return _trailing(DISTILLED_STEPS, trained)
    return None


def table_schedule(
    scheduler: Any, prediction: Prediction, allowed: Int[Tensor, " k"] | None, device: torch.device
) -> TableSchedule:
    """The table that a scheduler's config describes.

    Where its last step has no signal that float32 can tell from none (`rescale_betas_zero_snr`, the end of a cosine
    table), a network that predicts eps learned nothing there and is not asked at it; one that predicts v or x0 is.
    """
    table = alphas_cumprod_of(scheduler)
    if allowed is None and prediction == "epsilon" and table[-1] < least_alpha(torch.float32) ** 2:
        allowed = torch.arange(len(table) - 1)
    return TableSchedule(table.to(device), None if allowed is None else allowed.to(device))


def _trailing(count: int, trained: int) -> Int[Tensor, " k"]:
    """`count` steps at equal distances, the last one trained among them."""
    return torch.arange(1, count + 1) * (trained // count) - 1


def _checked(said: Sequence[int], trained: int) -> Int[Tensor, " k"]:
    steps = list(said)
    if not steps or not all(isinstance(step, int) and 0 <= step < trained for step in steps):
        raise PriorError(
            f"prior.allowed_steps: got {steps}, expected whole numbers from 0 to {trained - 1}, "
            f"e.g. {_trailing(DISTILLED_STEPS, trained).tolist()}"
        )
    return torch.tensor(sorted(set(steps)))


def _is_distilled(folder: PipelineFolder) -> bool:
    """By its name: in the index, as a folder, or as a repository in the hub's cache."""
    names = [str(folder.index.get("_name_or_path", "")), folder.path.name]
    names += [part for part in folder.path.parts if part.startswith("models--")]
    return any(word in name.lower() for word in DISTILLED_NAMES for name in names)
