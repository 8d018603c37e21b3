"""OpenVLA-OFT: OpenVLA's trunk, which reads empty places for a whole chunk of actions and fills them in one pass.

Paper: Kim, Finn, Liang, "Fine-Tuning Vision-Language-Action Models: Optimizing Speed and Success", 2025,
https://arxiv.org/abs/2502.19645. Official code: moojink/openvla-oft and its fork of transformers, whose Llama sees both
ways. Hub: moojink/openvla-7b-oft-finetuned-libero-spatial, ...

    camera, wrist camera -> towers -> MLP --+
    state -> MLP ---------------------------+ [start, patches, state, question, 8 x 7 empty places, end] -> decoder, all
    instruction -> question ----------------+ see all; 8 x (7 vectors -> MLP-ResNet -> 7 numbers)
            +-> mean of its embeddings -> FiLM in every layer of the towers (on request)

Training details kept here: empty places are zeros; a value's vector is that of the place before its own, as in a model
that predicts what comes next; absolute error of actions and states between -1 and 1, which LoRA learns at 5e-4, the
head, the projector and FiLM whole. New layers start as torch has them, FiLM's among them.

Deviations: steps past the end of an episode are not learned, where the official code repeats the last action. The mean
of FiLM leaves padding out. The alternatives of the paper's tables, diffusion and tokens read in parallel, are not here.
Published folders keep the head and the projector in pickles, which are not read: join them to ``model.safetensors`` as
``action_head...`` and ``proprio_projector...``, and call ``model_type`` openvla_oft; else they load as an OpenVLA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.connectors.mlp import MLP
from polymodal.core.batch import Batch, Loss, text_batch
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Sample
from polymodal.core.tokens import Modality, Tokens
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.timm import PatchTower
from polymodal.heads.action import masked
from polymodal.heads.mlp_resnet import MLPResNet
from polymodal.modalities.action import Normaliser
from polymodal.nn.block import Block
from polymodal.nn.film import FiLM
from polymodal.systems.acting import Policy
from polymodal.systems.fused import (
    FusedConfig,
    FusedSystem,
    declared_statistics,
    read_parts,
    read_policy,
    rules_of_parts,
    task_ids,
    write_parts,
    write_policy,
)
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, write_whole
from polymodal.weights.rules import Rule, renames, rule


@dataclass(frozen=True, kw_only=True)
class OpenVLAOFTConfig(FusedConfig):
    """Prismatic's parts and a robot.

    Attributes:
        state_dim: numbers of the state; 0: it is not read.
        film: whether the instruction steers the towers.
        bounds: what becomes -1 and 1.
        empty_id: the token that ends a prompt, if one does.
    """

    action_dim: int = 7
    horizon: int = 8
    state_dim: int = 8
    cameras: tuple[str, ...] = ("image", "wrist_image")
    film: bool = False
    bounds: Literal["quantile", "minmax"] = "quantile"
    empty_id: int | None = 29871

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cameras or not self.control.stop or self.control.start is None:
            raise ConfigError("OpenVLA-OFT looks through a camera and reads a start and an end token")

    @property
    def empty_place(self) -> int:
        """Stands for an empty place in ids; it is behind the vocabulary."""
        return self.backbone.vocab_size


@final
class OpenVLAOFT(FusedSystem, Policy):
    """Two towers, a connector, a decoder that sees both ways, and a head that regresses."""

    config: OpenVLAOFTConfig
    tokenizer: LanguageTokenizer | None = None  # type: ignore[assignment]

    def __init__(self, config: OpenVLAOFTConfig) -> None:
        super().__init__(config)
        c, dim = config, config.backbone.dim
        self.horizon, self.action_width, self.state_width = c.horizon, c.action_dim, c.state_dim
        self.cameras, self.normalisation = c.cameras, c.bounds
        self.state_connector = MLP().build(c.state_dim, dim) if c.state_dim else None
        towers = c.towers if c.film else ()
        self.films = nn.ModuleList(
            nn.ModuleList(FiLM(dim, tower.dim) for _ in range(tower.num_layers - 1)) for tower in towers
        )
        self.head = MLPResNet(dim, c.action_dim)
        if self.backbone.lm_head is not None:  # no word is said; it is kept for the file's sake
            self.backbone.lm_head.requires_grad_(False)

    @torch.no_grad()
    def init_weights(self) -> None:
        super().init_weights()
        for part in (self.films, self.head, self.state_connector):
            for layer in () if part is None else part.modules():
                if isinstance(layer, nn.Linear | nn.LayerNorm):
                    layer.reset_parameters()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c, side = self.config, self.config.towers[0].image_size
        row = self._with_places([c.control.start or 0, *range(3, 8)])
        state = {"state": TensorSpec(shape=(c.state_dim,))} if c.state_dim else {}
        return state | {
            "ids": TensorSpec(shape=(len(row),), dtype=torch.int64, head=tuple(row)),
            "pixels": TensorSpec(shape=(len(c.cameras), 3 * len(c.towers), side, side)),
            "actions": TensorSpec(shape=(c.horizon, c.action_dim)),
            "actions_valid": TensorSpec(shape=(c.horizon,), dtype=torch.bool),
        }

    # -- what is read

    def normaliser(self, what: str) -> Normaliser:
        return replace(super().normaliser(what), clip=1.0)

    def _with_places(self, prompt: Sequence[int]) -> list[int]:
        c = self.config
        return [*prompt, *[c.empty_place] * (c.horizon * c.action_dim), c.control.stop[0]]

    def instruct(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``start question empty``, the empty places and the end, as ``ids`` and ``valid``.

        Raises:
            MediaError: with its pictures, one is longer than the context.
            UnsupportedError: no tokenizer was beside the weights.
        """
        c = self.config
        rows = [self._with_places(task_ids(c, self.tokenizer, text, c.empty_id)) for text in texts]
        more = len(c.cameras) * c.num_features + int(c.state_dim > 0)
        if (longest := max(map(len, rows)) + more) > c.backbone.context:
            raise MediaError(f"{longest} tokens; OpenVLA-OFT reads at most {c.backbone.context}")
        return text_batch(rows)

    def count(self, sample: Sample) -> int:
        """Tokens of the pictures and texts of a sample, without the start, the state and the empty places."""
        if self.tokenizer is None and sample.texts:
            raise UnsupportedError(f"OpenVLA-OFT ({self.source}) has no tokenizer to count texts with")
        texts = [self.tokenizer.encode(text.text, special=False) for text in sample.texts] if self.tokenizer else []
        return len(sample.images) * self.config.num_features + sum(map(len, texts))

    # -- one pass

    def forward(self, batch: Batch) -> Float[Tensor, "batch horizon action_width"]:
        """Normalised actions."""
        c, ids = self.config, batch["ids"]
        valid, places = batch.get("valid", torch.ones_like(ids, dtype=torch.bool)), ids == c.empty_place
        text = self.backbone.embed(ids.masked_fill(places, 0)).masked_fill(places[..., None], 0)
        seen = [self._see(batch["pixels"], text, valid & ~places)]
        if self.state_connector is not None:
            seen.append(self.state_connector(batch["state"].to(text.dtype))[:, None])
        more = sum(x.shape[1] for x in seen)
        tokens = Tokens.of(
            torch.cat([text[:, :1], *seen, text[:, 1:]], 1), causal=False, modality=Modality.TEXT,
            valid=_behind_first(valid, more, True),
        )  # fmt: skip
        x = self.backbone(tokens).x[_behind_first(places, more, False).roll(-1, 1)]
        return self.head(x.view(len(ids), c.horizon, -1))

    def _see(self, pixels: Tensor, text: Tensor, spoken: Tensor) -> Float[Tensor, "batch patches dim"]:
        flat = pixels.flatten(0, 1)
        if not self.films:
            return self.project(flat).unflatten(0, pixels.shape[:2]).flatten(1, 2)
        mean = (text * spoken[..., None]).sum(1) / spoken.sum(1, keepdim=True)
        mean = mean.repeat_interleave(pixels.shape[1], 0)
        parts = [
            _steered(tower, films, part, mean)
            for tower, films, part in zip(self.vision, self.films, flat.split(3, 1), strict=True)
        ]
        return self.connector(torch.cat(parts, -1)).unflatten(0, pixels.shape[:2]).flatten(1, 2)

    def loss(self, batch: Batch) -> Loss:
        """Absolute error of the steps that are valid."""
        return masked((self(batch).float() - batch["actions"]).abs(), batch["actions_valid"][..., None])

    def chunk(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch horizon action_width"]:
        return self(batch)

    def load_processors(self, folder: Path) -> None:
        super().load_processors(folder)
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = LanguageTokenizer.from_folder(folder)
        declared_statistics(self, folder)


def _behind_first(x: Tensor, count: int, value: bool) -> Tensor:
    """Places for ``count`` more tokens behind the first of each row."""
    return torch.cat([x[:, :1], x.new_full((len(x), count), value), x[:, 1:]], 1)


def _steered(tower: nn.Module, films: nn.Module, pixels: Tensor, condition: Tensor) -> Tensor:
    """The patches of a tower, each layer of which the condition steers."""
    assert isinstance(tower, PatchTower)
    assert isinstance(films, nn.ModuleList)
    x = tower.vit.pre_norm(tower.vit.add_prefix(tower.vit.embed_patches(pixels)))
    for block, film in zip(tower.vit.blocks[:-1], films, strict=True):
        assert isinstance(block, Block)
        x = block.forward_between(x, lambda x, film=film: film(x.mT[..., None], condition)[..., 0].mT)  # type: ignore[misc]
    return x[:, tower.config.num_prefix :]


def read_hf(raw: Mapping[str, Any]) -> tuple[OpenVLAOFTConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "openvla_oft")
    parts = read_parts(f) | read_policy(f, OpenVLAOFTConfig.cameras)
    f.ignore("of OpenVLA's tokens", "n_action_bins")
    parts |= {"horizon": f.take("horizon", int, 8), "state_dim": f.take("state_dim", int, 8, least=0)}
    parts |= {"film": f.take("film", bool, False)}
    parts |= {"bounds": f.choose("bounds", {name: name for name in ("quantile", "minmax")}, "quantile")}
    report = f.done()
    return OpenVLAOFTConfig(**parts), report


def write_hf(c: OpenVLAOFTConfig) -> dict[str, Any]:
    raw = {
        "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla_oft", **write_parts(c),
        **write_policy(c), "horizon": c.horizon, "state_dim": c.state_dim, "film": c.film, "bounds": c.bounds,
    }  # fmt: skip
    return write_whole(c, raw, read_hf)


def rules_hf(c: OpenVLAOFTConfig) -> list[Rule]:
    h, b = "action_head.model", "action_head.model.mlp_resnet_blocks.{i}.ffn"
    names = {"layer_norm1": "norm_in", "fc1": "fc_in", "layer_norm2": "norm_out", "fc2": "fc_out"}
    rules = [*rules_of_parts(c), *renames(h, "head", names), *renames(b, "head.blocks.{i}", {"0": "norm", "1": "fc"})]
    if c.state_dim:
        rules += renames("proprio_projector", "state_connector.layers", {"fc1": "0", "fc2": "1"})
    if c.film:
        for number, name in enumerate(("featurizer", "fused_featurizer")[: len(c.towers)]):
            theirs, ours = f"vision_backbone.{name}.blocks.{{i}}", f"films.{number}.{{i}}"
            rules += [
                rule(f"{theirs}.{a}.{{p}}", f"{ours}.{z}.{{p}}") for a, z in (("scale", "gamma"), ("shift", "beta"))
            ]
    return rules


OpenVLAOFT.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}


def _published(robot: Mapping[str, Any]) -> OpenVLAOFTConfig:
    return read_hf(
        {
            "model_type": "openvla_oft", "vision_backbone_id": "dinosiglip-vit-so-224px",
            "llm_backbone_id": "llama2-7b-pure", "image_resize_strategy": "resize-naive",
            "text_config": {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000}, **robot,
        }
    )[0]  # fmt: skip


_ALOHA = {
    "action_dim": 14, "state_dim": 14, "horizon": 25, "film": True, "bounds": "minmax",
    "cameras": ["cam_high", "cam_left_wrist", "cam_right_wrist"],
}  # fmt: skip
PRESETS = {
    "moojink/openvla-7b-oft-finetuned-libero-spatial": partial(_published, {}),
    "openvla-7b-oft-aloha": partial(_published, _ALOHA),
}
