"""Residual vector quantisation: a vector as a sum of codebook entries, each nearest to what the ones before left over.

Two kinds of codebooks. `Codebook` (SoundStream, EnCodec) holds buffers that follow the mean of what is nearest to each
entry; only a commitment loss has a gradient. `FactorisedCodebook` (DAC) looks up by angle in a few dimensions, and its
entries train by gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.core.distributed import gather_with_grad

DECAY = 0.99  # of the moving averages
DEAD = 2.0  # an entry that fewer vectors a step are nearest to, on average, is replaced
KMEANS_ITERATIONS = 10
EPSILON = 1e-5  # keeps an entry that nothing is nearest to finite


class Quantised(NamedTuple):
    """Vectors as sums of codebook entries."""

    x: Float[Tensor, "batch dim frames"]  # the sums; the gradient passes straight through
    codes: Int[Tensor, "batch codebooks frames"]
    penalty: Float[Tensor, ""]  # what the codebooks cost: to be added to a loss that is a mean over the batch


class Coded(NamedTuple):
    """Vectors as one code each (`tokenizers.vq`, `tokenizers.fsq`)."""

    x: Float[Tensor, "batch dim *grid"]  # what the codes stand for; the gradient passes straight through
    codes: Int[Tensor, "batch *grid"]
    penalty: Float[Tensor, ""]  # to be added to a loss that is a mean over the batch


def agreed(drawn: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """What the first process drew: codebooks are the same on all, and so must all chances be."""
    return gather_with_grad(drawn)[: len(drawn)]


def drawn_rows(x: Float[Tensor, "rows dim"], number: int) -> Float[Tensor, "number dim"]:
    """Random rows, each once if there are enough."""
    enough = len(x) >= number
    order = torch.randperm(len(x))[:number] if enough else torch.randint(len(x), (number,))
    return x[agreed(order.to(x.device))]


def nearest(x: Float[Tensor, "rows dim"], entries: Float[Tensor, "size dim"]) -> Int[Tensor, " rows"]:
    """The entry with the smallest Euclidean distance to each row.

    Measured from the entries' mean: early in training the spread of latents is a hundredth of their length, and the
    difference of large squares would be noise.
    """
    centre = entries.mean(0)
    x, entries = x - centre, entries - centre
    return (x.pow(2).sum(1, keepdim=True) - 2 * x @ entries.t() + entries.pow(2).sum(1)).argmin(1)


def sums_of(
    x: Float[Tensor, "rows dim"], codes: Int[Tensor, " rows"], size: int
) -> tuple[Float[Tensor, " size"], Float[Tensor, "size dim"]]:
    """How many rows have each code, and their sum."""
    return torch.bincount(codes, minlength=size).to(x.dtype), x.new_zeros(size, x.shape[1]).index_add_(0, codes, x)


def usage(codes: Int[Tensor, "batch codebooks frames"], size: int) -> Float[Tensor, " codebooks"]:
    """The share of each codebook's entries that occur."""
    return torch.tensor([level.unique().numel() / size for level in codes.transpose(0, 1)])


def kmeans(x: Float[Tensor, "rows dim"], size: int) -> tuple[Float[Tensor, "size dim"], Float[Tensor, " size"]]:
    """Centres after a few rounds from random rows, and how many rows are nearest to each."""
    centres = drawn_rows(x, size)
    for _ in range(KMEANS_ITERATIONS):
        counts, sums = sums_of(x, nearest(x, centres), size)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return centres, counts


