"""DiT, Stable Diffusion 3 and FLUX against diffusers: outputs, loss, first gradients, files both ways."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from polymodal.backbones.dit import DiTBackbone, dit_rules, read_dit, write_dit
from polymodal.backbones.mmdit import MMDiT
from polymodal.backbones.mmdit_files import flux_rules, read_flux, read_sd3, sd3_rules, write_flux, write_sd3
from polymodal.core.errors import ConfigError, WeightsError
from polymodal.heads.reconstruction import unpatchify
from polymodal.nn.patches import pack, unpack
from polymodal.weights.fields import Fields
from polymodal.weights.pipeline import part
from polymodal.weights.rules import Rule, plan, to_theirs
from tests.parity.harness import _close, randomise

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class Pair:
    """A model of diffusers, and ours, with its weights."""

    theirs: Any
    ours: nn.Module
    rules: list[Rule]
    folder: Path
    config: Any

    def agree(self, expected: Tensor, got: Tensor, target: Tensor) -> None:
        """Output, loss and first gradients."""
        _close("output", got, expected, 1e-5)
        theirs, ours = F.mse_loss(expected, 30 * target), F.mse_loss(got, 30 * target)  # far away: large gradients
        _close("loss", ours, theirs, 1e-5)
        theirs.backward()
        ours.backward()
        gradients = {name: p.grad for name, p in self.theirs.named_parameters() if p.grad is not None}
        copies: dict[str, list[str]] = {}  # of what is one tensor in the paper, and here
        for name in gradients:
            if ".norm1.emb." in name:
                copies.setdefault(name.split(".norm1.emb.")[1], []).append(name)
        for names in copies.values():
            gradients |= dict.fromkeys(names, torch.stack([gradients[name] for name in names]).sum(0))
        self._compare(gradients)

    def _compare(self, theirs: Mapping[str, Tensor]) -> None:
        mine = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.ours.named_parameters()}
        missing = [name for name, p in self.ours.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing, f"no gradient of {missing}"
        written = to_theirs([r for r in self.rules if "position" not in r.ours[0]], mine)
        assert written.keys() == theirs.keys()
        for name, gradient in written.items():
            _close(f"gradient of {name}", gradient, theirs[name], 1e-5)


def make_pair(
    theirs: Any,
    folder: Path,
    read: Callable[[Fields], Any],
    rules_of: Callable[[Any], list[Rule]],
    build: Callable[[Any], nn.Module],
) -> Pair:
    theirs = theirs.eval().float()
    randomise(theirs, 0.1)
    for name, parameter in theirs.named_parameters():  # what diffusers holds in copies is one tensor in the paper
        if ".norm1.emb." in name:
            first = "transformer_blocks.0.norm1.emb." + name.split(".norm1.emb.")[1]
            parameter.data.copy_(theirs.get_parameter(first))
    theirs.save_pretrained(folder)
    whole = Fields({"transformer": json.loads((folder / "config.json").read_text())})
    config = read(part(whole, "transformer", type(theirs).__name__))
    whole.done()
    rules = rules_of(config)
    ours = build(config)
    file = load_file(folder / WEIGHTS)
    todo = plan(rules, file, ours.state_dict())
    ours.load_state_dict(dict(todo.tensors(file.__getitem__, str(folder))))
    assert (again := to_theirs(rules, ours.state_dict())).keys() == file.keys()
    assert all(torch.equal(again[name], file[name]) for name in file)
    return Pair(theirs, ours, rules, folder, config)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- DiT


def tiny_dit(folder: Path) -> Pair:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    return make_pair(theirs, folder, read_dit, dit_rules, DiTBackbone)


def test_dit(tmp_path: Path) -> None:
    pair = tiny_dit(tmp_path)
    x, step, label = noise(3, 4, 8, 8), torch.tensor([0, 371, 999]), torch.tensor([1, 10, 3])
    expected = pair.theirs(x, timestep=step, class_labels=label).sample
    got = unpatchify(pair.ours(x, step.float(), label), 2, 8, 8)
    pair.agree(expected, got, noise(3, 8, 8, 8, seed=1))


def test_a_dit_writes_what_it_reads(tmp_path: Path) -> None:
    pair = tiny_dit(tmp_path)
    f = Fields(write_dit(pair.config))
    assert read_dit(f) == pair.config
    f.done()


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    pair = tiny_dit(tmp_path)
    file = load_file(tmp_path / WEIGHTS)
    file["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"][0] += 1
    todo = plan(pair.rules, file, pair.ours.state_dict())
    with pytest.raises(WeightsError, match="copies"):
        dict(todo.tensors(file.__getitem__, "here"))


# -- Stable Diffusion 3


def tiny_sd3(folder: Path, **fields: Any) -> Pair:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    theirs = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=12, **fields,
    )  # fmt: skip
    return make_pair(theirs, folder, read_sd3, sd3_rules, MMDiT)


SD3S = {"3": {}, "3.5-large": {"qk_norm": "rms_norm"}, "3.5": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}}


@pytest.mark.parametrize("fields", SD3S.values(), ids=SD3S)
def test_stable_diffusion_3(tmp_path: Path, fields: dict[str, Any]) -> None:
    """At a size that is no square, from the middle of the table."""
    pair = tiny_sd3(tmp_path, **fields)
    x, text, pooled, t = noise(2, 4, 6, 10), noise(2, 5, 12), noise(2, 10), torch.tensor([0.0302, 0.9])
    expected = pair.theirs(x, text, pooled, t * 1000).sample
    got = unpatchify(pair.ours(pack(x, 2), (3, 5), text, pooled, t), 2, 6, 10)
    pair.agree(expected, got, noise(2, 4, 6, 10, seed=1))


@pytest.mark.parametrize("fields", SD3S.values(), ids=SD3S)
def test_stable_diffusion_3_writes_what_it_reads(tmp_path: Path, fields: dict[str, Any]) -> None:
    pair = tiny_sd3(tmp_path, **fields)
    f = Fields(write_sd3(pair.config))
    assert read_sd3(f) == pair.config
    f.done()


def test_our_table_of_positions_is_theirs(tmp_path: Path) -> None:
    """And the init of ours: diffusers' own is torch's, which no paper has."""
    from diffusers import SD3Transformer2DModel

    pair = tiny_sd3(tmp_path)
    fresh = SD3Transformer2DModel.from_config(pair.theirs.config)
    ours = MMDiT(pair.config)
    ours.init_weights()
    assert ours.position is not None
    torch.testing.assert_close(ours.position[None], fresh.pos_embed.pos_embed, rtol=0, atol=1e-6)


# -- FLUX


def tiny_flux(folder: Path, **fields: Any) -> Pair:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    theirs = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=10, pooled_projection_dim=6, axes_dims_rope=(2, 4, 6), **fields,
    )  # fmt: skip
    return make_pair(theirs, folder, read_flux, flux_rules, MMDiT)


@pytest.mark.parametrize("guided", [False, True], ids=["schnell", "dev"])
def test_flux(tmp_path: Path, guided: bool) -> None:
    pair = tiny_flux(tmp_path, guidance_embeds=guided)
    x, text, pooled, t = noise(2, 4, 6, 10), noise(2, 5, 10), noise(2, 6), torch.tensor([0.0302, 0.9])
    guidance = torch.tensor([3.5, 1.0]) if guided else None
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij")
    places = torch.stack([torch.zeros(15), rows.flatten(), columns.flatten()], 1)
    expected = pair.theirs(pack(x, 2), text, pooled, t, places, torch.zeros(5, 3), guidance).sample
    got = pair.ours(pack(x, 2), (3, 5), text, pooled, t, guidance)
    pair.agree(expected, got, noise(2, 15, 16, seed=1))


def test_flux_writes_what_it_reads(tmp_path: Path) -> None:
    pair = tiny_flux(tmp_path, guidance_embeds=True)
    f = Fields(write_flux(pair.config))
    assert read_flux(f) == pair.config
    f.done()


@pytest.mark.parametrize(
    ("read", "changes"),
    [
        (read_dit, {"num_attention_heads": 2**20, "attention_head_dim": 2**20}),
        (read_dit, {"num_attention_heads": 2**20, "attention_head_dim": 4}),
        (read_dit, {"sample_size": 2**20}),
        (read_sd3, {"num_attention_heads": 2**20, "attention_head_dim": 2**20}),
        (read_flux, {"num_attention_heads": 2**20, "attention_head_dim": 24, "axes_dims_rope": [4, 10, 10]}),
    ],
)
def test_what_no_memory_holds_is_refused(read: Callable[[Fields], Any], changes: dict[str, Any]) -> None:
    f = Fields(changes)
    assert read(f) is None
    with pytest.raises(ConfigError, match=r"more than 1,048,576|too many patches"):
        f.done()


def test_packed_latents_are_the_pipelines() -> None:
    from diffusers import FluxPipeline

    x = noise(2, 16, 8, 12)
    theirs = FluxPipeline._pack_latents(x, 2, 16, 8, 12)
    assert torch.equal(pack(x, 2), theirs)
    assert torch.equal(unpack(theirs, 2, 8, 12), FluxPipeline._unpack_latents(theirs, 64, 96, 8))
