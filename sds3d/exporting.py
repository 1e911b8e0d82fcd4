"""The files of a run: mesh, splats, turntable and contact sheet, from the scene as it stands."""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.asset import AssetReport, make_asset
from sds3d.cameras.orbit import orbit_cameras
from sds3d.convert import cloud_of
from sds3d.errors import ExportError
from sds3d.events.bus import PhaseStarted, Warned
from sds3d.events.turntable import write_contact_sheet, write_turntable
from sds3d.interfaces import Scene, Shading
from sds3d.mesh.files import load_mesh
from sds3d.mesh.splat_files import SPLAT_ENCODERS
from sds3d.mesh.textured import render_textured
from sds3d.paths import write_atomic
from sds3d.rng import Stream
from sds3d.scenes import GaussianScene, particles_of
from sds3d.session import Session

_COLORED = ("glb", "gltf", "obj", "ply")  # formats whose file can be shown on the contact sheet


def export_or_warn(run: Session, scene: Scene, step: int) -> dict[str, Path]:
    """Export what there is of an interrupted run; too early for a surface is no failure."""
    if step == 0:
        return {}
    try:
        return export_scene(run, scene, step)
    except ExportError as error:
        run.emit(Warned(message=f"no asset yet: {error}; sds3d resume {run.folder} continues the run"))
        return {}


def export_scene(run: Session, scene: Scene, step: int) -> dict[str, Path]:
    """Write all files that the job asks for, and note them; ExportError where the scene has no surface."""
    job, folder = run.job, run.folder
    run.emit(PhaseStarted(name="exporting"))
    scene.eval()  # renders for videos and comparison without sampling jitter
    facts = {"prompt": job.text(), "seed": job.seed, "config_hash": job.hash(), "steps": step}
    report = make_asset(scene, folder, job.export, facts)
    files = dict(report.files)
    for index, particle in enumerate(particles_of(scene)):
        name = f"particle_{index}"
        if index > 0:
            made = make_asset(particle, folder / name, job.export, facts | {"particle": index})
            files |= {f"{name}_{kind}": path for kind, path in made.files.items()}
        if isinstance(particle, GaussianScene):
            cloud, label = cloud_of(particle), "splats" if index == 0 else f"{name}_splats"
            for kind in job.export.splat_formats:
                path = folder / (name if index else "") / f"splats.{kind}"
                files[f"{label}_{kind}"] = path
                write_atomic(path, SPLAT_ENCODERS[kind](cloud))
    size, frames = job.preview.turntable_px, job.preview.turntable_frames
    if frames:
        path = files["turntable"] = folder / "turntable.mp4"
        write_turntable(path, (view for view in _scene_views(scene, size, frames)), size_px=size)
    sheet = _mesh_views(report, size)
    if sheet is not None:
        files["contact_sheet"] = folder / "contact_sheet.png"
        write_contact_sheet(files["contact_sheet"], sheet)
    details = report.as_dict()
    if details["fidelity"] is not None:
        sizes = {name: path.stat().st_size for name, path in files.items() if "splats" in name}
        details["fidelity"]["file_bytes"] |= sizes
    names = {name: path.relative_to(folder).as_posix() for name, path in files.items()}
    run.note(files=run.manifest.get("files", {}) | names, mesh=details["mesh"], fidelity=details["fidelity"])
    return files


@torch.no_grad()
def _scene_views(scene: Scene, size_px: int, count: int) -> Iterator[Tensor]:
    """`count` views around the scene on white, rendered a few at a time to bound memory."""
    device = next(scene.parameters()).device
    for azimuths in torch.arange(count).mul(360.0 / count).split(4):
        level = torch.ones(len(azimuths))
        cameras = orbit_cameras(azimuths, 15.0 * level, 3.3 * level, 40.0 * level, size_px).to(device)
        white = Shading(background=torch.ones(len(azimuths), 3, device=device))
        yield from scene.render(cameras, white, Stream(0, "turntable")).rgb.cpu()


def _mesh_views(report: AssetReport, size_px: int) -> Float[Tensor, "9 3 H W"] | None:
    """The exported file itself from eight sides and the top; None if no written format holds colours."""
    written = [name for name in _COLORED if name in report.files]
    if not written:
        return None
    mesh = load_mesh(report.files[written[0]]).moved(report.pose.inverse())
    azimuths = torch.cat([torch.arange(8) * 45.0, torch.zeros(1)])
    elevations = torch.tensor([15.0] * 8 + [80.0])
    level = torch.ones(9)
    cameras = orbit_cameras(azimuths, elevations, 3.3 * level, 40.0 * level, size_px)
    return render_textured(mesh, cameras, torch.ones(9, 3))[0]
