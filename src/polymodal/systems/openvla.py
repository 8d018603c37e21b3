"""OpenVLA: a Prismatic model that answers a picture and an instruction with one action, a token for each number of it.

Paper: Kim et al., "OpenVLA: An Open-Source Vision-Language-Action Model", 2024, https://arxiv.org/abs/2406.09246.
Official code: openvla/openvla. Hub: openvla/openvla-7b, and what is fine-tuned from it.

    picture -> DINOv2, SigLIP -> MLP --+
                                       [start, patches, question, empty token] -> decoder -> 7 tokens -> 7 numbers
    instruction -> question -----------+

Training details kept here: numbers are scaled by the 1st and 99th percentile of their data set, the gripper is not, and
clipped; of 256 edges between -1 and 1, value i is written as the i-th last id of the language model's vocabulary; 255
centres are read. Instructions are in small letters. Prompts end in the empty token 29871, as training's do where a text
goes on. The loss is on the action and the end token. All of it trains, the towers too; or LoRA (`LORA`) on every linear
layer at 5e-4, 1.4 % of the parameters.

Deviations: only tokens of actions can be drawn, where the official code reads any other word as +0.996. Statistics are
written to ``dataset_statistics.json``; those in a config are read where there is no such file. Of LoRA, the queries,
keys and values of the towers have an adapter each, where the official layer joins them to one, and the convolutions of
patches have none. Where it was trained on random crops (LIBERO), the official evaluation shows it the middle 90 % of a
picture: crop before `observe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.core.observation import Observation
from polymodal.samplers.autoregressive import Completion
from polymodal.systems.fused import (
    FusedConfig,
    FusedGenerator,
    declared_statistics,
    read_parts,
    read_policy,
    rules_of_parts,
    task_ids,
    write_parts,
    write_policy,
)
from polymodal.systems.speaking import SpeakingPolicy
from polymodal.tokenizers.action_bins import Slots, VocabularyBins
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, write_whole

# The published recipe of fine-tuning, for ``polymodal.train.lora.add_lora``: every linear layer.
LORA: Final[Mapping[str, Any]] = {
    "rank": 32, "alpha": 16.0,
    "targets": (  # of the decoder and the towers, and of the connector
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        "connector.layers.0", "connector.layers.1", "connector.layers.2", "lm_head",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OpenVLAConfig(FusedConfig):
    """Prismatic's parts, and how actions are written.

    Attributes:
        num_bins: edges of bins, which are one more than the bins themselves.
        padding: rows of the vocabulary behind the last token.
        cameras: the pictures that are read; published models read one.
        empty_id: the token that ends a prompt, if one does.
    """

    action_dim: int = 7
    num_bins: int = 256
    padding: int = 64
    cameras: tuple[str, ...] = ("image",)
    empty_id: int | None = 29871

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 < self.num_bins < self.backbone.vocab_size - self.padding:
            raise ConfigError(f"{self.num_bins} bins do not go into a vocabulary of {self.backbone.vocab_size}")
        if not self.control.stop or not self.cameras:
            raise ConfigError("OpenVLA looks through a camera, and its answers have an end token")


@final
class OpenVLA(SpeakingPolicy, FusedGenerator):
    """A vision-language-action model of two towers, a connector and a decoder."""

    config: OpenVLAConfig

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        c = config
        self.action_width, self.cameras = c.action_dim, c.cameras
        self.bins = VocabularyBins(vocab_size=c.backbone.vocab_size - c.padding, count=c.num_bins)

    def ask(self, observation: Observation) -> list[int]:
        """``start patches question empty``."""
        c, places = self.config, [self.config.image_id] * (self.config.num_features * len(self.cameras))
        ids = task_ids(c, self.tokenizer, observation.instruction, c.empty_id)
        at = int(c.control.start is not None)
        return ids[:at] + places + ids[at:]

    def say(self, actions: Float[Tensor, "batch 1 action_width"]) -> list[list[int]]:
        return self.bins.encode(actions[:, 0]).tolist()

    def hear(self, answers: Sequence[Completion]) -> Float[Tensor, "batch 1 action_width"]:
        return self.bins.decode(torch.tensor([answer.ids for answer in answers]))[:, None]

    @property
    def constraint(self) -> Slots:
        return self.bins.constraint(self.action_width, self.vocab_size)

    @property
    def longest(self) -> int:
        return self.action_width + 1

    def load_processors(self, folder: Path) -> None:
        if any(folder.glob("action_head--*")):
            raise ConfigError(f"{folder} is an OpenVLA-OFT, whose head is in a pickle: see systems/openvla_oft.py")
        super().load_processors(folder)
        declared_statistics(self, folder)


def read_hf(raw: Mapping[str, Any]) -> tuple[OpenVLAConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "openvla")
    parts = read_parts(f) | read_policy(f, OpenVLAConfig.cameras)
    parts["padding"], parts["num_bins"] = (
        f.take("pad_to_multiple_of", int, 64, least=0),
        f.take("n_action_bins", int, 256),
    )
    report = f.done()
    return OpenVLAConfig(**parts), report


def write_hf(c: OpenVLAConfig) -> dict[str, Any]:
    raw = {
        "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla", **write_parts(c),
        "pad_to_multiple_of": c.padding, "n_action_bins": c.num_bins, **write_policy(c),
    }  # fmt: skip
    return write_whole(c, raw, read_hf)


OpenVLA.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_of_parts)}


def _published() -> OpenVLAConfig:
    return read_hf(
        {
            "model_type": "openvla", "vision_backbone_id": "dinosiglip-vit-so-224px",
            "llm_backbone_id": "llama2-7b-pure", "image_resize_strategy": "resize-naive",
            "text_config": {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000},
        }
    )[0]  # fmt: skip


PRESETS = {"openvla/openvla-7b": _published}
