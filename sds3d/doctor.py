"""`sds3d doctor`: what this machine can do, found out without building or downloading anything."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from sds3d.ops.threads import thread_count
from sds3d.priors import PriorConfig, load_prior
from sds3d.priors.hub import find_folder

Status = Literal["ok", "note", "FAIL"]
PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "diffusers",
    "transformers",
    "safetensors",
    "kornia",
    "peft",
    "trimesh",
    "xatlas",
)
MIN_FREE_MIB = 500


@dataclass(frozen=True)
class Check:
    """One finding: "ok", "note" (a run works without it) or "FAIL" (no run can work)."""

    name: str
    status: Status
    detail: str


def examine() -> list[Check]:
    """All checks; one that breaks is itself a finding."""
    checks: list[Check] = []
    for name, probe in _PROBES.items():
        try:
            checks.append(probe(name))
        except Exception as error:  # noqa: BLE001 (a doctor must outlive its patient)
            checks.append(Check(name, "FAIL", f"{type(error).__name__}: {error}"))
    return checks


def _python(name: str) -> Check:
    supported = (3, 10) <= sys.version_info[:2] < (3, 14)
    detail = f"{platform.python_version()} on {platform.platform()}"
    return Check(
        name, "ok" if supported else "note", detail if supported else f"{detail}; tested: 3.10 to 3.13"
    )


def _packages(name: str) -> Check:
    found, missing = [], []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        return Check(name, "FAIL", f"missing: {', '.join(missing)}; run: pip install -e .")
    return Check(name, "ok", ", ".join(found))


def _device(name: str) -> Check:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        return Check(name, "ok", f"cuda: {torch.cuda.get_device_name()}, {memory}")
    why = "torch is built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
    return Check(name, "ok", f"cpu ({why})")


def _threads(name: str) -> Check:
    return Check(name, "ok", f"{thread_count()} kernel threads, {torch.get_num_threads()} torch threads")


def _kernel_cache(name: str) -> Check:
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or Path(__file__).parent / "ops" / "__pycache__")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Check(name, "ok", f"{folder} is writable: kernels compile once")
    except OSError:
        return Check(
            name, "note", f"{folder} is read-only: kernels compile at every start; set NUMBA_CACHE_DIR"
        )


def _accelerator(name: str) -> Check:
    """Importing gsplat or nerfacc may start a CUDA build, so only what a build needs is looked at."""
    if find_spec(name) is None:
        return Check(name, "note", "not installed; sds3d uses its own kernels")
    if not torch.cuda.is_available():
        return Check(name, "note", f"{version(name)}, unused: no CUDA device; sds3d uses its own kernels")
    ready = shutil.which("nvcc") is not None
    detail = "builds on first use" if ready else "may need the CUDA toolkit (nvcc) for its first build"
    return Check(name, "ok" if ready else "note", f"{version(name)}, {detail}")


def _video(name: str) -> Check:
    import imageio_ffmpeg

    program = imageio_ffmpeg.get_ffmpeg_exe()
    answer = subprocess.run([program, "-version"], capture_output=True, timeout=20, check=True)  # noqa: S603
    return Check(name, "ok", answer.stdout.decode(errors="replace").partition("\n")[0])


def _prior(name: str) -> Check:
    chosen = PriorConfig()
    prior = load_prior(chosen, torch.device("cpu"))
    prior.encode_text(["a red mug"])
    return Check(name, "ok", f"{chosen.name} loads from {find_folder(chosen)}; {prior.image_px} px")


def _disk(name: str) -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**20
    enough = free >= MIN_FREE_MIB
    detail = f"{free:,.0f} MiB free in {Path.cwd()}"
    return Check(name, "ok" if enough else "FAIL", detail if enough else f"{detail}; needs {MIN_FREE_MIB}")


_PROBES: dict[str, Callable[[str], Check]] = {
    "python": _python,
    "packages": _packages,
    "device": _device,
    "threads": _threads,
    "kernel cache": _kernel_cache,
    "gsplat": _accelerator,
    "nerfacc": _accelerator,
    "video": _video,
    "prior": _prior,
    "disk": _disk,
}
