"""LoRA files as those who share models that paint write them: one safetensors file, of diffusers, PEFT or kohya.

A layer's two matrices are called, for example,

    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight           diffusers, PEFT
    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight     diffusers of 2023
    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight          kohya
    lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight                kohya, official names

and ``.alpha``, where it is there, is divided by the rank. Where it is not, PEFT's settings say it: diffusers has them
among a file's metadata, PEFT in ``adapter_config.json`` beside it. Else it is the rank. Ranks may differ.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from polymodal.core.errors import ConfigError, WeightsError
from polymodal.train.lora import PREFIX, Model, as_matrix, layers_to_adapt, plain_config, put_adapter

_ENDINGS: Final = {
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up", ".alpha": "alpha",
}  # fmt: skip
# kohya's words for the parts of a pipeline, which are folders there.
_PARTS: Final = {"lora_unet_": "unet_", "lora_te1_": "text_encoder_", "lora_te2_": "text_encoder_2_"} | {
    "lora_te_": "text_encoder_"
}
_FURTHER: Final = ("alpha_pattern", "use_rslora")  # settings that change how much an adapter counts
_SETTINGS: Final = "lora_adapter_metadata"  # in the metadata of diffusers' files: {"unet.lora_alpha": 8, ...}


@dataclass
class _Pair:
    """What a file holds for one layer; ``called`` is how it calls it."""

    called: str
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: Tensor | None = None
    keys: list[str] = field(default_factory=list)


def load_lora(model: Model, path: str | Path, *, names: Mapping[str, str], scale: float = 1.0) -> Model:
    """Adds the adapters of a shared file to ``model``, in place and completely; it is frozen, as `add_lora` does.

    Args:
        model: a system, such as Stable Diffusion.
        path: a safetensors file.
        names: our names of layers -> those of its pipeline on the Hub: ``model.hub_layers()``.
        scale: by which what is added is multiplied.

    Raises:
        ConfigError: the model has adapters already, ``scale`` is not positive, or PEFT's settings are missing or ask
            for more than a plain LoRA.
        WeightsError: a tensor fits no linear layer of ``names`` (convolutions have no adapters here, nor have layers
            whose rows are in another order than in the files: queries and keys of FLUX), lacks its other half, is of
            another shape, or not finite; the model was not changed.
    """
    layers = layers_to_adapt(model)
    if not 0 < scale < math.inf:
        raise ConfigError(f"an adapter is multiplied by a positive number, not {scale}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(str(path), [f"it cannot be read: {error}"]) from None
    known = {_flat(theirs): ours for ours, theirs in names.items() if ours in layers}
    problems: list[str] = []
    alphas = _alphas(Path(path), tensors)
    found = _pairs(tensors, _Official.of(names.values()), problems)
    made: dict[str, tuple[Tensor, Tensor, float]] = {}
    for flat, pair in found.items():
        if flat not in known:
            problems.append(
                f"{pair.called} is no linear layer of this model, or one that it holds otherwise than its files do "
                f"({', '.join(pair.keys)})"
            )
            continue
        wide, narrow = layers[known[flat]].weight.shape
        if pair.down is None or pair.up is None:
            problems.append(f"{pair.called} has one of its two matrices only ({', '.join(pair.keys)})")
            continue
        down, up = as_matrix(pair.down), as_matrix(pair.up)
        rank = down.shape[0]
        if down.shape != (rank, narrow) or up.shape != (wide, rank) or rank < 1:
            problems.append(
                f"{pair.called} has matrices {tuple(pair.down.shape)} and {tuple(pair.up.shape)}; the layer goes from "
                f"{narrow} to {wide}"
            )
            continue
        said = (alpha for prefix, alpha in alphas.items() if pair.called.startswith(prefix))
        alpha = next(said, float(rank)) if pair.alpha is None else float(pair.alpha)
        if not math.isfinite(alpha) or not all(bool(half.float().isfinite().all()) for half in (down, up)):
            problems.append(f"{pair.called} has values that are NaN or infinite ({', '.join(pair.keys)})")
            continue
        made[known[flat]] = down, up, alpha * scale
    if problems or not made:
        raise WeightsError(str(path), problems or ["it holds no adapter"])
    model.requires_grad_(False)
    for name, (down, up, alpha) in made.items():
        adapter = put_adapter(model, name, layers[name], rank=len(down), alpha=alpha)
        with torch.no_grad():
            adapter.lora_A.weight.copy_(down)
            adapter.lora_B.weight.copy_(up)
    return model


def _alphas(path: Path, names: Iterable[str]) -> dict[str, float]:
    """What PEFT's settings say of alpha, for all names that begin so.

    Raises:
        ConfigError: they are missing where PEFT wrote the file, are broken, or ask for more than a plain LoRA.
    """
    if any(name.startswith(PREFIX) for name in names):
        beside = path.with_name("adapter_config.json")
        if not beside.is_file():
            raise ConfigError(f"{path} is PEFT's, which says in {beside.name} how much it counts: put that beside it")
        return {PREFIX: float(plain_config(beside)["lora_alpha"])}
    with safe_open(path, "pt") as file:
        said = (file.metadata() or {}).get(_SETTINGS, "{}")
    try:
        settings = json.loads(said)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: {_SETTINGS} is broken")
    alphas: dict[str, float] = {}
    for key, value in settings.items():
        part, _, name = key.rpartition(".")
        if name == "lora_alpha" and type(value) in (int, float):
            alphas[f"{part}."] = float(value)
        elif name == "lora_alpha" or (name in _FURTHER and value):
            raise ConfigError(f"{path} is no plain LoRA adapter: {key} is {short(value)}")
    return alphas


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _pairs(tensors: Mapping[str, Tensor], official: _Official, problems: list[str]) -> dict[str, _Pair]:
    """What a file holds, by the names of layers with underscores."""
    found: dict[str, _Pair] = {}
    for key, tensor in tensors.items():
        ending = next((e for e in sorted(_ENDINGS, key=len, reverse=True) if key.endswith(e)), None)
        if ending is None:
            problems.append(f"{key} is none of the tensors that an adapter has")
            continue
        called = key.removesuffix(ending)
        name = _flat(called.removeprefix("base_model.model.").replace(".processor.", "."))
        for theirs, ours in _PARTS.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        if ending.startswith("_lora.") and name.endswith("to_out"):  # processors had no list there
            name += "_0"
        pair = found.setdefault(official.renamed(name), _Pair(called))
        what = _ENDINGS[ending]
        wrong = tensor.numel() != 1 if what == "alpha" else tensor.ndim < 2 or tensor.shape[2:].numel() != 1
        if wrong or getattr(pair, what) is not None:
            problems.append(f"{key} has shape {tuple(tensor.shape)}, or is there twice")
            continue
        setattr(pair, what, tensor)
        pair.keys.append(key)
    return found


@dataclass(frozen=True)
class _Official:
    """How the official code numbers the blocks of a U-Net: through all levels; one more of each on the way up."""

    blocks: int  # of a level on the way down

    @classmethod
    def of(cls, names: object) -> _Official:
        found = [re.match(r"unet\.down_blocks\.\d+\.resnets\.(\d+)\.", str(name)) for name in names]  # type: ignore[attr-defined]
        return cls(max((int(match[1]) + 1 for match in found if match), default=0))

    def renamed(self, name: str) -> str:
        """A name of the Hub's, where one of the official code's is given for a layer of a Transformer."""
        if match := re.match(r"unet_(input|output)_blocks_(\d+)_1_", name):
            number = int(match[2]) - (match[1] == "input")
            level, place = divmod(number, self.blocks + 1)
            way = "down" if match[1] == "input" else "up"
            return f"unet_{way}_blocks_{level}_attentions_{place}_{name[match.end() :]}"
        return re.sub(r"^unet_middle_block_1_", "unet_mid_block_attentions_0_", name)
