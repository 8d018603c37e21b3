"""wav2vec 2.0's objective: which code stands at a hidden place, told from codes of other hidden places."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.core.batch import Loss
from polymodal.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SpeechCodesConfig:
    """A product quantiser and a contrast.

    Attributes:
        num_codes: entries of each codebook.
        num_codebooks: from each of which one entry is taken; they are joined.
        code_dim: of the joined entries.
        proj_dim: in which a vector and a code are compared.
        temperature: that cosines are divided by.
        num_negatives: distractors, drawn from the other hidden places of the same sound.
        diversity: weight of the loss that asks for all codes to be used alike.
        gumbel_start: temperature of the drawing of codes at the first step.
        gumbel_floor: the least it falls to (0.5 for BASE, 0.1 for LARGE).
        gumbel_decay: its factor for each step.
    """

    num_codes: int = 320
    num_codebooks: int = 2
    code_dim: int = 256
    proj_dim: int = 256
    temperature: float = 0.1
    num_negatives: int = 100
    diversity: float = 0.1
    gumbel_start: float = 2.0
    gumbel_floor: float = 0.5
    gumbel_decay: float = 0.999995

    def __post_init__(self) -> None:
        if self.code_dim % self.num_codebooks:
            raise ConfigError(f"code_dim {self.code_dim} is not a multiple of num_codebooks {self.num_codebooks}")


class SpeechCodes(nn.Module):
    """The quantiser, both projections and the loss."""

    def __init__(self, config: SpeechCodesConfig, dim: int, feature_dim: int) -> None:
        super().__init__()
        c = self.config = config
        self.choice = nn.Linear(feature_dim, c.num_codebooks * c.num_codes)
        self.codes = nn.Parameter(torch.empty(c.num_codebooks * c.num_codes, c.code_dim // c.num_codebooks))
        self.query = nn.Linear(dim, c.proj_dim)
        self.target = nn.Linear(c.code_dim, c.proj_dim)
        self.gumbel = c.gumbel_start

    @torch.no_grad()
    def init_weights(self) -> None:
        """The paper's code: unit normals choose, codes are uniform, torch's own for the projections."""
        nn.init.normal_(self.choice.weight)
        nn.init.zeros_(self.choice.bias)
        nn.init.uniform_(self.codes)
        self.query.reset_parameters()
        self.target.reset_parameters()

    def after_step(self, step: int) -> None:
        """Cools the drawing of codes."""
        c = self.config
        self.gumbel = max(c.gumbel_start * c.gumbel_decay**step, c.gumbel_floor)

    def quantise(
        self, features: Float[Tensor, "batch frames channels"], hidden: Bool[Tensor, "batch frames"] | None = None
    ) -> tuple[Float[Tensor, "batch frames code_dim"], Float[Tensor, ""]]:
        """Codes, drawn with Gumbel noise while training, else the likeliest; and the perplexity of the codebooks.

        The perplexity is summed over the codebooks, of what is chosen at the hidden places (at all, if not given).
        """
        c = self.config
        scores = self.choice(features).unflatten(-1, (c.num_codebooks, c.num_codes))
        if self.training:
            flat = scores.reshape(-1, c.num_codes).float()
            chosen = F.gumbel_softmax(flat, tau=self.gumbel, hard=True).to(scores.dtype).view_as(scores)
            shares = scores.float().softmax(-1)
        else:
            chosen = F.one_hot(scores.argmax(-1), c.num_codes).to(scores.dtype)
            shares = chosen.float()
        seen = shares.flatten(0, 1) if hidden is None else shares[hidden]
        mean = seen.sum(0) / max(len(seen), 1)  # sounds that are too short have no hidden place
        perplexity = torch.exp(-torch.xlogy(mean, mean).sum(-1)).sum()
        codes = self.codes.unflatten(0, (c.num_codebooks, c.num_codes))
        return torch.einsum("bfgv,gvd->bfgd", chosen, codes).flatten(2), perplexity

    def forward(
        self,
        x: Float[Tensor, "batch frames dim"],
        features: Float[Tensor, "batch frames channels"],
        hidden: Bool[Tensor, "batch frames"],
        negatives: Int[Tensor, "batch frames distractors"],
    ) -> Loss:
        """The contrast at the hidden places, summed, and the diversity loss once for each of them.

        Args:
            x: what the tower made of the features with the hidden ones taken out.
            features: all of them.
            hidden: which were taken out.
            negatives: at each hidden place, rows of the flattened batch whose codes are distractors.
        """
        c = self.config
        codes, perplexity = self.quantise(features, hidden)
        targets = self.target(codes.to(self.target.weight.dtype))
        queries, positives = self.query(x)[hidden], targets[hidden]
        others = targets.flatten(0, 1)[negatives[hidden]]
        choices = torch.cat([positives[:, None], others], 1)
        logits = F.cosine_similarity(queries[:, None].float(), choices.float(), dim=-1) / c.temperature
        # A distractor that is the very code is no distractor.
        same = (others == positives[:, None]).all(-1)
        logits = logits.masked_fill(F.pad(same, (1, 0)), -torch.inf)
        count = int(hidden.sum())
        contrast = F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long), reduction="sum")
        total = c.num_codebooks * c.num_codes
        diversity = (total - perplexity) / total
        right = (logits.detach().argmax(1) == 0).float().mean() if count else torch.zeros(())
        metrics = {"accuracy": right, "perplexity": perplexity.detach(), "diversity": diversity.detach()}
        return Loss(total=contrast + c.diversity * diversity * count, weight=count, metrics=metrics)


def draw_negatives(
    hidden: Bool[Tensor, "batch frames"], count: int, generator: torch.Generator | None = None
) -> Int[Tensor, "batch frames count"]:
    """For each hidden place ``count`` others of its row, as rows of the flattened batch; a lone one has only itself."""
    out = torch.zeros(*hidden.shape, count, dtype=torch.long)
    for row, mine in enumerate(hidden.cpu()):
        places = mine.nonzero()[:, 0]
        if not len(places):
            continue
        drawn = torch.randint(max(len(places) - 1, 1), (len(places), count), generator=generator)
        drawn += (drawn >= torch.arange(len(places))[:, None]) & (len(places) > 1)
        out[row, places] = places[drawn] + row * hidden.shape[1]
    return out.to(hidden.device)
