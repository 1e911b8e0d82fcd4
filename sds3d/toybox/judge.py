"""The judge: a small network that reads kind, main colour and azimuth off a picture of a toybox object.

It is trained on renders only (`sds3d.toybox.train_judge`), shares nothing with the prior, and scores what the prior,
the guidance rules and the exported assets show:

    judge = load_judge("cpu")
    verdicts = judge(images)                                     # (b, 3, H, W) sRGB in [0, 1], plain background
    majority(verdicts)                                           # ("mug", "red") over several views of one object
    score_views(judge, images, "a red mug", azimuths_deg)        # AssetScore(...)
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from sds3d.errors import InputError
from sds3d.paths import data_dir
from sds3d.toybox.captions import split_words
from sds3d.toybox.colors import COLOR_NAMES, COLOR_SYNONYMS
from sds3d.toybox.kinds import KIND_INDEX, KIND_NAMES, KIND_SYNONYMS, KINDS

IMAGE_PX = 64
AZIMUTH_BINS = 24
AZIMUTH_TOLERANCE_DEG = 30.0
CONFIG_FILE, WEIGHTS_FILE = "config.json", "judge.safetensors"

_BIN_DEG = 360.0 / AZIMUTH_BINS
_CHUNK = 256
_JOINERS = frozenset({"with", "and"})  # after one of these a caption speaks of the second part


@dataclass(frozen=True)
class JudgeShape:
    """Sizes of the network: feature channels at 32, 16, 8 and 4 pixels, attention maps of the colour head."""

    channels: tuple[int, int, int, int] = (24, 48, 96, 112)
    color_maps: int = 4
    hidden: int = 96


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class _Residual(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(norm.weight)  # blocks start as the identity
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), norm)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return F.relu(x + self.second(self.first(x)))


class JudgeNet(nn.Module):
    """A plain residual CNN with a head each for kind, main colour and azimuth.

    Which surface is the main part depends on the kind, so the colour head looks where the deep features point:
    attention maps over 8 x 8 cells pool the colours of the image and the shallow features.
    """

    def __init__(self, shape: JudgeShape) -> None:
        super().__init__()
        c32, c16, c8, c4 = shape.channels
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), _conv(12, c32))
        self.at16 = nn.Sequential(_conv(c32, c16, 2), _Residual(c16))
        self.at8 = nn.Sequential(_conv(c16, c8, 2), _Residual(c8))
        self.at4 = nn.Sequential(_conv(c8, c4, 2), _Residual(c4))
        self.context = nn.Sequential(nn.Linear(2 * c4, shape.hidden), nn.ReLU(inplace=True))
        self.kind = nn.Linear(shape.hidden, len(KIND_NAMES))
        self.azimuth = nn.Sequential(
            nn.Linear(shape.hidden + 16 * 16, shape.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(shape.hidden, AZIMUTH_BINS),
        )
        self.squeeze = nn.Conv2d(c4, 16, 1)  # keeps where things are for the azimuth
        self.look = nn.Conv2d(c8 + c4, shape.color_maps, 1)
        pooled = shape.color_maps * (3 + c16 + c8)
        self.color = nn.Sequential(
            nn.Linear(pooled + shape.hidden, shape.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(shape.hidden, len(COLOR_NAMES)),
        )

    def forward(
        self, images: Float[Tensor, "b 3 64 64"]
    ) -> tuple[Float[Tensor, "b kinds"], Float[Tensor, "b colors"], Float[Tensor, "b bins"]]:
        """Logits of kind, main colour and azimuth bin."""
        image = images * 2.0 - 1.0
        f16 = self.at16(self.stem(image))
        f8 = self.at8(f16)
        f4 = self.at4(f8)
        context = self.context(torch.cat([f4.mean((2, 3)), f4.amax((2, 3))], dim=1))
        where = self.squeeze(f4).flatten(1)
        azimuth = self.azimuth(torch.cat([context, where], dim=1))
        deep = F.interpolate(f4, scale_factor=2.0, mode="nearest")
        attention = self.look(torch.cat([f8, deep], dim=1)).flatten(2).float().softmax(dim=2).to(f8.dtype)
        shallow = torch.cat([F.avg_pool2d(image, 8).to(f8.dtype), F.avg_pool2d(f16, 2), f8], dim=1).flatten(2)
        pooled = torch.bmm(attention, shallow.transpose(1, 2)).flatten(1)
        return self.kind(context), self.color(torch.cat([pooled, context], dim=1)), azimuth


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What the judge reads off b images; classes in the order of KIND_NAMES and COLOR_NAMES."""

    kind_probs: Float[Tensor, "b kinds"]
    color_probs: Float[Tensor, "b colors"]
    azimuth_deg: Float[Tensor, " b"]  # [0, 360); means something only for kinds with a front
    azimuth_conf: Float[Tensor, " b"]  # probability within 30 degrees of azimuth_deg

    def __len__(self) -> int:
        return self.kind_probs.shape[0]

    def kinds(self) -> list[str]:
        """The most probable kind of every image."""
        return [KIND_NAMES[index] for index in self.kind_probs.argmax(1).tolist()]

    def colors(self) -> list[str]:
        """The most probable main colour of every image."""
        return [COLOR_NAMES[index] for index in self.color_probs.argmax(1).tolist()]


