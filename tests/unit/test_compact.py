"""Compaction: what matters is kept, what is lost is recovered, and the file is as good as the report says."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sds3d import checkpoint
from sds3d.cameras.orbit import turntable_cameras
from sds3d.cli import main
from sds3d.compact.command import compact, gaussians_of
from sds3d.compact.quantise import morton_order, with_codebook
from sds3d.compact.recover import recover
from sds3d.compact.shrink import CompactConfig, shrink
from sds3d.compact.significance import significance
from sds3d.compact.views import Pictures, look, psnr, scattered_cameras
from sds3d.config.dump import dump
from sds3d.config.load import override_layers
from sds3d.convert import cloud_of
from sds3d.errors import ConfigError, InputError
from sds3d.job import load_job
from sds3d.mathx.harmonics import COUNTS, SH_DC, sh_basis
from sds3d.mesh.splat_cloud import GaussianCloud, flipped
from sds3d.mesh.splat_files import read_splats
from sds3d.mesh.splat_ply import decode_ply, encode_ply
from sds3d.rng import Stream
from tests.toys import gaussians_at, shell

STREAM = Stream(2, "compact")
QUICK = CompactConfig(size_px=48, views=12, held_out=6, steps=12, like_db=20)


def ball(count: int = 900, inside: int = 0, scale: float = 0.05) -> GaussianCloud:
    """A ball of coloured splats; `inside` more that nobody can see."""
    points = torch.cat([shell(count, 0.6), shell(inside, 0.3)]) if inside else shell(count, 0.6)
    color = 0.5 + 0.4 * torch.sin(3 * points)
    made = cloud_of(gaussians_at(points, scale=scale, opacity=0.8, color=color))
    # Equal splats would all be rounded the same way.
    return replace(made, scales=made.scales * (0.3 * STREAM.fork("scales").normal(len(points), 3)).exp())


def run_with(folder: Path, *words: str, steps_done: bool = True) -> Path:
    """A run folder as a finished run leaves it, without having run."""
    job = load_job("gaussians", override_layers(["prompt=a red mug", "scene.count=300", *words])).config
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(job))
    (folder / "manifest.json").write_text(json.dumps({"status": "done"}))
    if steps_done:
        tensors = {f"scene.{k}": v for k, v in gaussians_at(shell(700), scale=0.05).state_dict().items()}
        (folder / "checkpoints").mkdir()
        checkpoint.save(
            folder / "checkpoints", checkpoint.Checkpoint(step=3, config_hash=job.hash(), tensors=tensors)
        )
    return folder


# --------------------------------------------------------------------------------------------------- significance


def test_a_lone_gaussian_weighs_what_its_picture_weighs() -> None:
    """Closed form: sum over pixels of o exp(-s) = 2 pi o sqrt(det C), where no cut-off bites."""
    cloud = cloud_of(gaussians_at(torch.zeros(1, 3), scale=0.15, opacity=0.5))
    cameras = turntable_cameras(1, 128, elevation_deg=0.0)
    focal = float(cameras.intrinsics[0, 0, 0])
    variance = (focal * 0.15 / 3.3) ** 2 + 0.3
    cut = 1 - 1 / (0.5 * 255)  # what lies beyond alpha = 1/255 is not drawn
    expected = 2 * math.pi * 0.5 * variance * cut
    assert float(significance(cloud, cameras)) == pytest.approx(expected, rel=2e-3)


def test_what_nobody_sees_does_not_matter_and_large_ones_matter_a_little_more() -> None:
    cloud, cameras = ball(900, inside=300), scattered_cameras(12, 48, STREAM)
    score = significance(cloud, cameras)
    assert score[900:].max() < 0.05 * score[:900].mean()
    plain = significance(cloud, cameras, volume_power=0.0)
    seen = plain > 1e-3
    per_volume = (score / plain.clamp_min(1e-9) / cloud.scales.prod(1) ** 0.1)[seen]
    torch.testing.assert_close(per_volume, per_volume[:1].expand_as(per_volume), rtol=1e-4, atol=0)
    assert seen.sum() > 400


def test_pruning_by_significance_beats_pruning_at_random() -> None:
    cloud = ball(900, inside=900)
    cameras = scattered_cameras(12, 48, STREAM)
    truth = Pictures.of(cloud, cameras)
    best = significance(cloud, cameras).argsort(descending=True)[:900]
    drawn = STREAM.fork("random").uniform(1800).argsort()[:900]
    chosen, random = (psnr(Pictures.of(cloud.take(index), cameras), truth) for index in (best, drawn))
    assert chosen > random + 3


# ------------------------------------------------------------------------------------------------------- recovery


def test_recovery_brings_back_what_pruning_took() -> None:
    cloud = ball()
    teacher = Pictures.of(cloud, scattered_cameras(12, 48, STREAM))
    held_out = scattered_cameras(6, 48, STREAM.fork("held out"))
    truth = Pictures.of(cloud, held_out)
    pruned = cloud.take(torch.arange(0, 900, 2))
    tuned = recover(pruned, teacher, 40, STREAM.fork("recover"))
    before, after = (psnr(Pictures.of(some, held_out), truth) for some in (pruned, tuned))
    assert after > before + 3
    again = recover(pruned, teacher, 40, STREAM.fork("recover"))
    assert torch.equal(again.means, tuned.means)
    assert torch.equal(again.color, tuned.color)


def test_harmonics_are_distilled_into_plain_colours() -> None:
    cloud = ball(400)
    teacher_cloud = replace(cloud, harmonics=0.15 * STREAM.fork("harmonics").normal(400, 3, 3))
    cameras = scattered_cameras(16, 32, STREAM)
    teacher = Pictures.of(teacher_cloud, cameras)
    tuned = recover(teacher_cloud, teacher, 40, STREAM.fork("distil"))
    assert tuned.harmonics is None
    dropped = psnr(Pictures.of(cloud, cameras), teacher)
    assert psnr(Pictures.of(tuned, cameras), teacher) > dropped + 1


# ------------------------------------------------------------------------------------------------------ harmonics


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_harmonics_are_orthonormal(degree: int) -> None:
    """Integral over the sphere of Y_i Y_j = delta_ij, the constant included; Fibonacci points."""
    count = COUNTS[degree]
    at = shell(20_000, 1.0).double()
    basis = torch.cat([torch.full((len(at), 1), SH_DC, dtype=torch.float64), sh_basis(at, count)], 1)
    gram = 4 * math.pi * basis.T @ basis / len(at)
    torch.testing.assert_close(gram, torch.eye(count + 1, dtype=torch.float64), atol=2e-3, rtol=0)


def test_a_turned_cloud_with_harmonics_looks_the_same_from_turned_cameras() -> None:
    cloud = replace(ball(300), harmonics=0.1 * STREAM.fork("harmonics").normal(300, 15, 3))
    cameras = turntable_cameras(3, 32)
    turn = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
    black = torch.zeros(3, 3)
    straight = look(cloud, cameras, black).rgb
    turned = look(flipped(cloud), replace(cameras, c2w=turn @ cameras.c2w), black).rgb
    torch.testing.assert_close(straight, turned, atol=1e-4, rtol=0)


def with_rest(plain: bytes, rest: Tensor) -> bytes:
    """A .ply with f_rest_* fields: red, green and blue one after the other, as the 3DGS reference writes them."""
    head, mark, body = plain.partition(b"end_header\n")
    count = len(rest)
    table = torch.frombuffer(bytearray(body), dtype=torch.float32).view(count, -1)
    flat = rest.transpose(1, 2).reshape(count, -1)
    names = b"".join(b"property float f_rest_%d\n" % i for i in range(flat.shape[1]))
    return head + names + mark + torch.cat([table, flat], 1).numpy().tobytes()


def test_harmonics_of_a_ply_are_read_and_odd_numbers_refused() -> None:
    cloud = ball(20)
    rest = STREAM.fork("rest").normal(20, 8, 3)
    read = decode_ply(with_rest(encode_ply(cloud), rest), "x.ply")
    turned = flipped(replace(cloud, harmonics=rest)).harmonics
    torch.testing.assert_close(read.harmonics, turned)
    with pytest.raises(InputError, match="got 12 values f_rest"):
        decode_ply(with_rest(encode_ply(cloud), rest[:, :4]), "x.ply")


# -------------------------------------------------------------------------------------------------------- the file


def test_the_file_is_ten_times_smaller_within_the_loss(tmp_path: Path) -> None:
    """An over-dense ball, as toybox clouds are; the promises of the report are checked on the file itself."""
    cloud = ball(2000, inside=1000, scale=0.08)
    source = tmp_path / "ball.ply"
    source.write_bytes(encode_ply(cloud))
    before = source.read_bytes()
    told: list[str] = []
    result = compact(source, config=replace(QUICK, steps=25), tell=told.append)
    made = result.made
    assert result.file == tmp_path / "ball.compact.spz"
    assert source.read_bytes() == before
    assert made.ratio == pytest.approx(len(before) / result.file.stat().st_size)
    assert made.ratio >= 10
    assert made.loss_db <= 1.0
    assert made.within
    back = read_splats(result.file)
    assert len(back) == made.gaussians_after < made.gaussians_before == 3000
    held_out = scattered_cameras(QUICK.held_out, QUICK.size_px, Stream(0, "compact").fork("held out"))
    original = read_splats(source).on_cpu()
    truth = Pictures.of(original, held_out, 4)
    assert psnr(Pictures.of(back, held_out), truth) == pytest.approx(made.psnr_after_db, abs=1e-3)
    assert psnr(Pictures.of(original, held_out), truth) == pytest.approx(made.psnr_before_db, abs=1e-3)
    report = json.loads(result.report.read_text())
    assert report["ratio"] == pytest.approx(made.ratio, abs=0.01)
    assert len(report["rounds"]) == len(told) >= 3
    assert f"{made.ratio:.1f}x smaller" in result.line


def test_a_ratio_stops_the_search_early() -> None:
    cloud = ball(900, inside=300)
    easy = shrink(cloud, replace(QUICK, ratio=5.0, steps=0, max_loss_db=30))
    assert 5.0 <= easy.ratio < 9
    assert len(easy.rounds) <= 3


def test_the_file_stays_as_like_the_original_as_asked() -> None:
    cloud = ball(900, inside=300)
    loose, strict = (shrink(cloud, replace(QUICK, max_loss_db=30, like_db=like)) for like in (25, 35))
    assert 25 <= loose.agreement_db < 35 <= strict.agreement_db
    assert loose.ratio > strict.ratio


def test_a_loss_of_nothing_keeps_every_gaussian_and_says_so(tmp_path: Path) -> None:
    source = tmp_path / "ball.ply"
    source.write_bytes(encode_ply(ball(300)))
    result = compact(source, tmp_path / "out", replace(QUICK, max_loss_db=0.0, steps=0, format="splat"))
    assert result.file == tmp_path / "out" / "ball.compact.splat"
    kept_all = result.made.gaussians_after == 300
    assert kept_all or result.made.loss_db <= 0
    assert result.made.within or "quantisation alone breaks" in result.line


def test_a_codebook_holds_few_colours_near_to_all() -> None:
    cloud = ball(900)
    few = with_codebook(cloud, 32, STREAM.fork("codes"))
    assert len(few.color.unique(dim=0)) <= 32
    assert (few.color - cloud.color).norm(dim=1).mean() < 0.3 * cloud.color.std(0).norm()
    assert torch.equal(few.means, cloud.means)
    assert with_codebook(cloud, 0, STREAM) is cloud
    assert with_codebook(cloud, 900, STREAM) is cloud
    same = replace(cloud, color=torch.full_like(cloud.color, 0.25))
    torch.testing.assert_close(with_codebook(same, 32, STREAM).color, same.color)


def test_neighbours_in_space_come_after_each_other() -> None:
    points = STREAM.fork("points").uniform(500, 3)
    order = morton_order(points)
    assert sorted(order.tolist()) == list(range(500))
    ordered = points[order]
    assert (ordered[1:] - ordered[:-1]).norm(dim=1).mean() < 0.4 * (points[1:] - points[:-1]).norm(
        dim=1
    ).mean()


# ----------------------------------------------------------------------------------------------- runs and refusals


def test_a_run_is_compacted_beside_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["compact", str(run), "--steps", "5", "--size", "32", "--ratio", "5"]) == 0
    said = capsys.readouterr().out
    assert "smaller" in said.splitlines()[0]
    assert str(run / "splats.compact.spz") in said
    assert len(read_splats(run / "splats.compact.spz")) <= 700
    assert {path: path.read_bytes() for path in before} == before


def test_of_a_staged_run_the_last_stage_with_gaussians_counts(tmp_path: Path) -> None:
    stages = [{"name": "a", "folder": "stages/1-a"}, {"name": "b", "folder": "stages/2-b"}]
    run_with(tmp_path / "stages" / "1-a")
    run_with(tmp_path / "stages" / "2-b", "scene={kind: voxel}", steps_done=False)
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "stages", "stages": stages}))
    assert len(gaussians_of(tmp_path)) == 700


def test_what_cannot_be_compacted_is_one_clear_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    voxels = run_with(tmp_path / "voxels", "scene={kind: voxel}", "penalties.tv_density=1", steps_done=False)
    early = run_with(tmp_path / "early", steps_done=False)
    cut = tmp_path / "cut.spz"
    cut.write_bytes(b"no splats")
    cases = {
        str(voxels): "holds no Gaussians, its scene is voxel",
        str(early): "holds no checkpoint",
        str(tmp_path / "nothing"): "not a run folder",
        str(cut): "not a .spz file",
    }
    for source, message in cases.items():
        assert main(["compact", source]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main(["compact", str(early), "--format", "zip"]) == 2
    assert "expected one of spz, splat" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*compact*"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_loss_db", -1.0), ("ratio", 0.5), ("size_px", 3), ("keep", 1.0), ("max_loss_db", math.nan)],
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        replace(QUICK, **{name: value})
