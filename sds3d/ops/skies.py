"""Small environment maps made from formulas, by name, and maps read from files."""

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sds3d.errors import InputError
from sds3d.mathx.color import to_linear
from sds3d.ops.environment import Environment, lat_long_directions, make_environment

ROWS = 64
MAX_HDR_BYTES = 256 * 2**20


def _glow(
    directions: Tensor, azimuth_deg: float, elevation_deg: float, sharpness: float
) -> Float[Tensor, "n 1"]:
    """A round light: exp(sharpness (cos angle - 1))."""
    a, e = math.radians(azimuth_deg), math.radians(elevation_deg)
    centre = torch.tensor([math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)])
    return torch.exp(sharpness * (directions @ centre - 1.0))[:, None]


def _studio(directions: Tensor) -> Tensor:
    """Three soft boxes in a grey room: key at the front left, fill at the right, rim from behind."""
    room = 0.35 + 0.15 * directions[:, 1:2]
    boxes = (
        5.0 * _glow(directions, -40.0, 45.0, 12.0)
        + 2.0 * _glow(directions, 70.0, 20.0, 8.0)
        + 4.0 * _glow(directions, 170.0, 40.0, 20.0)
    )
    return (room + boxes).expand(-1, 3)


def _sunset(directions: Tensor) -> Tensor:
    """A low orange sun, a warm horizon, a dark blue zenith and brown ground."""
    height = directions[:, 1:2]
    zenith, horizon, ground = (
        torch.tensor(c) for c in ([0.12, 0.2, 0.45], [1.1, 0.6, 0.35], [0.16, 0.12, 0.1])
    )
    sky = torch.lerp(
        horizon.expand(len(height), 3), zenith.expand(len(height), 3), height.clamp(min=0.0) ** 0.5
    )
    base = torch.where(height >= 0.0, sky, ground.expand(len(height), 3))
    return base + _glow(directions, 60.0, 10.0, 60.0) * torch.tensor([22.0, 12.0, 5.0])


def _noon(directions: Tensor) -> Tensor:
    """A high white sun in a blue sky over grass."""
    height = directions[:, 1:2]
    sky = torch.tensor([0.35, 0.55, 0.95]) + 0.35 * (1.0 - height.clamp(0.0, 1.0)) ** 3
    base = torch.where(height >= 0.0, sky, torch.tensor([0.14, 0.2, 0.08]).expand_as(sky))
    return base + _glow(directions, -30.0, 60.0, 90.0) * torch.tensor([40.0, 38.0, 34.0])


def _overcast(directions: Tensor) -> Tensor:
    """A bright even sky, darker towards the horizon and the ground."""
    return (0.6 + 0.4 * directions[:, 1:2]).clamp(min=0.15).expand(-1, 3)


def _neon(directions: Tensor) -> Tensor:
    """A pink and a blue light in the dark."""
    return (
        0.06
        + _glow(directions, -70.0, 15.0, 10.0) * torch.tensor([6.0, 0.7, 3.5])
        + _glow(directions, 80.0, 25.0, 10.0) * torch.tensor([0.5, 2.0, 7.0])
    )


def _toybox(directions: Tensor) -> Tensor:
    """How the toybox world is lit, as seen from its camera: one lamp high before the object in a bright even room.

    Irradiance is about (a + s (1 + n.y) / 2 + d max(0, n.l))^2.2 with the world's mean weights a, s and d.
    """
    return (0.29 + 0.084 * directions[:, 1:2] + 27.0 * _glow(directions, 0.0, 47.0, 100.0)).expand(-1, 3)


SKIES: dict[str, Callable[[Tensor], Tensor]] = {
    "studio": _studio,
    "sunset": _sunset,
    "noon": _noon,
    "overcast": _overcast,
    "neon": _neon,
    "toybox": _toybox,
}


@lru_cache(maxsize=16)
def sky(name: str) -> Environment:
    """A made environment by name. Raises InputError with the known names."""
    if name not in SKIES:
        raise InputError(
            f"environment {name!r} is unknown; known: {', '.join(SKIES)}, or give a file (.hdr, .png)"
        )
    directions, _ = lat_long_directions(ROWS)
    return make_environment(SKIES[name](directions).reshape(ROWS, 2 * ROWS, 3))


