"""One step of drawing against diffusers: the U-Net of Stable Diffusion 1.5 and the MMDiT of Stable Diffusion 3.

    python -m benchmarks.bench_draw [--rounds 5]

Bars: in fp32 >= diffusers; with our default precision on a CPU >= 1.5x diffusers in fp32. Both networks are scaled
down, in width and in depth, so that a step takes a second or two; their shapes are those of the papers otherwise.
Random weights of diffusers' are loaded by our rules; two pictures at a time, as guidance has them. "default" is what
commands run: bf16 where the machine multiplies it faster than fp32, and linear layers laid out as oneDNN reads them
(`polymodal.nn.packed`); diffusers in bf16 stands beside it. All take turns on one thread, and the ratios are those of
the medians of CPU time: what else runs on the machine takes no part. Errors are relative to the outputs of diffusers in
fp32.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from benchmarks._report import machine, report
from benchmarks.bench_decode import compare
from polymodal.backbones.mmdit import MMDiT
from polymodal.backbones.mmdit_files import read_sd3, sd3_rules
from polymodal.backbones.unet import UNet
from polymodal.backbones.unet_files import read_unet, unet_rules
from polymodal.heads.reconstruction import unpatchify
from polymodal.nn.packed import can_pack, pack
from polymodal.nn.patches import pack as pack_patches
from polymodal.nn.precision import cast
from polymodal.nn.skeleton import skeleton
from polymodal.weights.fields import Fields
from polymodal.weights.rules import Rule, plan

SIDE = 32  # of the latents: a picture of 256 pixels
PICTURES, WORDS = 2, 77
UNET = {
    "block_out_channels": (160, 320, 640, 640), "cross_attention_dim": 768, "attention_head_dim": 8,
    "sample_size": SIDE,
}  # fmt: skip
MMDIT = {
    "num_layers": 8, "num_attention_heads": 12, "attention_head_dim": 64, "caption_projection_dim": 768,
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "in_channels": 16, "out_channels": 16,
    "sample_size": SIDE, "pos_embed_max_size": SIDE,
}  # fmt: skip


def config_of(reference: Any, read: Callable[[Fields], Any]) -> Any:
    f = Fields(json.loads(reference.to_json_string()))
    f.ignore("bookkeeping", "_class_name", "_diffusers_version")
    config = read(f)
    f.done()
    return config


def loaded(ours: nn.Module, rules: list[Rule], reference: nn.Module) -> nn.Module:
    theirs = reference.state_dict()
    todo = plan(rules, theirs, ours.state_dict())
    assert not todo.problems, todo.problems[:3]
    ours.load_state_dict({name: t.clone() for name, t in todo.tensors(theirs.__getitem__, "diffusers")}, assign=True)
    return ours.eval()


def default(model: nn.Module) -> nn.Module:
    """As commands have it on this machine."""
    twin = cast(copy.deepcopy(model), "auto")
    return pack(twin) if can_pack() else twin


def bf16(model: Any) -> Any:
    return copy.deepcopy(model).to(torch.bfloat16)


def unet() -> tuple[nn.Module, dict[str, Callable[[], Tensor]]]:
    """Ours, and a step of each."""
    reference = diffusers.UNet2DConditionModel(**UNET).eval()
    config = config_of(reference, read_unet)
    with skeleton():
        empty = UNet(config)
    ours = loaded(empty, unet_rules("", "", config), reference)
    x, text = torch.randn(PICTURES, 4, SIDE, SIDE), torch.randn(PICTURES, WORDS, 768)
    when, fast, half = torch.full((PICTURES,), 500), default(ours), bf16(reference)
    kind = fast.encoder.first.weight.dtype
    return ours, {
        "diffusers": lambda: reference(x, when, text).sample,
        "diffusers, bf16": lambda: half(x.bfloat16(), when, text.bfloat16()).sample,
        "fp32": lambda: ours(x, when, text),
        "default": lambda: fast(x.to(kind), when, text.to(kind)),
    }


def mmdit() -> tuple[nn.Module, dict[str, Callable[[], Tensor]]]:
    reference = diffusers.SD3Transformer2DModel(**MMDIT).eval()
    config = config_of(reference, read_sd3)
    with skeleton():
        empty = MMDiT(config)
    ours = loaded(empty, sd3_rules(config), reference)
    x, text, pooled = (
        torch.randn(PICTURES, 16, SIDE, SIDE),
        torch.randn(PICTURES, 2 * WORDS, 4096),
        torch.randn(PICTURES, 2048),
    )
    t, grid, fast, half = torch.full((PICTURES,), 0.5), (SIDE // 2, SIDE // 2), default(ours), bf16(reference)
    kind = fast.position.dtype

    def of_patches(made: Tensor) -> Tensor:
        return unpatchify(made, 2, SIDE, SIDE)

    return ours, {
        "diffusers": lambda: reference(x, text, pooled, t * 1000).sample,
        "diffusers, bf16": lambda: half(x.bfloat16(), text.bfloat16(), pooled.bfloat16(), t * 1000).sample,
        "fp32": lambda: of_patches(ours(pack_patches(x, 2), grid, text, pooled, t)),
        "default": lambda: of_patches(fast(pack_patches(x, 2).to(kind), grid, text.to(kind), pooled.to(kind), t)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    figures: dict[str, Any] = {
        "machine": machine(),
        "diffusers": diffusers.__version__,
        "threads": 1,
        "pictures": PICTURES,
    }
    for name, make in {"U-Net": unet, "MMDiT": mmdit}.items():
        ours, works = make()
        exact = works["diffusers"]()
        errors = {kind: float((work().float() - exact).norm() / exact.norm()) for kind, work in works.items()}
        seconds = compare(works, rounds)
        figures[name] = {
            "parameters": sum(p.numel() for p in ours.parameters()),
            "CPU seconds a step": {kind: round(s, 3) for kind, s in seconds.items()},
            "speed / diffusers in fp32": {kind: round(seconds["diffusers"] / s, 3) for kind, s in seconds.items()},
            "relative error": {kind: float(f"{error:.2g}") for kind, error in errors.items()},
        }
    report("draw", figures)


if __name__ == "__main__":
    main()
