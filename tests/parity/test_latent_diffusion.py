"""The parts of Stable Diffusion and SDXL against diffusers: autoencoder and U-Net, outputs, gradients, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from polymodal.backbones.unet import UNet
from polymodal.backbones.unet_files import read_unet, unet_rules, write_unet
from polymodal.core.errors import ConfigError
from polymodal.systems.vae_files import read_vae, vae_rules, write_vae
from polymodal.tokenizers.vae import VAE, vae_loss
from polymodal.weights.fields import Fields
from polymodal.weights.rules import Rule, plan, to_theirs
from tests.parity.harness import randomise

diffusers = pytest.importorskip("diffusers")

VAES: dict[str, dict[str, Any]] = {
    "sd": {},
    "sdxl": {"scaling_factor": 0.13025, "layers_per_block": 2},
    "sd3": {
        "latent_channels": 6, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "three levels, no attention": {"block_out_channels": [4, 8, 8], "mid_block_add_attention": False},
}  # fmt: skip
CROSS = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"attention_head_dim": 2},
    "sd2": {"attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True},
    "sdxl": {
        "down_block_types": CROSS[0][::-1], "up_block_types": CROSS[1][::-1], "attention_head_dim": [2, 4],
        "transformer_layers_per_block": [1, 2], "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 10 + 6 * 8,
    },
    "four levels": {
        "block_out_channels": [8, 8, 16, 16], "attention_head_dim": 2, "layers_per_block": 2,
        "down_block_types": [CROSS[0][0]] * 3 + [CROSS[0][1]], "up_block_types": [CROSS[1][0]] + [CROSS[1][1]] * 3,
    },
}  # fmt: skip


def saved(model: Any, folder: Path) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """A reference with noise on every weight, its config file and the tensors of its file."""
    model = model.eval()
    randomise(model, 0.1)
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    return model, raw, load_file(folder / "diffusion_pytorch_model.safetensors")


def fields(raw: dict[str, Any]) -> Fields:
    f = Fields(raw)
    f.ignore("bookkeeping", "_class_name", "_diffusers_version")
    return f


def fill(ours: nn.Module, rules: list[Rule], theirs: dict[str, Tensor]) -> None:
    todo = plan(rules, theirs, ours.state_dict())
    assert not todo.problems, todo.problems
    assert not todo.dropped
    ours.load_state_dict(dict(todo.tensors(theirs.__getitem__, "here")))
    written = to_theirs(rules, ours.state_dict())
    assert written.keys() == theirs.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in theirs.items())


def same_gradients(ours: nn.Module, rules: list[Rule], theirs: nn.Module) -> None:
    mine = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in ours.named_parameters()}
    got = to_theirs(rules, mine)
    for name, parameter in theirs.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(got[name] / scale, expected / scale, rtol=0, atol=1e-5, msg=name)


def vae(kind: str, folder: Path) -> tuple[VAE, list[Rule], Any]:
    torch.manual_seed(0)
    widths = VAES[kind].get("block_out_channels", [4, 8])
    sizes = {"block_out_channels": widths, "norm_num_groups": 2}
    types = {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    reference, raw, tensors = saved(diffusers.AutoencoderKL(**sizes | types | VAES[kind]), folder)
    f = fields(raw)
    config = read_vae(f)
    f.done()
    again = Fields(write_vae(config))
    assert read_vae(again) == config
    again.done()
    assert diffusers.AutoencoderKL(**write_vae(config)).state_dict().keys() == tensors.keys()
    ours, rules = VAE(config).eval(), vae_rules("", "", config)
    fill(ours, rules, tensors)
    return ours, rules, reference


@pytest.mark.parametrize("kind", VAES)
def test_autoencoder(kind: str, tmp_path: Path) -> None:
    ours, rules, reference = vae(kind, tmp_path)
    c = ours.config
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    theirs, mine = reference.encode(pixels).latent_dist, ours.posterior(pixels)
    noise = torch.randn(mine.mean.shape)
    torch.testing.assert_close(mine.mean, theirs.mode(), rtol=0, atol=1e-5)
    torch.testing.assert_close(mine.log_variance, theirs.logvar, rtol=0, atol=1e-5)
    torch.testing.assert_close(mine.divergence(), theirs.kl(), rtol=1e-5, atol=1e-5)
    drawn = theirs.mean + theirs.std * noise
    torch.testing.assert_close(mine.at(noise), drawn, rtol=0, atol=1e-5)
    latents = ours.encode(pixels, noise)
    shift = reference.config.shift_factor or 0.0
    torch.testing.assert_close(latents, (drawn - shift) * reference.config.scaling_factor, rtol=0, atol=1e-5)
    assert latents.shape[1:] == ours.shape((24, 16))
    torch.testing.assert_close(ours.encode(pixels), (mine.mean - c.shift) * c.scale)
    ours_out, theirs_out = ours.decode(latents), reference.decode(drawn).sample
    torch.testing.assert_close(ours_out, theirs_out, rtol=0, atol=1e-5)
    for out, cost in ((ours_out, mine.divergence()), (theirs_out, theirs.kl())):
        ((out - pixels).abs().mean() + 1e-3 * cost.mean()).backward()
    same_gradients(ours, rules, reference)


def test_autoencoder_files_of_2022(tmp_path: Path) -> None:
    ours, rules, reference = vae("sd", tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in reference.state_dict().items():
        for new, was in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
        tensors[name] = tensor
    todo = plan(rules, tensors, ours.state_dict())
    assert not todo.problems
    assert sum("proj_attn" in step.theirs[0] for step in todo.steps) == 4


def test_the_loss_of_an_autoencoder(tmp_path: Path) -> None:
    """Its parts one by one, and the weight of the judge's by the gradients of the last layer."""
    ours, _, _ = vae("sd", tmp_path)
    pixels, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 4, 4, 4)
    posterior = ours.posterior(pixels)
    made = ours.reconstruct(posterior.at(noise))
    rows = (made - pixels).abs().sum((1, 2, 3))
    plain = (rows + 1e-6 * posterior.divergence()).mean()
    torch.testing.assert_close(vae_loss(ours, pixels, noise).mean, plain)
    far = vae_loss(ours, pixels, noise, distance=lambda one, other: (one - other).square().mean((1, 2, 3)))
    torch.testing.assert_close(far.mean, plain + (made - pixels).square().sum((1, 2, 3)).mean())
    judge = nn.Conv2d(3, 1, 4)
    deceived = -judge(made).mean()
    last = ours.decoder.last.weight
    slopes = [torch.autograd.grad(cost, last, retain_graph=True)[0].norm() for cost in (rows.mean(), deceived)]
    expected = plain + 0.5 * slopes[0] / (slopes[1] + 1e-4) * deceived
    torch.testing.assert_close(vae_loss(ours, pixels, noise, judge=judge).mean, expected)


