"""Residual quantisers: codebooks that train, dead entries, bandwidths, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polymodal.tokenizers.rvq import (
    DEAD,
    DECAY,
    Codebook,
    FactorisedCodebook,
    FactorisedQuantizer,
    ResidualQuantizer,
    kmeans,
    nearest,
    usage,
)

DIM = 8


def clouds(rows: int = 16, frames: int = 64, seed: int = 0) -> Tensor:
    """Vectors of 40 tight clouds, most of them near each other: random entries would be used by few."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, DIM, generator=torch.Generator().manual_seed(9)) * 3
    which = torch.randint(40, (rows, frames), generator=generator)
    return (centres[which] + 0.1 * torch.randn(rows, frames, DIM, generator=generator)).transpose(1, 2)


def error(quantizer: ResidualQuantizer, x: Tensor, codebooks: int | None = None) -> float:
    return float((quantizer.decode(quantizer.encode(x, codebooks)) - x).pow(2).mean() / x.pow(2).mean())


def quantizer(**more: object) -> ResidualQuantizer:
    torch.manual_seed(0)
    return ResidualQuantizer(num_codebooks=4, codebook_size=32, dim=DIM, **more)  # type: ignore[arg-type]


@pytest.mark.proves("encodec", "codebooks train: use of the coarse ones rises and the error falls, without a gradient")
@pytest.mark.parametrize("start", ["k-means", "random"])
def test_codebooks_learn(start: str) -> None:
    books, held_out = quantizer(), clouds(seed=77)
    for name, buffer in books.named_buffers():
        if name.endswith("started"):
            buffer.fill_(start == "random")
    before, used, errors = error(books, held_out), usage(books.encode(held_out), 32), []
    for step in range(80):
        books.train()(clouds(seed=step))
        errors.append(error(books, held_out))
    after = usage(books.encode(held_out), 32)
    assert errors[-1] < 0.02 < 0.3 < before
    assert (errors[0] < 0.1) == (start == "k-means"), "k-means is most of the way in one batch"
    assert (after[:2] >= 0.9).all()
    assert (after[:2] > used[:2] + 0.15).all(), "the later ones divide what is nearly nothing"
    coarse = [error(books, held_out, n) for n in (1, 2, 3, 4)]
    assert coarse == sorted(coarse, reverse=True)
    assert not list(books.parameters())


def test_evaluation_changes_nothing() -> None:
    books = quantizer()
    books(clouds())
    state = {name: tensor.clone() for name, tensor in books.state_dict().items()}
    books.eval()(clouds(seed=1))
    books.train().encode(clouds(seed=2))
    assert all(torch.equal(tensor, state[name]) for name, tensor in books.state_dict().items())


def test_averages_are_those_of_the_paper() -> None:
    """One step by hand: counts and sums keep 99 %, an entry is their ratio."""
    book = Codebook(2, 1)
    book.entries.copy_(torch.tensor([[0.0], [10.0]]))
    book.sums.copy_(book.entries * 50)
    book.counts.fill_(50)
    book.started.fill_(1)
    x = torch.tensor([[1.0]] * 100 + [[9.0]] * 300)
    book.learn(x, nearest(x, book.entries))
    counts = torch.tensor([50 * DECAY + 100 * (1 - DECAY), 50 * DECAY + 300 * (1 - DECAY)])
    sums = torch.tensor([[100 * (1 - DECAY)], [500 * DECAY + 2700 * (1 - DECAY)]])
    torch.testing.assert_close(book.counts, counts)
    torch.testing.assert_close(book.entries, sums / counts[:, None], rtol=1e-4, atol=0)


@pytest.mark.proves("encodec", "dead entries are replaced, and stay what replaced them")
def test_dead_entries_become_vectors_of_the_batch() -> None:
    book, x = Codebook(4, 2), torch.randn(64, 2)
    book.start(x)
    book.entries[3], book.sums[3], book.counts[3] = 100.0, 100.0 * DEAD, DEAD  # nothing will be near
    book.learn(x, nearest(x, book.entries))
    assert (book.entries[3] - x).abs().sum(1).min() == 0
    assert book.counts[3] == DEAD
    torch.testing.assert_close(book.sums[3] / book.counts[3], book.entries[3])
    kept = book.entries[3].clone()
    book.learn(x, torch.full((64,), 3))
    assert (book.entries[3] - kept).norm() < (x.mean(0) - kept).norm() + 1e-6, "it moves on from there"