class Codebook(nn.Module):
    """Entries that are moving averages of the vectors nearest to them: buffers, no gradient.

    The first training batch starts them by k-means. An entry that falls out of use becomes a random vector of the
    batch, with an average that begins there.
    """

    entries: Tensor
    sums: Tensor
    counts: Tensor
    started: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("entries", torch.empty(size, dim))
        self.register_buffer("sums", torch.empty(size, dim))
        self.register_buffer("counts", torch.empty(size))
        self.register_buffer("started", torch.empty(1))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Random entries, to be replaced by the first training batch."""
        nn.init.kaiming_uniform_(self.entries)
        self.sums.copy_(self.entries)
        self.counts.zero_()
        self.started.zero_()

    @torch.no_grad()
    def start(self, x: Float[Tensor, "rows dim"]) -> None:
        """k-means, if this is the first batch."""
        if not self.started.item():
            centres, counts = kmeans(gather_with_grad(x), len(self.entries))
            self.entries.copy_(centres)
            self.sums.copy_(centres * counts[:, None])
            self.counts.copy_(counts)
            self.started.fill_(1)

    @torch.no_grad()
    def learn(self, x: Float[Tensor, "rows dim"], codes: Int[Tensor, " rows"]) -> None:
        """Moves the entries to the mean of their vectors, those of all processes; replaces the dead."""
        x, codes, size = gather_with_grad(x), gather_with_grad(codes), len(self.entries)
        counts, sums = sums_of(x, codes, size)
        self.counts.lerp_(counts, 1 - DECAY)
        self.sums.lerp_(sums, 1 - DECAY)
        total = self.counts.sum()
        smoothed = (self.counts + EPSILON) / (total + size * EPSILON) * total
        self.entries.copy_(self.sums / smoothed[:, None])
        dead = self.counts < DEAD
        if dead.any():
            fresh = drawn_rows(x, int(dead.sum()))
            self.entries[dead] = fresh
            self.sums[dead] = fresh * DEAD
            self.counts[dead] = DEAD


class ResidualQuantizer(nn.Module):
    """EnCodec's: `Codebook`s one after the other.

    Args:
        choices: how many codebooks a training step may use; one of these is drawn for the whole batch, so that every
            bit rate works. Without any, all are used.
    """

    def __init__(self, *, num_codebooks: int, codebook_size: int, dim: int, choices: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.books = nn.ModuleList(Codebook(codebook_size, dim) for _ in range(num_codebooks))
        self.choices = choices or (num_codebooks,)
        assert all(1 <= choice <= num_codebooks for choice in self.choices)

    def _books(self, number: int | None) -> list[Codebook]:
        return [book for book in self.books[:number] if isinstance(book, Codebook)]

    def forward(self, x: Float[Tensor, "batch dim frames"], codebooks: int | None = None) -> Quantised:
        """The nearest sums; in training mode the codebooks learn from them.

        The gradient passes straight through the whole sum at once, and each codebook's commitment reaches the encoder.
        """
        if self.training and codebooks is None:
            codebooks = self.choices[int(agreed(torch.randint(len(self.choices), (1,), device=x.device)))]
        with torch.autocast(x.device.type, enabled=False):  # rounding would choose other entries
            rows = rearrange(x.float(), "b d t -> (b t) d")
            left, codes, costs = rows, [], []
            for book in self._books(codebooks):
                if self.training:
                    book.start(left.detach())
                code = nearest(left.detach(), book.entries)
                chosen = book.entries[code]
                if self.training:
                    book.learn(left.detach(), code)
                costs.append(F.mse_loss(left, chosen))
                codes.append(code)
                left = left - chosen
            total = rows + (-left).detach()  # rows - left is the sum of what was chosen
        out = rearrange(total, "(b t) d -> b d t", b=len(x))
        return Quantised(out, rearrange(torch.stack(codes), "k (b t) -> b k t", b=len(x)), torch.stack(costs).mean())

    @torch.no_grad()
    def encode(
        self, x: Float[Tensor, "batch dim frames"], codebooks: int | None = None
    ) -> Int[Tensor, "batch codebooks frames"]:
        """Codes without learning, also in training mode."""
        left, codes = rearrange(x.float(), "b d t -> (b t) d"), []
        for book in self._books(codebooks):
            codes.append(nearest(left, book.entries))
            left = left - book.entries[codes[-1]]
        return rearrange(torch.stack(codes), "k (b t) -> b k t", b=len(x))

    def decode(self, codes: Int[Tensor, "batch codebooks frames"]) -> Float[Tensor, "batch dim frames"]:
        """The sums that codes stand for."""
        books = self._books(codes.shape[1])
        chosen = [book.entries[codes[:, level]] for level, book in enumerate(books)]
        return rearrange(torch.stack(chosen).sum(0), "b t d -> b d t")


class FactorisedCodebook(nn.Module):
    """Looks vectors up by their angle in ``code_dim`` dimensions; entries train by gradient."""

    def __init__(self, *, size: int, dim: int, code_dim: int) -> None:
        super().__init__()
        self.in_proj = nn.Conv1d(dim, code_dim, 1)
        self.out_proj = nn.Conv1d(code_dim, dim, 1)
        self.entries = nn.Embedding(size, code_dim)

    def codes(self, latents: Float[Tensor, "batch code_dim frames"]) -> Int[Tensor, "batch frames"]:
        rows = F.normalize(rearrange(latents, "b d t -> (b t) d"))
        return rearrange(nearest(rows, F.normalize(self.entries.weight)), "(b t) -> b t", b=len(latents))

    def decode(self, codes: Int[Tensor, "batch frames"]) -> Float[Tensor, "batch dim frames"]:
        return self.out_proj(self.entries(codes).transpose(1, 2))

    def forward(
        self, x: Float[Tensor, "batch dim frames"]
    ) -> tuple[Float[Tensor, "batch dim frames"], Int[Tensor, "batch frames"], Tensor, Tensor]:
        """What is chosen for each vector, its code, and for each row the commitment and codebook losses."""
        latents = self.in_proj(x)
        codes = self.codes(latents)
        chosen = self.entries(codes).transpose(1, 2)
        commitment = (latents - chosen.detach()).pow(2).mean((1, 2))
        codebook = (chosen - latents.detach()).pow(2).mean((1, 2))
        return self.out_proj(latents + (chosen - latents).detach()), codes, commitment, codebook


class FactorisedQuantizer(nn.Module):
    """DAC's: `FactorisedCodebook`s one after the other.

    Args:
        dropout: in training this share of the rows uses a random number of codebooks.
        commitment: weight of the loss that pulls latents to entries.
        codebook: weight of the loss that pulls entries to latents.
    """

    def __init__(
        self, *, num_codebooks: int, codebook_size: int, dim: int, code_dim: int,
        dropout: float = 0.0, commitment: float = 0.25, codebook: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.books = nn.ModuleList(
            FactorisedCodebook(size=codebook_size, dim=dim, code_dim=code_dim) for _ in range(num_codebooks)
        )
        self.dropout, self.commitment, self.codebook = dropout, commitment, codebook

    def forward(self, x: Float[Tensor, "batch dim frames"], codebooks: int | None = None) -> Quantised:
        rows, number = len(x), len(self.books) if codebooks is None else codebooks
        used = torch.full((rows,), number, device=x.device)
        if self.training and codebooks is None:
            some = int(rows * self.dropout)
            used[:some] = torch.randint(1, number + 1, (some,), device=x.device)
        total, left, codes, penalty = torch.zeros_like(x), x, [], x.new_zeros(())
        for level, book in enumerate(self.books[:number]):
            chosen, code, commitment, entries = book(left)
            mask = level < used
            total = total + chosen * mask[:, None, None]
            left = left - chosen
            penalty = penalty + (mask * (self.commitment * commitment + self.codebook * entries)).mean()
            codes.append(code)
        return Quantised(total, torch.stack(codes, 1), penalty)

    @torch.no_grad()
    def encode(
        self, x: Float[Tensor, "batch dim frames"], codebooks: int | None = None
    ) -> Int[Tensor, "batch codebooks frames"]:
        """Codes of vectors, with all codebooks or with the first few."""
        return self(x, len(self.books) if codebooks is None else codebooks).codes

    def decode(self, codes: Int[Tensor, "batch codebooks frames"]) -> Float[Tensor, "batch dim frames"]:
        """The sums that codes stand for."""
        books = [book for book in self.books[: codes.shape[1]] if isinstance(book, FactorisedCodebook)]
        return torch.stack([book.decode(codes[:, level]) for level, book in enumerate(books)]).sum(0)