def unet(kind: str, folder: Path) -> tuple[UNet, list[Rule], Any]:
    torch.manual_seed(0)
    sizes = {
        "block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 12,
        "down_block_types": CROSS[0], "up_block_types": CROSS[1], "sample_size": 8,
    }  # fmt: skip
    reference, raw, tensors = saved(diffusers.UNet2DConditionModel(**sizes | UNETS[kind]), folder)
    f = fields(raw)
    config = read_unet(f)
    f.done()
    again = Fields(write_unet(config))
    assert read_unet(again) == config
    again.done()
    twin = diffusers.UNet2DConditionModel(**write_unet(config)).state_dict()
    assert {name: t.shape for name, t in twin.items()} == {name: t.shape for name, t in tensors.items()}
    ours, rules = UNet(config).eval(), unet_rules("", "", config)
    fill(ours, rules, tensors)
    return ours, rules, reference


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
@pytest.mark.parametrize("kind", UNETS)
def test_unet(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    ours, rules, reference = unet(kind, tmp_path)
    x, context = torch.randn(2, 4, *size), torch.randn(2, 5, 12)
    step, target = torch.tensor([3, 981]), torch.randn(2, 4, *size)
    more, added = {}, {}
    if ours.config.added is not None:
        more = {"pooled": torch.randn(2, 10), "numbers": torch.tensor([[1024.0, 768, 0, 16, 512, 512]] * 2)}
        added = {"added_cond_kwargs": {"text_embeds": more["pooled"], "time_ids": more["numbers"]}}
    mine, theirs = ours(x, step, context, **more), reference(x, step, context, **added).sample
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    losses = [(out - target).square().mean() for out in (mine, theirs)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    same_gradients(ours, rules, reference)


def test_a_fresh_unet_predicts_nothing(tmp_path: Path) -> None:
    """The zeros of the official code: shortcuts and the last layer; everything else is drawn."""
    ours, _, _ = unet("sdxl", tmp_path)
    ours.init_weights()
    out = ours(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 5, 12), pooled=torch.randn(1, 10),
               numbers=torch.ones(1, 6))  # fmt: skip
    assert not out.any()
    zero = {name for name, p in ours.named_parameters() if name.endswith("weight") and not p.any()}
    assert all(name.endswith(("conv2.weight", "out_proj.weight")) or name == "last.weight" for name in zero)
    assert len(zero) == 8 + 4 + 1  # residual blocks, Transformers, the last layer
    drawn = ours.encoder.first.weight
    assert float(drawn.detach().std()) == pytest.approx((1 / 3) ** 0.5 / (4 * 9) ** 0.5, rel=0.15)


@pytest.mark.parametrize(
    "changes",
    [
        {"act_fn": "relu"}, {"class_embed_type": "timestep"}, {"attention_head_dim": [2]}, {"block_out_channels": []},
        {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, {"norm_num_groups": 3}, {"layers_per_block": 10**9},
        {"addition_embed_type": "text"}, {"addition_embed_type": "text_time"}, {"block_out_channels": [8, "x"]},
        {"invented": 1}, {"cross_attention_dim": [12, 12]}, {"up_block_types": CROSS[1][::-1]},
        {"transformer_layers_per_block": [2**20, 2**20]}, {"transformer_layers_per_block": [400, 600]},
        {"layers_per_block": 600}, {"layers_per_block": [2**20, 2**20]},
        {"block_out_channels": [8] * 17, "down_block_types": [CROSS[0][0]] * 17, "up_block_types": [CROSS[1][1]] * 17},
    ],
)  # fmt: skip
def test_an_unet_that_is_not_understood_is_refused(changes: dict[str, Any]) -> None:
    sizes = {"block_out_channels": [8, 16], "norm_num_groups": 4, "cross_attention_dim": 12, "attention_head_dim": 2}
    raw = sizes | {"down_block_types": CROSS[0], "up_block_types": CROSS[1]}
    f = Fields(raw)
    read_unet(f)
    f.done()
    f = Fields(raw | changes)
    read_unet(f)
    with pytest.raises(ConfigError):
        f.done()


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": [5]}, {"use_quant_conv": False}, {"latents_mean": [0.1]}, {"scaling_factor": "a"},
        {"up_block_types": ["AttnUpDecoderBlock2D"]}, {"norm_num_groups": 0}, {"layers_per_block": 10**9},
        {"scaling_factor": 0}, {"layers_per_block": 600},
        {
            "block_out_channels": [4] * 17, "down_block_types": ["DownEncoderBlock2D"] * 17,
            "up_block_types": ["UpDecoderBlock2D"] * 17,
        },
    ],
)  # fmt: skip
def test_an_autoencoder_that_is_not_understood_is_refused(changes: dict[str, Any]) -> None:
    raw = {"block_out_channels": [4, 8], "norm_num_groups": 2, "down_block_types": ["DownEncoderBlock2D"] * 2,
           "up_block_types": ["UpDecoderBlock2D"] * 2}  # fmt: skip
    f = Fields(raw)
    read_vae(f)
    f.done()
    f = Fields(raw | changes)
    read_vae(f)
    with pytest.raises(ConfigError):
        f.done()
