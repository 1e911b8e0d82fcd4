"""`sds3d image`: distillation with the identity for a renderer."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from sds3d.cli import main
from sds3d.config.load import override_layers
from sds3d.config.ramp import Ramp
from sds3d.errors import ConfigError, InputError
from sds3d.guidance import SDS
from sds3d.guidance.noise import FreshNoise
from sds3d.guidance.terms import Term
from sds3d.guidance.time import UniformTime
from sds3d.guide import Guide
from sds3d.imaging import ImageConfig, distill, load_image
from sds3d.job import load_job
from sds3d.priors.analytic import AnalyticPrior, Mixture
from sds3d.priors.text import PromptingConfig, TextBank
from sds3d.rng import Streams

TARGET = 0.2 + 0.6 * torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))


def guide_of(**options) -> Guide:
    prior = AnalyticPrior({"y": Mixture.gaussian(TARGET, 0.01), "": Mixture.gaussian(0 * TARGET, 0.01)})
    rule = SDS(SDS.Config(cfg_scale=1.0, **options), prior)
    return Guide(
        prior=prior,
        terms=(Term(rule=rule, weight=Ramp.constant(1.0)),),
        bank=TextBank(prior, "y", "", PromptingConfig(view_dependent=False)),
        time=UniformTime(UniformTime.Config()),
        noise=FreshNoise(FreshNoise.Config()),
        streams=Streams(0),
    )


@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_images_end_at_the_mean_of_a_gaussian_prior(space) -> None:
    job = load_job(
        "image", override_layers(["prompt=y", "steps=300", "optimizer.lr_factor={from: 1, to: 0.02}"])
    )
    config = ImageConfig(count=3, space=space)
    frames = distill(guide_of(), job.config, config, None, lambda event: None)
    assert len(frames) == 9
    assert frames[0].shape == (3, 3, 8, 8)
    assert torch.equal(frames[0], torch.ones(3, 3, 8, 8))
    assert (frames[-1] - TARGET).abs().max() < 0.05


def test_image_space_targets_pull_too() -> None:
    """With the eps gradient switched off (weight 0 of the term), the decoded target alone moves the picture."""
    guide = guide_of(image_weight=0.2)
    job = load_job("image", override_layers(["prompt=y", "steps=200"])).config
    plain = distill(guide_of(), job, ImageConfig(count=1), None, lambda event: None)[-1]
    pulled = distill(guide, job, ImageConfig(count=1), None, lambda event: None)[-1]
    assert not torch.equal(plain, pulled)
    assert (pulled - TARGET).abs().mean() < 0.05


def test_the_command_writes_pictures_and_repeats_itself(tmp_path: Path) -> None:
    words = ["image", "a red mug", "--method", "csd", "--steps", "9", "--count", "2", "guidance.weight=recon"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    assert main([*words, "--out", str(tmp_path / "b")]) == 0
    strips = [(tmp_path / name / "strip.png").read_bytes() for name in "ab"]
    assert strips[0] == strips[1]
    with Image.open(tmp_path / "a" / "strip.png") as strip:
        assert strip.size == (2 * 9 * 64, 2 * 2 * 64)
    assert "kind: csd" in (tmp_path / "a" / "config.yaml").read_text()


def test_editing_rules_start_from_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "white.png"
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(picture)
    assert torch.equal(load_image(picture), torch.ones(3, 40, 40))
    words = ["image", "a blue mug", "--method", "dds", "--steps", "2", "--count", "1"]
    assert main([*words, "--out", str(tmp_path / "no")]) == 2
    assert "edit" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert main([*words, "--init", str(picture), "--out", str(tmp_path / "yes")]) == 0
    assert main([*words, "--init", str(tmp_path / "none.png"), "--out", str(tmp_path / "never")]) == 2
    assert not (tmp_path / "never").exists()


def test_rules_ask_before_anything_is_loaded() -> None:
    for words, message in (
        (["guidance=rfds"], "prior.as_flow"),
        (["guidance=isd"], "prior.image_prompt"),
        (["guidance=dds"], "edit.run"),
    ):
        job = load_job("default", override_layers(["prompt=a red mug", *words, "prior.name=sd15"])).config
        with pytest.raises(ConfigError, match=message):
            job.validate()
    with pytest.raises(InputError, match="picture"):
        load_image(Path(__file__))