def decode_azimuth(probs: Float[Tensor, "b bins"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Azimuth in [0, 360) degrees and its confidence from bin probabilities; bin k is centred at 15 k degrees.

    The circular mean is taken over the best window of five bins only: between two far modes (front or back?) the
    mean over the whole circle would name a third direction. The confidence is the probability in that window.
    """
    offsets = torch.arange(-2, 3, device=probs.device)
    index = (torch.arange(AZIMUTH_BINS, device=probs.device)[:, None] + offsets) % AZIMUTH_BINS
    windows = probs[:, index]  # (b, bins, 5)
    mass = windows.sum(2)
    center = (mass + 1e-3 * probs).argmax(1)
    near = windows.gather(1, center[:, None, None].expand(-1, 1, 5))[:, 0]
    angle = torch.deg2rad((center[:, None] + offsets) * _BIN_DEG)
    azimuth = torch.rad2deg(torch.atan2((near * angle.sin()).sum(1), (near * angle.cos()).sum(1))) % 360.0
    return azimuth, mass.gather(1, center[:, None])[:, 0].clamp(max=1.0)


def azimuth_error_deg(a: Float[Tensor, " b"], b: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Unsigned angle between two azimuths, in [0, 180] degrees."""
    return ((a - b + 180.0) % 360.0 - 180.0).abs()


class Judge:
    """A trained judge; call it on images."""

    def __init__(self, net: JudgeNet, device: torch.device) -> None:
        self.device = device
        self.net = net.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b 3 H W"]) -> Verdicts:
        """Verdicts (on the judge's device) on sRGB images in [0, 1]; other sizes are resized, antialiased, to 64."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images (b, 3, H, W), got {tuple(images.shape)}")
        logits = [self._logits(part) for part in images.split(_CHUNK)]
        kind, color, azimuth = (torch.cat(parts).softmax(1) for parts in zip(*logits, strict=True))
        angle, confidence = decode_azimuth(azimuth)
        return Verdicts(kind_probs=kind, color_probs=color, azimuth_deg=angle, azimuth_conf=confidence)

    def _logits(self, images: Float[Tensor, "b 3 H W"]) -> tuple[Tensor, Tensor, Tensor]:
        images = images.to(self.device, torch.float32)
        if images.shape[-2:] != (IMAGE_PX, IMAGE_PX):
            images = F.interpolate(images, size=(IMAGE_PX, IMAGE_PX), mode="bilinear", antialias=True)
        return self.net(images.clamp(0.0, 1.0).contiguous(memory_format=torch.channels_last))


def judge_config(shape: JudgeShape) -> dict[str, object]:
    """What `config.json` beside the weights says."""
    return {
        "architecture": "sds3d toybox judge",
        "image_px": IMAGE_PX,
        "azimuth_bins": AZIMUTH_BINS,
        "kinds": list(KIND_NAMES),
        "colors": list(COLOR_NAMES),
        "shape": asdict(shape),
    }


def load_judge(device: torch.device | str = "cpu", folder: Path | None = None) -> Judge:
    """The shipped judge, or the one in `folder`.

    Raises:
        InputError: the files are missing, damaged, or made for other kinds or colours.
    """
    folder = data_dir("assets") / "judge" if folder is None else folder
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        fields = config.pop("shape")
        shape = JudgeShape(tuple(fields["channels"]), fields["color_maps"], fields["hidden"])
        weights = load_file(folder / WEIGHTS_FILE)
        net = JudgeNet(shape)
        net.load_state_dict(weights)
    except Exception as error:  # safetensors raises undocumented types of its own
        raise InputError(
            f"{folder}: no usable judge there ({error}); restore the folder assets/judge"
        ) from error
    expected = judge_config(shape)
    for key in config:
        if config[key] != expected.get(key, config[key]):
            raise InputError(
                f"{folder / CONFIG_FILE}: {key} is {config[key]}, this version needs {expected[key]}; "
                "train the judge again with python -m sds3d.toybox.train_judge"
            )
    return Judge(net, torch.device(device))


def _vote(probs: Float[Tensor, "b n"], names: Sequence[str]) -> str:
    votes = F.one_hot(probs.argmax(1), len(names)).sum(0) + probs.mean(0)  # the mean only breaks ties
    return names[int(votes.argmax())]


def majority(verdicts: Verdicts) -> tuple[str, str]:
    """(kind, colour) most often seen over several views of one object; the mean probability breaks ties."""
    if len(verdicts) == 0:
        raise ValueError("no views to vote on")
    return _vote(verdicts.kind_probs, KIND_NAMES), _vote(verdicts.color_probs, COLOR_NAMES)


def _first(words: Sequence[str], names: Sequence[str], synonyms: dict[str, str]) -> str | None:
    """The canonical name of the first one- or two-word entry among `words`."""
    for start, word in enumerate(words):
        for phrase in (" ".join(words[start : start + 2]), word):
            name = phrase if phrase in names else synonyms.get(phrase)
            if name is not None:
                return name
    return None


def parse_prompt(text: str) -> tuple[str | None, str | None]:
    """(main colour, kind) that a prompt asks for, as canonical names; None for what it does not name.

    Only a colour before the first "with" or "and" is the main one: in "a mug with a blue handle" the mug has none.
    """
    words = split_words(text)
    head = words[: next((i for i, word in enumerate(words) if word in _JOINERS), len(words))]
    kind = _first(head, KIND_NAMES, KIND_SYNONYMS) or _first(words, KIND_NAMES, KIND_SYNONYMS)
    return _first(head, COLOR_NAMES, COLOR_SYNONYMS), kind


@dataclass(frozen=True, kw_only=True)
class AssetScore:
    """How well n views of one object show what the prompt asks for; None where the question has no answer."""

    kind_ok: bool | None  # majority over the views; None when the prompt names no kind
    color_ok: bool | None
    kind_votes: float | None  # share of views that show the kind asked for
    color_votes: float | None
    azimuth_ok_frac: float | None  # share of views read within 30 degrees; None for kinds without a front


@torch.no_grad()
def score_views(
    judge: Judge,
    images: Float[Tensor, "n 3 H W"],
    prompt: str,
    azimuths_deg: Float[Tensor, " n"] | None = None,
) -> AssetScore:
    """Score n views of one object on a plain background against a prompt and the azimuths they were taken from."""
    color, kind = parse_prompt(prompt)
    verdicts = judge(images)
    seen_kind, seen_color = majority(verdicts)
    kind_hits = [name == kind for name in verdicts.kinds()]
    color_hits = [name == color for name in verdicts.colors()]
    azimuth_ok = None
    if kind is not None and KINDS[kind].has_front and azimuths_deg is not None:
        error = azimuth_error_deg(verdicts.azimuth_deg, azimuths_deg.to(judge.device))
        azimuth_ok = float((error <= AZIMUTH_TOLERANCE_DEG).float().mean())
    return AssetScore(
        kind_ok=None if kind is None else seen_kind == kind,
        color_ok=None if color is None else seen_color == color,
        kind_votes=None if kind is None else sum(kind_hits) / len(kind_hits),
        color_votes=None if color is None else sum(color_hits) / len(color_hits),
        azimuth_ok_frac=azimuth_ok,
    )


def has_front_table(device: torch.device | str = "cpu") -> Float[Tensor, " kinds"]:
    """1 for kinds whose azimuth can be read off an image, else 0, in the order of KIND_NAMES."""
    table = torch.zeros(len(KIND_NAMES), device=device)
    for name, index in KIND_INDEX.items():
        table[index] = float(KINDS[name].has_front)
    return table
