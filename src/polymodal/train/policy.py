"""What learning from preferences and from rewards have in common: a system that learns, and what it was before."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import TrainError
from polymodal.core.verbs import Scores, Trains
from polymodal.train.lora import without_lora


class Policy(nn.Module):
    """A system that learns, as ``policy``, beside what it was when this was made: its reference.

    Where adapters are all that learns, and have learned nothing yet, the reference is the system without them; else it
    is a frozen copy. It is in eval mode and reads the same batch, pictures included. ``trainable`` of a stage names
    parameters of ``policy.``.

    Raises:
        TrainError: the system cannot be trained, does not say how probable texts are, or nothing of it learns.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        if not isinstance(policy, Trains) or not isinstance(policy, Scores):
            raise TrainError(f"{type(policy).__name__} cannot learn from its answers: it lacks loss or log_probs")
        learns = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
        if not learns:
            raise TrainError(f"nothing of this {type(policy).__name__} learns: all its parameters are frozen")
        self.policy: Any = policy  # a module with the verbs Trains and Scores
        self.reference: Any = None
        learned = any(bool(p.any()) for name, p in policy.named_parameters() if name.endswith("lora_B.weight"))
        if learned or not all(".lora_" in f".{name}" for name in learns):
            self.reference = copy.deepcopy(policy).requires_grad_(False).eval()

    def reference_log_probs(self, batch: Batch) -> Float[Tensor, "batch tokens"]:
        """`Scores.log_probs` of the reference, without gradient."""
        with torch.no_grad():
            if self.reference is not None:
                return self.reference.log_probs(batch)
            training = self.policy.training
            self.policy.eval()
            try:
                with without_lora(self.policy):
                    return self.policy.log_probs(batch)
            finally:
                self.policy.train(training)

    # -- the verb Trains

    def loss(self, batch: Batch) -> Loss:
        raise NotImplementedError

    def after_step(self, step: int, total_steps: int) -> None:
        self.policy.after_step(step, total_steps)

    def no_decay(self) -> Iterable[str]:
        return [f"policy.{name}" for name in self.policy.no_decay()]

    def blocks(self) -> Iterable[nn.Module]:
        return [*self.policy.blocks(), *(self.reference.blocks() if self.reference is not None else ())]

    def train(self, mode: bool = True) -> Policy:
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self
