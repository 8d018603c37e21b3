"""pi0: a PaliGemma and an action expert that share attention only, and flow matching from noise to a chunk of actions.

Paper: Black et al., "pi0: A Vision-Language-Action Flow Model for General Robot Control", 2024,
https://arxiv.org/abs/2410.24164. Official code: Physical-Intelligence/openpi. Hub: lerobot/pi0_base, ...

    pictures -> SigLIP -> linear --+
    instruction -> embedding ------+-> Gemma 2B, read once: its keys and values --+
    state -> linear ------------------------------------------------+             |
    noisy actions -> linear --+                                     +-> expert (300M), 10 Euler steps -> velocity
    time -> waves ------------+-> two layers with SiLU -------------+

Blocks: [pictures and instruction see one another | state | actions see one another]; none sees a later one.

Training details kept here: t = 1 is noise (the paper says 0); t is Beta(1.5, 1) * 0.999 + 0.001; the target is noise
minus actions; states and actions are z-scored and padded with zeros, which are learned, too; all that is new starts
with variances of one over the fan-in, the rest from PaliGemma (`start_from`). openpi trains everything with AdamW (0.9,
0.95), clipped at 1: 1,000 steps of warm-up to 2.5e-5, a cosine to 2.5e-6 at step 30,000, batches of 32, and a moving
average of the weights at 0.99; with little memory LoRA, rank 16 in the trunk and 32 in the expert.

Deviations: an instruction that is too long raises (openpi cuts it). Batches are padded to their longest row and not to
48 tokens, and cameras that are not there are left out and not black and masked, which changes no number. Steps past an
episode's end are not learned, where openpi repeats the last action. openpi's augmentation (crops, rotations, colours)
is the data's. What only the trunk's own output goes through (its last layer but for keys and values, its last norm) is
kept for the file's sake and never trains; the expert's table of words (1 GB in fp32, which nothing reads) is not, and
transformers says so when it reads a file of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.backbones.decoder import Gated
from polymodal.backbones.experts import ExpertConfig
from polymodal.core.batch import Batch
from polymodal.core.verbs import TensorSpec
from polymodal.modalities.action import Kind
from polymodal.nn.norm import OffsetRMS
from polymodal.systems import expert_files as files
from polymodal.systems.expert_policy import ExpertPolicy, ExpertPolicyConfig
from polymodal.weights.format import Format
from polymodal.weights.rules import Rule


@dataclass(frozen=True, kw_only=True)
class PI0Config(ExpertPolicyConfig):
    """A PaliGemma and an expert with the norms of Gemma."""


@final
class PI0(ExpertPolicy):
    """A flow policy that reads pictures, an instruction and a state."""

    config: PI0Config
    normalisation: Kind = "zscore"
    blocks_behind = (0,)  # the state

    def __init__(self, config: PI0Config) -> None:
        super().__init__(config)
        dim = config.expert.dim
        self.state_in = nn.Linear(config.state_width, dim)
        self.time_in = nn.Linear(2 * dim, dim)
        self.time_out = nn.Linear(dim, dim)

    def enter(self, batch: Batch, x: Tensor, t: Tensor) -> tuple[Float[Tensor, "batch tokens dim"], None]:
        actions = self.action_in(x)
        time = self.waves(t).to(actions.dtype).unsqueeze(1).expand_as(actions)
        actions = self.time_out(F.silu(self.time_in(torch.cat([actions, time], -1))))
        return torch.cat([self.state_in(batch["state"].to(actions.dtype)).unsqueeze(1), actions], 1), None

    def spell(self, text: str) -> list[int]:
        """The instruction, and a newline of its own."""
        plain = text.strip().replace("_", " ").replace("\n", " ")
        return self.tokenize(plain) + self.tokenize("\n")

    def inputs_spec(self) -> dict[str, TensorSpec]:
        return super().inputs_spec() | {"state": TensorSpec(shape=(self.state_width,))}


def read_hf(raw: Mapping[str, Any]) -> tuple[PI0Config, dict[str, str]]:
    keywords, report = files.read_transformers(raw, "pi0", OffsetRMS, 48)
    return PI0Config(**keywords), report


def write_hf(c: PI0Config) -> dict[str, Any]:
    return {"architectures": ["PI0ForConditionalGeneration"], **files.write_transformers(c, "pi0")}


def read_lerobot(raw: Mapping[str, Any]) -> tuple[PI0Config, dict[str, str]]:
    keywords, report = files.read_lerobot(raw, "pi0", OffsetRMS(), "MEAN_STD", 48)
    return PI0Config(**keywords), report


_LAYERS = {
    "action_in_proj": "action_in", "action_out_proj": "action_out", "state_proj": "state_in",
    "action_time_mlp_in": "time_in", "action_time_mlp_out": "time_out",
}  # fmt: skip


def _rules(layout: files.Layout, c: PI0Config) -> list[Rule]:
    return files.rules_with(c, _LAYERS, layout)


PI0.formats = {
    "hf": Format(read=read_hf, write=write_hf, rules=partial(_rules, "transformers")),
    "lerobot": Format(
        read=read_lerobot, write=partial(files.write_lerobot, kind="pi0", modes="MEAN_STD"),
        rules=partial(_rules, "lerobot"),
    ),
}  # fmt: skip


def base() -> PI0Config:
    """lerobot/pi0_base: 3.2B parameters."""
    expert = ExpertConfig(dim=1024, mlp=Gated(hidden_dim=4096, activation="gelu_tanh"))
    return PI0Config(**files.gemma_2b(224, (2048, 16384)), expert=expert)


PRESETS = {"lerobot/pi0_base": base}
