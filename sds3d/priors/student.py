"""A trainable noise predictor that starts as its prior: a LoRA on a UNet."""

import copy
import itertools
import re
from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.interfaces import ParamGroup, Student, Told
from sds3d.priors.network import Denoiser, Labels, NetworkPrior, with_module
from sds3d.rng import Stream

POSE_SIZE = 16  # the entries of a camera-to-world matrix
# Attention inside transformer blocks (attn, attn1, attn2), and of UNets that have it between their blocks.
_ATTENTION = re.compile(r"\.attn[12]?\.|\.attentions\.\d+\.(to|add)_")


class LoraStudent(Student):
    """A low-rank adapter on a second view of a prior's UNet: W x + B A x with B = 0 at the start.

    The second UNet shares every base weight with the prior, and only the adapter (float32 whatever the precision of
    the base) is trained and stored. Where a UNet has no camera input of its own, a small network of the
    camera-to-world matrix is added to its time embedding, zero at the start.

    Source: Hu et al. 2021 (LoRA, arXiv:2106.09685); the camera embedding: Wang et al. 2023 (ProlificDreamer,
    arXiv:2305.16213).
    """

    def __init__(
        self, prior: NetworkPrior, *, rank: int, lr: float, convolutions: bool, stream: Stream
    ) -> None:
        """`convolutions` also adapts the convolutions of the residual blocks, for UNets with little attention."""
        super().__init__()
        base = prior.denoiser.module
        twin, lora = _with_lora(base, rank, convolutions, stream.fork("lora"))
        # Held in a tuple, unseen by nn.Module: the frozen weights stay out of state_dict() and out of checkpoints.
        self._frozen: tuple[NetworkPrior, Denoiser] = (prior, with_module(prior.denoiser, twin))
        self.lr = lr
        self.labels: Labels | None = prior.labels
        self.lora = nn.ParameterDict({name.replace(".", "/"): p for name, p in lora.items()})
        self.pose: nn.Module | None = None
        if not prior.takes_camera and isinstance(base, UNet2DConditionModel):
            self.pose = _pose_network(base.time_embedding.linear_2.out_features, stream.fork("pose"))
            twin.class_embedding = self.pose.to(prior.device)
            self.labels = _poses

    def eps(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], *told: Told
    ) -> tuple[Float[Tensor, "b c h w"], ...]:
        """Noise predictions, one per bundle, through the same conversions as the prior's."""
        prior, denoiser = self._frozen
        return prior.eps_of(denoiser, self.labels, x_t, t, *told)

    def groups(self) -> Sequence[ParamGroup]:
        """One group."""
        return [ParamGroup(name="student", params=list(self.parameters()), lr=self.lr)]


def _with_lora(
    unet: nn.Module, rank: int, convolutions: bool, stream: Stream
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A UNet that shares all weights with `unet`, plus adapters; the trainable parameters by name."""
    from peft import LoraConfig, inject_adapter_in_model

    shared = {id(p): p for p in itertools.chain(unet.parameters(), unet.buffers())}
    twin = copy.deepcopy(unet, shared)
    targets = [name for name, module in twin.named_modules() if _is_target(name, module, convolutions)]
    with torch.random.fork_rng(devices=[]):  # peft draws initial values that are replaced below
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), twin)
    trainable = {}
    for name, parameter in twin.named_parameters():
        if "lora_" not in name:
            continue
        parameter.data = parameter.data.float()
        if "lora_A" in name:
            parameter.data = stream.fork(name).normal(*parameter.shape).to(parameter.device) / rank
        trainable[name] = parameter
    return twin.eval(), trainable


def _is_target(name: str, module: nn.Module, convolutions: bool) -> bool:
    if isinstance(module, nn.Linear):
        return _ATTENTION.search(name) is not None
    return convolutions and isinstance(module, nn.Conv2d) and ".resnets." in name


def _pose_network(size: int, stream: Stream) -> nn.Module:
    """16 -> size, the time embedding's own shape of network; its last layer is zero."""
    first = nn.utils.skip_init(nn.Linear, POSE_SIZE, size)
    last = nn.utils.skip_init(nn.Linear, size, size)
    nn.init.zeros_(last.weight)
    for layer in (first, last):
        nn.init.zeros_(layer.bias)
    first.weight.data = stream.normal(size, POSE_SIZE) / POSE_SIZE**0.5
    return nn.Sequential(first, nn.SiLU(), last)


def _poses(told: Sequence[Told], views: int) -> Float[Tensor, "r 16"]:
    """The camera-to-world matrix of every row; zeros where no camera is told."""
    none = torch.zeros(views, POSE_SIZE, device=told[0].text.device)
    return torch.cat(
        [
            none if bundle.cameras is None else bundle.cameras.c2w.reshape(-1, POSE_SIZE).to(none)
            for bundle in told
        ]
    )
