"""What the policies share that say an action in tokens of a language model. Not a system itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polymodal.core.batch import Batch, padded, text_batch
from polymodal.core.chat import Chat
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.observation import Observation
from polymodal.heads.lm import IGNORE
from polymodal.samplers.autoregressive import Completion, Constraint, Settings, complete
from polymodal.systems.acting import Policy
from polymodal.systems.generator import Generator


class SpeakingPolicy(Policy, Generator):
    """Base of the policies that answer with the tokens of a chunk of actions, and learn to end there.

    A subclass gives `ask`, `say`, `hear` and the `constraint` under which it answers: nothing else can be drawn.
    """

    horizon = 1
    temperature: float = 0.0  # 0 takes the likeliest token; above, tokens are drawn

    # -- what subclasses give

    def ask(self, observation: Observation) -> list[int]:
        """The prompt of a task, the places of the pictures of all `cameras` in it."""
        raise NotImplementedError

    def say(self, actions: Float[Tensor, "batch horizon action_width"]) -> list[list[int]]:
        """The tokens of normalised chunks."""
        raise NotImplementedError

    def hear(self, answers: Sequence[Completion]) -> Float[Tensor, "batch horizon action_width"]:
        """The inverse of `say`."""
        raise NotImplementedError

    @property
    def constraint(self) -> Constraint:
        """The answers that are actions, for ``Settings(constraint=...)``."""
        raise NotImplementedError

    @property
    def longest(self) -> int:
        """Tokens of the longest chunk, its end among them."""
        raise NotImplementedError

    # -- acting

    def observe(self, observations: Sequence[Observation]) -> Batch:
        """Prompts and pictures.

        Raises:
            MediaError: a camera is missing, or a prompt with its answer is longer than the context.
            UnsupportedError: no tokenizer was beside the weights.
        """
        return self._pictured(observations, [self.ask(o) for o in observations])

    def _pictured(
        self, observations: Sequence[Observation], rows: Sequence[list[int]], more: int | None = None
    ) -> Batch:
        need = max(map(len, rows)) + (self.longest if more is None else more)
        if need > self.context:
            raise MediaError(f"an instruction with its pictures and answer is {need} tokens; at most {self.context}")
        owners = torch.arange(len(rows)).repeat_interleave(len(self.cameras))
        return Batch(text_batch(rows), pixels=self._pixels(observations).flatten(0, 1), pixels_row=owners)

    def lesson(
        self,
        items: Sequence[Observation] | Sequence[Chat],
        actions: Float[Tensor, "batch horizon action_dim"] | None = None,
        valid: Bool[Tensor, "batch horizon"] | None = None,
    ) -> Batch:
        """What `loss` reads: of observations and what was done next; or of chats, so that language is not forgotten.

        Raises:
            MediaError: as `observe`, or as `Generator.lesson`.
        """
        if actions is None or valid is None:
            return Generator.lesson(self, items)  # type: ignore[arg-type]
        observations = [item for item in items if isinstance(item, Observation)]
        if not self.stop_ids:
            raise UnsupportedError(f"{self.source} names no token that ends an answer")
        asked = [self.ask(o) for o in observations]
        said = [[*answer, self.stop_ids[0]] for answer in self.say(self.to_network(actions))]
        rows = [a + b for a, b in zip(asked, said, strict=True)]
        out = self._pictured(observations, rows, 0)
        learned = [b if v else [IGNORE] * len(b) for b, v in zip(said, valid[:, 0].tolist(), strict=True)]
        marks = [[IGNORE] * len(a) + b for a, b in zip(asked, learned, strict=True)]
        return Batch(out, labels=padded(marks, fill=IGNORE))

    def chunk(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch horizon action_width"]:
        if self.tokenizer is None:
            raise UnsupportedError(f"{type(self).__name__} ({self.source}) has no tokenizer (see use_tokenizer)")
        constraint = self.constraint
        rules = [
            Settings(constraint=constraint, max_new_tokens=self.longest, temperature=self.temperature, seed=seed)
            for seed in torch.randint(2**62, (batch.size,), generator=generator).tolist()
        ]
        return self.hear(complete(self, batch, rules, self.tokenizer)).to(self.device)
