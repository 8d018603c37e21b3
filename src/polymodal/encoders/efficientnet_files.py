"""What other libraries call the weights of an EfficientNet, and how one begins with theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal, TypeAlias

import torch

from polymodal.encoders.efficientnet import STAGES, EfficientNet, EfficientNetConfig, Shape
from polymodal.weights.files import Checkpoint
from polymodal.weights.rules import Rule, drop, init, plan, read_only, renames, rule


def _transformers(c: EfficientNetConfig, ours: str) -> list[Rule]:
    """transformers' names, in which it keeps the official weights (``google/efficientnet-b3``: Keras' ImageNet)."""

    def names(theirs: str) -> list[Rule]:
        ends = {"embeddings.convolution": "stem.conv", "embeddings.batchnorm": "stem.norm"}
        ends |= {"encoder.top_conv": "top.conv", "encoder.top_bn": "top.norm"}
        layers = {"expansion.expand_conv": "expand.conv", "expansion.expand_bn": "expand.norm"}
        layers |= {f"depthwise_conv.depthwise_{a}": f"depthwise.{a}" for a in ("conv", "norm")}
        layers |= {f"squeeze_excite.{a}": f"excite.{a}" for a in ("reduce", "expand")}
        layers |= {"projection.project_conv": "project.conv", "projection.project_bn": "project.norm"}
        blocks = renames(f"{theirs}encoder.blocks.{{i}}", f"{ours}blocks.{{i}}", layers)
        return [rule(f"{theirs}{a}.{{p}}", f"{ours}{b}.{{p}}") for a, b in ends.items()] + blocks

    return [*names(""), *read_only(names("efficientnet."))]


def _staged(
    c: EfficientNetConfig, ours: str, ends: Mapping[str, str], layers: Callable[[Shape], Mapping[str, str]]
) -> list[Rule]:
    """Of files that number blocks within stages; ``layers`` are the names in one block -> ours."""
    rules = [rule(f"{a}.{{p}}", f"{ours}{b}.{{p}}") for a, b in ends.items()]
    for number, shape in enumerate(c.shapes):
        rules += [rule(f"{a}.{{p}}", f"{ours}blocks.{number}.{b}.{{p}}") for a, b in layers(shape).items()]
    return rules


def _timm(c: EfficientNetConfig, ours: str) -> list[Rule]:
    """timm's: ``tf_efficientnet_b3`` has the official weights ("same"), ``efficientnet_b3`` its own ("symmetric")."""

    def layers(s: Shape) -> dict[str, str]:
        convs = ("conv_pw", "conv_dw", "conv_pwl") if s.expand > 1 else ("conv_dw", "conv_pw")
        parts = ("expand", "depthwise", "project") if s.expand > 1 else ("depthwise", "project")
        names = {name: f"{part}.conv" for name, part in zip(convs, parts, strict=True)}
        names |= {f"bn{n}": f"{part}.norm" for n, part in enumerate(parts, 1)}
        names |= {"se.conv_reduce": "excite.reduce", "se.conv_expand": "excite.expand"}
        return {f"blocks.{s.stage}.{s.number}.{a}": b for a, b in names.items()}

    ends = {"conv_stem": "stem.conv", "bn1": "stem.norm", "conv_head": "top.conv", "bn2": "top.norm"}
    return _staged(c, ours, ends, layers)


def _torchvision(c: EfficientNetConfig, ours: str) -> list[Rule]:
    """torchvision's, whose padding is "symmetric" and whose ``norm_eps`` is 1e-5 up to B4."""

    def layers(s: Shape) -> dict[str, str]:
        parts = ("expand", "depthwise", "excite", "project") if s.expand > 1 else ("depthwise", "excite", "project")
        names: dict[str, str] = {}
        for number, part in enumerate(parts):
            inner = {"fc1": "reduce", "fc2": "expand"} if part == "excite" else {"0": "conv", "1": "norm"}
            names |= {f"block.{number}.{a}": f"{part}.{b}" for a, b in inner.items()}
        return {f"features.{s.stage + 1}.{s.number}.{a}": b for a, b in names.items()}

    top = len(STAGES) + 1
    ends = {"features.0.0": "stem.conv", "features.0.1": "stem.norm"}
    ends |= {f"features.{top}.0": "top.conv", f"features.{top}.1": "top.norm"}
    return _staged(c, ours, ends, layers)


Library: TypeAlias = Literal["transformers", "timm", "torchvision"]
_NAMES: Final[Mapping[Library, Callable[[EfficientNetConfig, str], list[Rule]]]] = {
    "transformers": _transformers, "timm": _timm, "torchvision": _torchvision,
}  # fmt: skip


def efficientnet_rules(config: EfficientNetConfig, library: Library, ours: str = "") -> list[Rule]:
    """A library's names -> ours, which begin with ``ours``; classifiers are dropped, FiLM stays as it is."""
    reason = "the features are read before it"
    return [
        *_NAMES[library](config, ours),
        drop("classifier.{p}", reason),
        drop("classifier.{n}.{p}", reason),
        init(f"{ours}films.{{i}}.{{layer}}.{{p}}", "FiLM starts as the identity"),
    ]


@torch.no_grad()
def load_efficientnet(tower: EfficientNet, folder: Path, library: Library = "transformers") -> None:
    """Fills a tower with the weights of a folder, all of them; FiLM keeps its own.

    The files say nothing of `Padding`: the tower's config has to.

    Raises:
        WeightsError: they do not fit; every problem is listed.
    """
    ours = tower.state_dict()
    with Checkpoint(folder) as checkpoint:
        todo = plan(efficientnet_rules(tower.config, library), checkpoint.meta(), ours)
        for name, tensor in todo.tensors(checkpoint.read, str(folder)):
            ours[name].copy_(tensor)