def test_kmeans_finds_the_clouds() -> None:
    torch.manual_seed(1)
    x = torch.cat([torch.randn(50, 2) * 0.01 + centre for centre in (0.0, 5.0, -5.0)])
    centres, counts = kmeans(x, 12)
    assert (x[:, None] - centres).norm(dim=2).min(1).values.max() < 0.1
    assert counts.sum() == 150


def test_fewer_vectors_than_entries() -> None:
    books = quantizer()
    out = books(torch.randn(1, DIM, 3))
    assert out.codes.shape == (1, 4, 3)
    assert all(torch.isfinite(t).all() for t in books.state_dict().values())


@pytest.mark.proves("encodec", "quantiser dropout: a bandwidth is drawn for each batch of training")
def test_a_bandwidth_is_drawn() -> None:
    books, x = quantizer(choices=(1, 2, 4)), clouds()
    drawn = [books(x).codes.shape[1] for _ in range(60)]
    assert {n: drawn.count(n) > 8 for n in set(drawn)} == {1: True, 2: True, 4: True}
    assert books.eval()(x).codes.shape[1] == 4
    assert books(x, 2).codes.shape[1] == 2


@pytest.mark.proves("encodec", "one straight-through step; every codebook's commitment reaches the encoder")
def test_gradients() -> None:
    books = quantizer().eval()
    books.train()(clouds())
    books.eval()
    x = clouds(seed=3).requires_grad_()
    out = books(x)
    torch.testing.assert_close(out.x, books.decode(out.codes), rtol=0, atol=1e-5)
    direction = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad((out.x * direction).sum(), x, retain_graph=True)[0], direction)
    (gradient,) = torch.autograd.grad(out.penalty, x)
    left, expected = x.detach(), torch.zeros_like(x)
    for level in range(4):
        left = x.detach() - books.decode(out.codes[:, : level + 1])
        expected += 2 * left / left.numel() / 4
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-7)


def test_codes_are_those_of_fp32_under_autocast() -> None:
    books = quantizer()
    books.train()(clouds())
    books.eval()
    x = clouds(seed=5)
    plain = books(x).codes
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(books(x).codes, plain)


def factorised(**more: float) -> FactorisedQuantizer:
    torch.manual_seed(0)
    return FactorisedQuantizer(num_codebooks=3, codebook_size=16, dim=DIM, code_dim=4, **more)


@pytest.mark.proves("dac", "codebooks train by gradient: use rises and the error falls")
def test_factorised_codebooks_learn() -> None:
    books = factorised()
    optimizer = torch.optim.Adam(books.parameters(), lr=2e-2)
    held_out = clouds(seed=77)

    def state() -> tuple[float, float]:
        with torch.no_grad():
            out = books(held_out, 3)
        return float((out.x - held_out).pow(2).mean()), float(usage(out.codes, 16).mean())

    before, used = state()
    for step in range(60):
        x = clouds(seed=step)
        out = books(x)
        ((out.x - x).pow(2).mean() + out.penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
    after, use = state()
    assert after < 0.4 * before
    assert use >= max(0.8, used)


@pytest.mark.proves("dac", "lookup by angle: the length of a latent changes no code")
def test_length_changes_no_code() -> None:
    book = factorised().books[0]
    assert isinstance(book, FactorisedCodebook)
    latents = torch.randn(2, 4, 9)
    assert torch.equal(book.codes(latents), book.codes(latents * 17))
    with torch.no_grad():
        book.entries.weight.mul_(torch.rand(16, 1) * 5 + 0.1)
    assert torch.equal(book.codes(latents), book.codes(latents * 17))


@pytest.mark.proves("dac", "quantiser dropout: a share of the rows uses fewer codebooks")
def test_dropout_by_rows() -> None:
    books, x = factorised(dropout=0.5).train(), clouds(rows=8)
    whole = books(x, 3)
    assert torch.equal(whole.x[4:], books(x).x[4:])
    some = [bool((books(x).x[0] - whole.x[0]).abs().max() > 0) for _ in range(20)]
    assert 5 < sum(some) < 20
    torch.testing.assert_close(books.eval()(x).x, whole.x)
