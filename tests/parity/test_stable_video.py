"""Stable Video Diffusion against diffusers' pipeline, saved in its own format: conditions, loss, first gradients,
films, files both ways, and the full sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file

import polymodal
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.filming import Filming
from polymodal.nn.skeleton import skeleton
from polymodal.samplers.diffusion import Euler
from polymodal.samplers.edm import Karras
from polymodal.systems.stable_video import PRESETS, SCALING, StableVideo
from polymodal.weights.pipeline import INDEX
from polymodal.weights.rules import plan
from tests.parity.harness import compare_gradients, randomise

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]
FRAMES, SIDE = 3, (24, 16)
SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
    "sigma_max": 700.0, "sigma_min": 0.002, "steps_offset": 1, "timestep_spacing": "leading",
    "timestep_type": "continuous", "use_karras_sigmas": True,
}  # fmt: skip


def pipeline(folder: Path) -> Any:
    torch.manual_seed(0)
    ways = {way: [f"CrossAttn{way}BlockSpatioTemporal", f"{way}BlockSpatioTemporal"] for way in ("Down", "Up")}
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=12, down_block_types=ways["Down"], up_block_types=ways["Up"][::-1], block_out_channels=[32, 64],
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, layers_per_block=1, num_frames=FRAMES,
        cross_attention_dim=12, num_attention_heads=[2, 4], transformer_layers_per_block=[1, 2],
    )  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=["DownEncoderBlock2D"] * 2, block_out_channels=[32, 64], layers_per_block=2
    )
    eye = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=20, projection_dim=12, num_hidden_layers=2, num_attention_heads=2,
            image_size=14, patch_size=7, hidden_act="gelu",
        )
    )  # fmt: skip
    for model in (unet, vae, eye):
        model.eval()
        randomise(model, 0.05)
    pipe = diffusers.StableVideoDiffusionPipeline(
        unet=unet, vae=vae, image_encoder=eye, scheduler=diffusers.EulerDiscreteScheduler(**SCHEDULE),
        feature_extractor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 14}, crop_size={"height": 14, "width": 14}
        ),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[StableVideo, Any, Path]:
    folder = tmp_path_factory.mktemp("svd")
    pipe = pipeline(folder / "theirs")
    system = polymodal.load(folder / "theirs")
    assert isinstance(system, StableVideo)
    return system, pipe, folder


def picture(size: tuple[int, int] = SIDE) -> PILImage.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return PILImage.fromarray(noise).resize(size, PILImage.Resampling.BILINEAR)


def tensor(image: PILImage.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0).float() / 255


@pytest.mark.proves("stable_video", "parity: films, guidance and noise of a seed (diffusers)")
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_films(pair: tuple[StableVideo, Any, Path], guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    system, pipe, _ = pair
    # The pipeline resizes to CLIP's 224, whatever the tower says.
    from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as module

    shrink = module._resize_with_antialiasing
    monkeypatch.setattr(module, "_resize_with_antialiasing", lambda image, size: shrink(image, (14, 14)))
    expected = pipe(
        picture(), height=SIDE[1], width=SIDE[0], num_frames=FRAMES, num_inference_steps=4, fps=9, motion_bucket_id=40,
        max_guidance_scale=guidance, generator=torch.Generator().manual_seed(5), output_type="pt",
    ).frames[0]  # fmt: skip
    seen: list[int] = []
    made = system.film(
        "", Filming(fps=9, motion=40, steps=4, guidance=guidance, seed=5), image=tensor(picture()),
        watch=lambda glimpse: seen.append(glimpse.step),
    )  # fmt: skip
    assert made.shape == (FRAMES, 3, SIDE[1], SIDE[0])
    assert float(made.std()) > 0.05
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)
    assert seen == [1, 2, 3, 4]


@pytest.mark.proves("stable_video", "parity: loss with EDM's weights, first gradients (diffusers)")
def test_loss_and_first_gradients(pair: tuple[StableVideo, Any, Path]) -> None:
    """The loss as the paper writes it: the weighted error of the estimate of the latents."""
    system, pipe, _ = pair
    g = torch.Generator().manual_seed(3)
    films = torch.rand(2, FRAMES, 3, 8, 12, generator=g) * 2 - 1
    deviation, strength = torch.tensor([0.3, 8.0]), torch.tensor([0.02, 0.1])
    noise, posterior = (torch.randn(2, FRAMES, 4, 4, 6, generator=g) for _ in range(2))
    augment = torch.randn(2, 3, 8, 12, generator=g)
    fps, motion = torch.tensor([7.0, 25.0]), torch.tensor([127.0, 3.0])
    batch = Batch(
        pixels=films, deviation=deviation, strength=strength, noise=noise, posterior=posterior, augment=augment,
        fps=fps, motion=motion,
    )  # fmt: skip
    condition = system.condition(films[:, 0], augment, strength, fps, motion)
    with torch.no_grad():
        pixels = pipe._encode_image(condition_input(films[:, 0]) / 2 + 0.5, "cpu", 1, False)
        torch.testing.assert_close(condition["context"], pixels, atol=1e-4, rtol=0)
        latents = pipe.vae.encode(films.flatten(0, 1)).latent_dist
        x = (latents.mean + latents.std * posterior.flatten(0, 1)) * pipe.vae.config.scaling_factor
        x = x.unflatten(0, (2, FRAMES))
        first = pipe.vae.encode(films[:, 0] + strength.view(-1, 1, 1, 1) * augment).latent_dist.mode()
    sigma = deviation.view(-1, 1, 1, 1, 1)
    noisy = x + sigma * noise
    said = pipe.unet(
        torch.cat([noisy / (sigma**2 + 1).sqrt(), first[:, None].expand(-1, FRAMES, -1, -1, -1)], 2),
        deviation.log() / 4, condition["context"], torch.stack([fps - 1, motion, strength], 1),
    ).sample  # fmt: skip
    estimate = said * (-sigma / (sigma**2 + 1).sqrt()) + noisy / (sigma**2 + 1)
    expected = ((1 + sigma**2) / sigma**2 * (estimate - x) ** 2).mean()
    loss = system.loss(batch).mean
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    loss.backward()
    theirs = {f"unet.{n}": p.grad for n, p in pipe.unet.named_parameters()}
    for name, part in (("vae", pipe.vae), ("image_encoder", pipe.image_encoder)):
        theirs |= {f"{name}.{n}": torch.zeros_like(p) for n, p in part.named_parameters()}
    theirs = {name: gradient for name, gradient in theirs.items() if gradient is not None}
    compare_gradients(system, theirs)
    system.zero_grad()
    pipe.unet.zero_grad()


def condition_input(first: torch.Tensor) -> torch.Tensor:
    from polymodal.nn.resize import shrunk

    return shrunk(first, 14)


@pytest.mark.proves("stable_video", "training: what is dropped is zero")
def test_conditions_are_dropped(pair: tuple[StableVideo, Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    system, _, _ = pair
    seen: list[Batch] = []
    denoise = StableVideo.denoise
    monkeypatch.setattr(
        StableVideo,
        "denoise",
        lambda self, x, told, condition: (seen.append(condition), denoise(self, x, told, condition))[1],
    )
    films = torch.rand(4, 2, 3, 8, 8)
    numbers = torch.full((4,), 7.0)
    batch = Batch(pixels=films, fps=numbers, motion=numbers, chance=torch.tensor([5, 15, 25, 30]))
    system.train()
    system.loss(batch)
    system.eval()
    (told,) = seen
    assert [bool(row.any()) for row in told["context"]] == [False, False, True, True]
    assert [bool(row.any()) for row in told["latents"]] == [True, False, False, True]


@pytest.mark.proves("stable_video", "weights: files both ways (diffusers)")
def test_files(pair: tuple[StableVideo, Any, Path]) -> None:
    system, _, folder = pair
    system.save(folder / "ours")
    for part, file in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("image_encoder", "model"),
    ):
        before, after = (load_file(folder / w / part / f"{file}.safetensors") for w in ("theirs", "ours"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    pipe = diffusers.StableVideoDiffusionPipeline.from_pretrained(folder / "ours")
    assert pipe.unet.config.num_frames == FRAMES
    assert pipe.scheduler.config.sigma_max == 700
    assert polymodal.load(folder / "ours").config == system.config


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("unet", {"num_attention_heads": [3, 4]}, "whole heads"),
        ("unet", {"up_block_types": ["UpBlockSpatioTemporal"] * 2}, "up_block_types"),
        ("unet", {"cross_attention_dim": 16}, "a vector of 12"),
        ("unet", {"invented": 1}, "invented"),
        ("vae", {"layers_per_block": 1}, "layers_per_block"),
        ("image_encoder", {"model_type": "siglip_vision_model"}, "model_type"),
        ("scheduler", {"use_karras_sigmas": False}, "use_karras_sigmas"),
        ("scheduler", {"sigma_max": 0.001}, "sigma_max"),
    ],
)
def test_configs_that_are_wrong(
    pair: tuple[StableVideo, Any, Path], tmp_path: Path, part: str, fields: dict[str, Any], message: str
) -> None:
    source = pair[2] / "theirs"
    copy = tmp_path / "copy"
    for file in source.rglob("*.json"):
        target = copy / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text())
    name = copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    name.write_text(json.dumps(json.loads(name.read_text()) | fields))
    with pytest.raises(ConfigError, match=message):
        polymodal.load(copy)
    assert (copy / INDEX).is_file()


def test_what_it_cannot_film(pair: tuple[StableVideo, Any, Path]) -> None:
    system, _, _ = pair
    with pytest.raises(UnsupportedError, match="reads no text"):
        system.film("a cat", Filming(size=SIDE), image=tensor(picture()))
    with pytest.raises(UnsupportedError, match="picture"):
        system.film("", Filming(size=SIDE))
    with pytest.raises(ConfigError, match="multiples of 2"):
        system.film("", Filming(size=(25, 16)))
    with pytest.raises(MediaError, match="24 x 16"):
        system.film("", Filming(size=(16, 16)), image=tensor(picture()))
    assert system.size == (32, 18)


@pytest.mark.proves("stable_video", "weights: every tensor of the full-size checkpoints")
@pytest.mark.parametrize("name", list(PRESETS))
def test_full_sizes(name: str) -> None:
    config = PRESETS[name]()
    assert StableVideo.formats["hf"].read(StableVideo.formats["hf"].write(config))[0] == config
    with torch.device("meta"):
        unet = diffusers.UNetSpatioTemporalConditionModel(sample_size=96, num_frames=config.backbone.frames)
        vae = diffusers.AutoencoderKLTemporalDecoder(
            down_block_types=["DownEncoderBlock2D"] * 4, block_out_channels=[128, 256, 512, 512], layers_per_block=2
        )
        eye = transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                hidden_size=1280, intermediate_size=5120, projection_dim=1024, num_hidden_layers=32,
                num_attention_heads=16, image_size=224, patch_size=14, hidden_act="gelu",
            )
        )  # fmt: skip
    assert sum(p.numel() for p in unet.parameters()) == 1_524_623_082
    theirs = {
        f"{part}.{n}": t
        for part, model in (("image_encoder", eye), ("unet", unet), ("vae", vae))
        for n, t in model.state_dict().items()
        if "position_ids" not in n
    }
    with skeleton():
        ours = StableVideo(config)
    assert sum(p.numel() for p in ours.backbone.parameters()) == 1_524_623_082
    todo = plan(StableVideo.formats["hf"].rules(config), theirs, ours.state_dict())
    assert not todo.problems, todo.problems[:5]
    assert not todo.dropped


@pytest.mark.proves("stable_video", "sampling: Karras' deviations and continuous velocity (diffusers)")
@pytest.mark.parametrize("steps", [5, 10])
def test_euler_over_karras_deviations(steps: int) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(9)) / 2

    def velocity(x: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        return torch.einsum("oc,bchw->bohw", mix, x).tanh() + 0.1 * when.view(-1, 1, 1, 1)

    noise = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    x = noise * scheduler.init_noise_sigma
    asked = []
    for t in scheduler.timesteps:
        asked.append(float(t))
        x = scheduler.step(velocity(scheduler.scale_model_input(x, t), t.expand(2)), t, x).prev_sample
    karras = Karras(scaling=SCALING, solver=Euler(), most=700.0)
    points = karras.points(steps)
    told = [float(SCALING.told(torch.tensor(point.deviation))) for point in points[:-1]]
    assert told == pytest.approx(asked, rel=1e-5)
    made = karras.sample(
        lambda x, d: -velocity(SCALING.reads(d).view(-1, 1, 1, 1) * x, SCALING.told(d)), noise * points[0].rest, points
    )
    torch.testing.assert_close(made, x, atol=1e-4, rtol=1e-5)
