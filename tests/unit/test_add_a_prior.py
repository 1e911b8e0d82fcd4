"""The walk-through docs/add_a_prior.md, done exactly as it says."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, UNet2DModel

from sds3d.__main__ import main
from sds3d.errors import PriorError
from sds3d.priors import PriorConfig, load_prior, prior_offers
from sds3d.priors.families import FAMILIES, Family
from sds3d.priors.folder import PipelineFolder
from tests.tiny.checks import picture, randn, sample

DOC = Path(__file__).parents[2] / "docs" / "add_a_prior.md"
CPU = torch.device("cpu")


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The printed file, imported as a family, and the printed line in the table."""
    text = DOC.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    pipeline, line = re.search(r'^    "(\w+)": (Family\(.*\)),$', text, re.MULTILINE).groups()
    entry = eval(line, {"Family": Family})
    name = f"sds3d.priors.families.{entry.module}"
    file = tmp_path / f"{entry.module}.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(FAMILIES, pipeline, entry)
    return pipeline


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_printed_family_reproduces_its_pipeline(family: str, folder: Path) -> None:
    assert PipelineFolder(folder).pipeline == family
    prior = load_prior(PriorConfig(name=str(folder), dtype="float32"), CPU)
    assert (prior.shape, prior.image_px) == ((3, 16, 16), 16)
    pipeline = DDIMPipeline(
        unet=prior.denoiser.module, scheduler=DDIMScheduler.from_pretrained(folder / "scheduler")
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images = pipeline(generator=generator, num_inference_steps=5, output_type="np").images
    start = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    ours = prior.decode(sample(prior, start, [1.0, 0.8, 0.6, 0.4, 0.2, 0.0])).clamp(0.0, 1.0)
    torch.testing.assert_close(ours, torch.from_numpy(images).permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prior.decode(prior.encode(picture(16))), picture(16))


def test_what_it_offers_and_says_is_used(
    family: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PriorConfig(name=str(folder), dtype="float32")
    assert prior_offers(config) == frozenset()
    prior = load_prior(config, CPU)
    assert "reads no text" in prior.warnings(["a red mug"])[0]
    assert prior.warnings([""]) == []
    prior.release_text()
    assert prior.encode_text(["a", "b"]).shape == (2, 1, 1)
    (eps,) = prior.eps(randn(2, 3, 16, 16), torch.tensor([0.3, 0.9]), _told(prior))
    assert eps.shape == (2, 3, 16, 16)
    assert main(["priors", "--check", str(folder)]) == 0
    assert "DDPM (pixels, no text)" in capsys.readouterr().out


def test_without_its_line_the_folder_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(
        PriorError, match=r"pipeline 'DDPMPipeline' is of no known family.*known: .*FluxPipeline"
    ):
        load_prior(PriorConfig(name=str(folder)), CPU)


def _told(prior):
    from sds3d.interfaces import Told

    return Told(text=prior.encode_text(["a", "b"]))
