"""pi0.5: pi0 whose state is text and whose expert is told the time by its norms (adaRMS).

Paper: Physical Intelligence, "pi0.5: a Vision-Language-Action Model with Open-World Generalization", 2025,
https://arxiv.org/abs/2504.16054. Official code: Physical-Intelligence/openpi (``pi05=True``). Hub: lerobot/pi05_base.

    pictures -> SigLIP -> linear -----------------------+
    "Task: ..., State: 12 201 ...;\\nAction: " -> embed --+-> Gemma 2B, read once: its keys and values --+
    noisy actions -> linear ------------------------------------------------------> expert (300M), 10 Euler steps
    time -> waves -> two layers with SiLU -> scale, shift and gate of each norm ---------+

Blocks: [pictures and text see one another | actions see one another]; none sees a later one.

Training details kept here: quantiles of states and actions on [-1, 1]; the state in 256 bins, written as integers; the
maps from time to norms start at zero, so that the gates are closed and the layers add nothing at first; all else as in
pi0, with up to 200 tokens of text. openpi fine-tunes at 5e-5 (10,000 steps of warm-up, then constant).

Deviations: what openpi has published is the expert alone: the paper's first stage (next-token prediction over FAST
tokens, boxes, subtasks and answers), its high-level texts and the gradient that is stopped between expert and trunk are
not in it, and not here. One linear layer for the state of pi0 is not kept. Further those of pi0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.backbones.decoder import Gated
from polymodal.backbones.experts import ExpertConfig
from polymodal.core.batch import Batch
from polymodal.core.observation import Observation
from polymodal.modalities.action import Kind
from polymodal.nn.norm import AdaptiveRMS
from polymodal.systems import expert_files as files
from polymodal.systems.expert_policy import ExpertPolicy, ExpertPolicyConfig
from polymodal.tokenizers.action_bins import state_text
from polymodal.weights.format import Format
from polymodal.weights.rules import Rule


@dataclass(frozen=True, kw_only=True)
class PI05Config(ExpertPolicyConfig):
    """A PaliGemma and an expert whose norms are told the time."""

    prompt: int = 200


@final
class PI05(ExpertPolicy):
    """A flow policy that reads pictures, and an instruction with the state in it."""

    config: PI05Config
    normalisation: Kind = "quantile"
    blocks_behind = ()

    def __init__(self, config: PI05Config) -> None:
        super().__init__(config)
        dim = config.expert.dim
        self.time_in = nn.Linear(dim, dim)
        self.time_out = nn.Linear(dim, dim)

    def enter(self, batch: Batch, x: Tensor, t: Tensor) -> tuple[Float[Tensor, "batch tokens dim"], Tensor]:
        actions = self.action_in(x)
        return actions, F.silu(self.time_out(F.silu(self.time_in(self.waves(t).to(actions.dtype)))))

    def observe(self, observations: Sequence[Observation]) -> Batch:
        """As `Policy.observe`; the state goes into the text."""
        out = super().observe(observations)
        del out["state"]
        states = state_text(self.states(observations))
        told = [f"{_plain(o.instruction)}, State: {s}" for o, s in zip(observations, states, strict=True)]
        return Batch(out | self.prompts(told))

    def instruct(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {}  # `observe` writes them, with the state

    def spell(self, text: str) -> list[int]:
        return self.tokenize(f"Task: {_plain(text)};\nAction: ")


def _plain(text: str) -> str:
    return text.strip().replace("_", " ").replace("\n", " ")


def read_hf(raw: Mapping[str, Any]) -> tuple[PI05Config, dict[str, str]]:
    keywords, report = files.read_transformers(raw, "pi05", AdaptiveRMS, 200)
    return PI05Config(**keywords), report


def read_lerobot(raw: Mapping[str, Any]) -> tuple[PI05Config, dict[str, str]]:
    keywords, report = files.read_lerobot(raw, "pi05", AdaptiveRMS(), "QUANTILES", 200)
    return PI05Config(**keywords), report


_LAYERS = {
    "action_in_proj": "action_in", "action_out_proj": "action_out",
    "time_mlp_in": "time_in", "time_mlp_out": "time_out",
}  # fmt: skip


def _rules(c: PI05Config) -> list[Rule]:
    return files.rules_with(c, _LAYERS, "lerobot")


PI05.formats = {
    # transformers has no pi0.5: this is how it would write one, for sizes that LeRobot has no names for.
    "hf": Format(read=read_hf, write=partial(files.write_transformers, kind="pi05"), rules=_rules),
    "lerobot": Format(
        read=read_lerobot, write=partial(files.write_lerobot, kind="pi05", modes="QUANTILES"), rules=_rules
    ),
}


def base() -> PI05Config:
    """lerobot/pi05_base: 3.4B parameters."""
    expert = ExpertConfig(dim=1024, mlp=Gated(hidden_dim=4096, activation="gelu_tanh"), norm=AdaptiveRMS())
    return PI05Config(**files.gemma_2b(224, (2048, 16384)), expert=expert)


PRESETS = {"lerobot/pi05_base": base}
