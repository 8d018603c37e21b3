"""Stable Diffusion 1 and 2 and SDXL against diffusers' pipelines, saved in their own format: conditions, loss, first
gradients, pictures, files both ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import polymodal
from polymodal.backbones.controlnet import ControlConfig
from polymodal.core.batch import Batch
from polymodal.core.drawing import Drawing
from polymodal.core.errors import ConfigError, MediaError, PolymodalError, UnsupportedError, WeightsError
from polymodal.samplers.guidance import Dice
from polymodal.systems.controlnet import ControlNet
from polymodal.systems.sdxl import SDXL
from polymodal.systems.stable_diffusion import StableDiffusion
from polymodal.tokenizers.text import TextTokenizer
from polymodal.weights.pipeline import INDEX
from tests.parity.harness import randomise

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

# numpy's, about how diffusers makes arrays of tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CLAIM = "parity: conditions, loss, first gradients, pictures, files both ways (diffusers)"
CONTEXT = 12
TEXTS = ["a red cup on a table", "two cats"]
CROSS = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "sd1": (
        {"attention_head_dim": 2},
        lambda: diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False),
    ),
    "sd2": (
        {"attention_head_dim": [2, 4], "use_linear_projection": True},
        lambda: diffusers.DDIMScheduler(
            **BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"
        ),
    ),
    "sdxl": (
        {
            "down_block_types": CROSS[0][::-1], "up_block_types": CROSS[1][::-1], "attention_head_dim": [2, 4],
            "transformer_layers_per_block": [1, 2], "use_linear_projection": True, "cross_attention_dim": 28,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 10 + 6 * 8,
        },
        lambda: diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
    ),
}  # fmt: skip


def tokenizer(folder: Path) -> Any:
    TextTokenizer.train_bpe([*TEXTS, "a cup and a cat"] * 4, 540, length=CONTEXT).save(folder)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def pipeline(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    fields, scheduler = KINDS[kind]
    tokens = tokenizer(folder / "made")
    text = {
        "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": len(tokens), "max_position_embeddings": CONTEXT,
        "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1,
    }  # fmt: skip
    sizes = {
        "block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 12,
        "down_block_types": CROSS[0], "up_block_types": CROSS[1], "sample_size": 8,
    }  # fmt: skip
    vae = {"block_out_channels": [4, 8], "norm_num_groups": 2, "down_block_types": ["DownEncoderBlock2D"] * 2,
           "up_block_types": ["UpDecoderBlock2D"] * 2}  # fmt: skip
    parts = {
        "text_encoder": transformers.CLIPTextModel(
            transformers.CLIPTextConfig(**text, hidden_size=12, intermediate_size=20)
        ),
        "unet": diffusers.UNet2DConditionModel(**sizes | fields),
        "vae": diffusers.AutoencoderKL(**vae),
    }
    if kind == "sdxl":
        config = transformers.CLIPTextConfig(
            **text, hidden_size=16, intermediate_size=24, projection_dim=10, hidden_act="gelu"
        )
        parts["text_encoder_2"] = transformers.CLIPTextModelWithProjection(config)
        cls, more = diffusers.StableDiffusionXLPipeline, {"tokenizer_2": tokenizer(folder / "made")}
    else:
        cls, more = diffusers.StableDiffusionPipeline, {"safety_checker": None, "feature_extractor": None}
        more["requires_safety_checker"] = False
    for model in parts.values():
        model.eval()
        randomise(model, 0.1)
    pipe = cls(**parts, tokenizer=tokens, scheduler=scheduler(), **more)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "theirs")
    return pipe


@pytest.fixture(
    params=[
        pytest.param(kind, marks=pytest.mark.proves("sdxl" if kind == "sdxl" else "stable_diffusion", CLAIM), id=kind)
        for kind in KINDS
    ]
)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[StableDiffusion | SDXL, Any, Path]:
    pipe = pipeline(request.param, tmp_path)
    system = polymodal.load(tmp_path / "theirs")
    assert isinstance(system, StableDiffusion | SDXL)
    return system, pipe, tmp_path


def conditions(pipe: Any, texts: list[str]) -> dict[str, Tensor]:
    """What their pipeline makes of prompts."""
    if not hasattr(pipe, "text_encoder_2"):
        return {"context": pipe.encode_prompt(texts, "cpu", 1, False)[0]}
    context, _, pooled, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
    return {"context": context, "pooled": pooled}


def test_conditions(pair: tuple[StableDiffusion | SDXL, Any, Path]) -> None:
    system, pipe, _ = pair
    mine = system.text_condition(TEXTS)
    for name, expected in conditions(pipe, TEXTS).items():
        torch.testing.assert_close(mine[name], expected, rtol=0, atol=1e-5)
    with pytest.raises(MediaError, match="at most 12"):
        system.prompt(["cup " * 30])


def test_loss_and_first_gradients(pair: tuple[StableDiffusion | SDXL, Any, Path]) -> None:
    system, pipe, _ = pair
    pixels, noise = torch.rand(2, 3, 16, 20) * 2 - 1, torch.randn(2, 4, 8, 10)
    posterior, when = torch.randn(2, 4, 8, 10), torch.tensor([20, 930])
    batch = Batch(system.prompt(TEXTS), pixels=pixels, noise=noise, posterior=posterior, when=when)
    told = conditions(pipe, TEXTS)
    drawn = pipe.vae.encode(pixels).latent_dist
    latents = (drawn.mean + drawn.std * posterior) * pipe.vae.config.scaling_factor
    train = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    velocity = train.config.prediction_type == "v_prediction"
    target = train.get_velocity(latents, noise, when) if velocity else noise
    added = {}
    if "pooled" in told:
        sizes = torch.tensor([[16.0, 20, 0, 0, 16, 20]] * 2)
        added = {"added_cond_kwargs": {"text_embeds": told["pooled"], "time_ids": sizes}}
    noisy = train.add_noise(latents, noise, when)
    expected = pipe.unet(noisy, when, told["context"].detach(), **added).sample
    torch.testing.assert_close(system(batch), expected, rtol=0, atol=1e-5)
    theirs, mine = (expected - target.detach()).square().mean(), system.loss(batch).mean
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    mine.backward()
    pipe.unet.zero_grad()
    theirs.backward()
    gradients = system.to_hub(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in system.named_parameters()}
    )
    for name, parameter in pipe.unet.named_parameters():
        torch.testing.assert_close(gradients[f"unet.{name}"], parameter.grad, rtol=0, atol=1e-5, msg=name)
    assert all(p.grad is None for n, p in system.named_parameters() if not n.startswith("backbone."))


def test_dropped_texts_are_the_empty_one(pair: tuple[StableDiffusion | SDXL, Any, Path]) -> None:
    system, _, _ = pair
    batch = system.prompt(TEXTS)
    dropped = system.condition(system.drop(batch, torch.tensor([True, False])))
    empty, kept = system.text_condition([""]), system.text_condition(TEXTS)
    for name in ("context", "pooled"):
        if name in kept:
            torch.testing.assert_close(dropped[name], torch.cat([empty[name], kept[name][1:]]))
    if isinstance(system, SDXL):
        assert not empty["context"].any()
        assert not empty["pooled"].any()


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_pictures(pair: tuple[StableDiffusion | SDXL, Any, Path], guidance: float) -> None:
    system, pipe, _ = pair
    noise = torch.cat([Dice([seed])((4, 8, 8), torch.device("cpu")) for seed in (7, 8)])
    theirs = pipe(
        TEXTS, num_inference_steps=4, guidance_scale=guidance, latents=noise, output_type="pt", height=16, width=16
    ).images
    mine = system.draw(TEXTS, Drawing(steps=4, guidance=guidance, seed=7, size=(16, 16)))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.parent.name}.{name}": tensor
        for file in folder.glob("*/*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_files_both_ways(pair: tuple[StableDiffusion | SDXL, Any, Path]) -> None:
    system, pipe, folder = pair
    system.save(folder / "ours")
    before, after = tensors(folder / "theirs"), tensors(folder / "ours")
    # transformers 5 leaves a word out of the names of a tower without a projection; published files have it.
    before = {
        name if "text_encoder." not in name else name.replace("text_encoder.", "text_encoder.text_model."): t
        for name, t in before.items()
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = type(pipe).from_pretrained(folder / "ours")
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is type(pipe.scheduler)
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if isinstance(system, SDXL) else [])):
        theirs, ours = (getattr(one, part).state_dict() for one in (pipe, again))
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    latents = torch.randn(1, 4, 8, 8)
    how = {"num_inference_steps": 3, "output_type": "pt", "height": 16, "width": 16}
    one, other = (each(TEXTS[0], latents=latents, **how).images for each in (pipe, again))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    loaded = polymodal.load(folder / "ours")
    assert loaded.config == system.config
    assert loaded.fingerprint == system.fingerprint
    assert torch.equal(loaded.prompt(TEXTS)["ids"], system.prompt(TEXTS)["ids"])


# ---- ControlNet


@pytest.fixture
def controlled(tmp_path: Path) -> tuple[ControlNet, Any, Path]:
    """Over a Stable Diffusion; the zeros are noise, so that what is behind them shows."""
    base = pipeline("sd1", tmp_path)
    copy = diffusers.ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 6)).eval()
    randomise(copy, 0.1)
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=copy, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "control")
    system = polymodal.load(tmp_path / "control")
    assert isinstance(system, ControlNet)
    return system, pipe, tmp_path


@pytest.mark.proves("controlnet", "parity: loss, first gradients (diffusers)")
def test_controlnet_loss_and_first_gradients(controlled: tuple[ControlNet, Any, Path]) -> None:
    system, pipe, _ = controlled
    latents, noise, when = torch.randn(2, 4, 8, 10), torch.randn(2, 4, 8, 10), torch.tensor([20, 930])
    control = torch.rand(2, 3, 16, 20)
    batch = Batch(system.prompt(TEXTS), latents=latents, noise=noise, when=when, control=control)
    context = conditions(pipe, TEXTS)["context"].detach()
    noisy = diffusers.DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, when)
    down, middle = pipe.controlnet(noisy, when, context, control, return_dict=False)
    told = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    expected = pipe.unet(noisy, when, context, **told).sample
    torch.testing.assert_close(system(batch), expected, rtol=0, atol=1e-5)
    theirs, mine = (expected - noise).square().mean(), system.loss(batch).mean
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    theirs.backward()
    mine.backward()
    gradients = system.to_hub(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in system.named_parameters()}
    )
    for name, parameter in pipe.controlnet.named_parameters():
        torch.testing.assert_close(gradients[f"controlnet.{name}"], parameter.grad, rtol=0, atol=1e-5, msg=name)
    assert all(p.grad is None for n, p in system.named_parameters() if not n.startswith("control."))


@pytest.mark.proves("controlnet", "parity: pictures, guess mode (diffusers)")
@pytest.mark.parametrize("guess", [False, True])
def test_controlnet_pictures(controlled: tuple[ControlNet, Any, Path], guess: bool) -> None:
    system, pipe, folder = controlled
    control = torch.rand(1, 3, 16, 16)
    system.scale, system.guess = 0.7, guess
    noise = Dice([7])((4, 8, 8), torch.device("cpu"))
    theirs = pipe(
        TEXTS[0], image=control, num_inference_steps=3, guidance_scale=6.0, latents=noise, output_type="pt",
        controlnet_conditioning_scale=0.7, guess_mode=guess,
    ).images  # fmt: skip
    drawing = Drawing(steps=3, guidance=6.0, seed=7, size=(16, 16))
    torch.testing.assert_close(system.draw(TEXTS[:1], drawing, control=control), theirs, rtol=0, atol=1e-4)
    plain = polymodal.load(folder / "theirs").draw(TEXTS[:1], drawing)
    torch.testing.assert_close(system.draw(TEXTS[:1], drawing), plain, rtol=0, atol=1e-5)
    assert float((theirs - plain).abs().max()) > 1e-3


@pytest.mark.proves("controlnet", "files both ways (diffusers)")
def test_controlnet_files_both_ways(controlled: tuple[ControlNet, Any, Path]) -> None:
    system, pipe, folder = controlled
    system.save(folder / "ours")
    again = diffusers.ControlNetModel.from_pretrained(folder / "ours", subfolder="controlnet")
    before, after = pipe.controlnet.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert polymodal.load(folder / "ours").config == system.config


@pytest.mark.proves("controlnet", "init: a fresh one is a copy and changes nothing")
def test_a_fresh_controlnet_changes_nothing(folder: Path) -> None:
    base = polymodal.load(folder)
    assert isinstance(base, StableDiffusion)
    with pytest.raises(ConfigError, match="times smaller"):  # eight times, the nano one's autoencoder twice
        ControlNet.over(base)
    control = ControlConfig(widths=(4, 6))
    model = ControlNet.over(base, control)
    drawing = Drawing(steps=2, seed=3, size=(16, 16))
    picture = model.draw(TEXTS[:1], drawing, control=torch.rand(1, 3, 16, 16))
    torch.testing.assert_close(picture, base.draw(TEXTS[:1], drawing), rtol=0, atol=1e-5)
    mine = model.control.encoder.state_dict()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in base.backbone.encoder.state_dict().items())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"control.{name}" for name, _ in model.control.named_parameters()}


# ---- hostile folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd1")
    pipeline("sd1", path)
    return path / "theirs"


def index(folder: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(folder, to)
    raw = json.loads((to / INDEX).read_text())
    (to / INDEX).write_text(json.dumps(raw | changes))
    return to


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "unet/config.json is of 'UNet2DConditionModel'"),
        ({"unet": [None, None]}, "there is no unet"),
        ({"unet": ["diffusers"]}, "expected a library and a class"),
        ({"unet": "unet"}, "unet"),
        ({"../unet": ["diffusers", "UNet2DConditionModel"]}, "not understood"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet"),
        ({"_class_name": "KandinskyPipeline"}, "no system reads _class_name"),
        ({"_class_name": 3}, "no system reads _class_name"),
        ({"scheduler": ["diffusers", "LCMScheduler"]}, "LCMScheduler"),
    ],
)
def test_an_index_that_is_wrong_is_refused(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        polymodal.load(index(folder, tmp_path / "copy", **changes))


def test_parts_that_are_broken_are_all_named(folder: Path, tmp_path: Path) -> None:
    copy = index(folder, tmp_path / "copy")
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    file = copy / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(WeightsError) as error:
        polymodal.load(copy)
    assert [problem.split(":")[0] for problem in error.value.problems] == ["text_encoder", "vae"]
    shutil.rmtree(copy / "unet")
    with pytest.raises(PolymodalError, match=r"unet.config\.json does not exist"):
        polymodal.load(copy)


def test_tensors_too_many_and_too_few_are_named(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    copy = index(folder, tmp_path / "copy")
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    held = load_file(file)
    held["invented.weight"] = held.pop("conv_in.bias")
    save_file(held, file)
    with pytest.raises(WeightsError, match=r"(?s)unet.invented.weight.*no rule takes it.*unet.conv_in.bias"):
        polymodal.load(copy)


def test_without_tokenizers_there_are_no_prompts(folder: Path, tmp_path: Path) -> None:
    copy = index(folder, tmp_path / "copy")
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        polymodal.load(copy).draw(["a cup"], Drawing())