@lru_cache(maxsize=32)
def environment_on(name_or_path: str, device: torch.device) -> Environment:
    """`read_environment`, kept on a device; a file is read once in a process."""
    return read_environment(name_or_path).to(device)


def read_environment(name_or_path: str) -> Environment:
    """A made environment, or a lat-long picture: Radiance .hdr (linear) or .png / .jpg (sRGB).

    Raises:
        InputError: unknown name, unreadable file, or a picture that is not twice as wide as high.
    """
    path = Path(name_or_path)
    if name_or_path in SKIES or not (path.suffix or path.exists()):
        return sky(name_or_path)
    if path.suffix.lower() == ".hdr":
        radiance = read_hdr(path)
    else:
        try:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise InputError(f"{path}: cannot be read as an environment picture ({error})") from error
        radiance = to_linear(torch.from_numpy(pixels.copy()))
    height, width = radiance.shape[:2]
    if width != 2 * height:
        raise InputError(f"{path}: {width} x {height}; a lat-long environment is twice as wide as high")
    if not bool(torch.isfinite(radiance).all()) or float(radiance.max()) <= 0.0:
        raise InputError(f"{path}: an environment needs finite values and some light")
    return make_environment(radiance)


def read_hdr(path: Path) -> Float[Tensor, "h w 3"]:
    """Linear pixels of a Radiance RGBE picture (run-length coded or flat).

    Source: Ward 1991, Real Pixels. Raises InputError where the file is missing or damaged.
    """
    try:
        if path.stat().st_size > MAX_HDR_BYTES:
            raise InputError(f"{path}: larger than {MAX_HDR_BYTES // 2**20} MiB")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error
    head, mark, body = data.partition(b"\n\n")
    first, _, pixels = body.partition(b"\n")
    size = first.split()
    fits = data[:2] == b"#?" and mark and len(size) == 4 and size[0] == b"-Y" and size[2] == b"+X"
    if not fits or b"32-bit_rle_rgbe" not in head or not (size[1].isdigit() and size[3].isdigit()):
        raise InputError(f"{path}: not a Radiance .hdr picture (32-bit_rle_rgbe, -Y +X)")
    height, width = int(size[1]), int(size[3])
    if not (0 < height <= 16384 and 0 < width <= 32768):
        raise InputError(f"{path}: {width} x {height} pixels is out of range")
    try:
        rgbe = _rgbe_rows(np.frombuffer(pixels, np.uint8), height, width)
    except (IndexError, ValueError) as error:
        raise InputError(f"{path}: the picture is cut off or damaged") from error
    exponent = np.ldexp(1.0, rgbe[..., 3].astype(np.int32) - 136)
    light = np.where(rgbe[..., 3:] > 0, rgbe[..., :3] * exponent[..., None], 0.0)
    return torch.from_numpy(light.astype(np.float32))


def _rgbe_rows(data: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width, 4) bytes; raises IndexError or ValueError where data runs out or rows overflow."""
    coded = 8 <= width <= 32767 and len(data) >= 4 and data[0] == 2 and data[1] == 2 and data[2] < 128
    if not coded:
        return data[: height * width * 4].reshape(height, width, 4)
    image = np.zeros((height, 4, width), np.uint8)
    at = 0
    for row in range(height):
        if data[at] != 2 or data[at + 1] != 2 or (int(data[at + 2]) << 8) + int(data[at + 3]) != width:
            raise ValueError("row header")
        at += 4
        for channel in range(4):
            column = 0
            while column < width:
                count = int(data[at])
                if count > 128:
                    count -= 128
                    if column + count > width:
                        raise ValueError("run")
                    image[row, channel, column : column + count] = data[at + 1]
                    at += 2
                else:
                    if count == 0 or column + count > width or at + 1 + count > len(data):
                        raise ValueError("run")
                    image[row, channel, column : column + count] = data[at + 1 : at + 1 + count]
                    at += 1 + count
                column += count
    return image.transpose(0, 2, 1)
