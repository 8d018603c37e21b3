"""Several codebooks at a time: the delay pattern, the loop, and the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.backbones.conditioned import ConditionedConfig, ConditionedDecoder
from polymodal.backbones.encdec import StackConfig, Unbiased
from polymodal.core.batch import IGNORE, Batch
from polymodal.core.errors import ConfigError, MediaError
from polymodal.heads.codebooks import Codebooks
from polymodal.samplers.delayed import Drawing, delay, draw, generate, undelay, whole

DIM, SIZE = 16, 11


class Toy(nn.Module):
    """A condition of three vectors, and everything that MusicGen is made of."""

    def __init__(self, delays: tuple[int, ...], context: int = 64, end: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        stack = StackConfig(num_layers=2, num_heads=2, head_dim=8, mlp=Unbiased(hidden_dim=32, activation="gelu"))
        self.delays, self.special_id, self.end_id = delays, SIZE, end
        self.books = Codebooks(len(delays), SIZE, DIM)
        self.decoder = ConditionedDecoder(ConditionedConfig(dim=DIM, stack=stack, context=context), DIM)

    def source(self, batch: Batch) -> Any:
        kept = ~batch.get("dropped", torch.zeros(batch.size, dtype=torch.bool))
        return self.decoder.source(batch["x"] * kept[:, None, None], torch.ones(batch["x"].shape[:2], dtype=torch.bool))

    def new_memory(self, batch: Batch, steps: int) -> Any:
        return self.decoder.new_memory(batch.size, steps)

    def begin(self, batch: Batch, memory: Any) -> Float[Tensor, "rows books codes"]:
        memory.source = self.source(batch)
        return self.step(torch.full((batch.size, len(self.delays)), self.special_id), memory)

    def step(self, codes: Int[Tensor, "rows books"], memory: Any) -> Float[Tensor, "rows books codes"]:
        return self.books.logits(self.decoder(self.books.embed(codes[..., None]), memory.source, memory))[:, :, 0]

    def scores(self, batch: Batch, steps: Int[Tensor, "batch books steps"]) -> Float[Tensor, "batch books steps codes"]:
        read = F.pad(steps, (1, 0), value=self.special_id)[..., :-1]
        return self.books.logits(self.decoder(self.books.embed(read), self.source(batch)))


def conditions(rows: int) -> Batch:
    return Batch(x=3 * torch.randn(rows, 3, DIM, generator=torch.Generator().manual_seed(1)))


PATTERNS = [(0, 1, 2, 3), (0, 0, 1, 1, 2, 2, 3, 3), (0,), (0, 0), (2, 0, 5)]
every_pattern = pytest.mark.parametrize("delays", PATTERNS, ids=str)


@every_pattern
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_what_is_delayed_can_be_undone(delays: tuple[int, ...], frames: int) -> None:
    codes = torch.randint(0, SIZE, (2, len(delays), frames))
    steps = delay(codes, delays, SIZE)
    assert steps.shape[2] == frames + max(delays)
    assert torch.equal(undelay(steps, delays), codes)
    assert int((steps == SIZE).sum()) == 2 * len(delays) * max(delays), "nothing but what the delays leave free"
    for book, by in enumerate(delays):
        assert bool((steps[:, book, :by] == SIZE).all())


def test_the_pattern_of_the_paper() -> None:
    codes = torch.arange(8).reshape(1, 4, 2)
    assert delay(codes, (0, 1, 2, 3), 9)[0].tolist() == [
        [0, 1, 9, 9, 9], [9, 2, 3, 9, 9], [9, 9, 4, 5, 9], [9, 9, 9, 6, 7],
    ]  # fmt: skip


@every_pattern
def test_greedy_codes_are_the_best_ones_when_everything_is_read_at_once(delays: tuple[int, ...]) -> None:
    model, batch, frames = Toy(delays), conditions(3), 6
    codes = torch.stack(whole(model, batch, Drawing(frames=frames, temperature=0.0)))
    assert codes.shape == (3, len(delays), frames)
    assert int(codes.max()) < SIZE, "the special code is never written"
    steps = delay(codes, delays, SIZE)
    best = model.scores(batch, steps).argmax(3)
    assert torch.equal(undelay(best, delays), codes)


def test_guidance_leads_away_from_what_is_said_without_the_condition() -> None:
    model, batch, frames = Toy((0, 1, 2)), conditions(2), 5
    codes = torch.stack(whole(model, batch, Drawing(frames=frames, temperature=0.0, guidance=3.0)))
    steps = delay(codes, model.delays, SIZE)
    asked = model.scores(batch, steps)
    free = model.scores(Batch(batch, dropped=torch.ones(2, dtype=torch.bool)), steps)
    assert torch.equal(undelay((free + 3 * (asked - free)).argmax(3), model.delays), codes)
    assert not torch.equal(codes, torch.stack(whole(model, batch, Drawing(frames=frames, temperature=0.0))))


WAYS = [
    Drawing(frames=5, seed=1), Drawing(frames=9, seed=2, guidance=2.5), Drawing(frames=1, seed=1, top_k=3),
    Drawing(frames=7, seed=3, temperature=0.5, guidance=3.0), Drawing(frames=4, temperature=0.0),
]  # fmt: skip


@every_pattern
def test_a_row_is_the_same_alone_and_in_a_batch(delays: tuple[int, ...]) -> None:
    model, batch = Toy(delays), conditions(len(WAYS))
    together = whole(model, batch, WAYS)
    assert [codes.shape[1] for codes in together] == [way.frames for way in WAYS]
    for row, way in enumerate(WAYS):
        (alone,) = whole(model, batch.take([row]), way)
        assert torch.equal(alone, together[row])


def test_the_seed_decides_and_another_one_gives_something_else() -> None:
    model, batch = Toy((0, 1)), conditions(1).take([0, 0, 0])
    first, again, other = whole(model, batch, [Drawing(frames=20, seed=seed) for seed in (5, 5, 6)])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_frame_is_given_as_soon_as_its_last_code_is_chosen() -> None:
    model, batch = Toy((0, 1, 3)), conditions(1)
    steps: list[int] = []
    model.decoder.register_forward_hook(lambda *_: steps.append(1))
    seen = [len(steps) for _ in generate(model, batch, Drawing(frames=4, seed=0))]
    assert seen == [4, 5, 6, 7], "a step reads what the one before chose; the largest delay is three"


@pytest.mark.parametrize("top_k", [1, 3, None])
def test_codes_are_drawn_by_their_probability(top_k: int | None) -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, -50.0]])
    random, way = torch.Generator().manual_seed(0), Drawing(frames=1, temperature=0.8, top_k=top_k)
    found = torch.bincount(torch.cat([draw(scores, way, random) for _ in range(2000)]), minlength=5) / 2000
    kept = (scores[0] / 0.8).masked_fill(torch.arange(5) >= (top_k or 5), -torch.inf)
    torch.testing.assert_close(found, kept.softmax(0), atol=0.04, rtol=0)
    assert float(found[(top_k or 4) :].sum()) == 0


@pytest.mark.parametrize("delays", [(0,), (0, 1, 2)], ids=str)
def test_a_row_ends_where_the_model_ends_it(delays: tuple[int, ...]) -> None:
    """Behind the last code before the end in the first book, not before a first frame; rows are of their own length."""
    batch, way = conditions(6), Drawing(frames=12, temperature=0.0)
    for row, free in enumerate(whole(Toy(delays), batch, way)):
        said = free[0].tolist()
        for end in set(said) - {said[0]}:
            (ended,) = whole(Toy(delays, end=end), batch.take([row]), way)
            assert ended[0].tolist() == said[: said.index(end)]
    drawn = [Drawing(frames=12, seed=seed) for seed in range(6)]
    rows = whole(Toy(delays, end=4), batch, drawn)
    assert len({codes.shape[1] for codes in rows}) > 2
    assert min(codes.shape[1] for codes in rows) >= 1
    for row, codes in enumerate(rows):
        assert 4 not in codes[0].tolist()
        (alone,) = whole(Toy(delays, end=4), batch.take([row]), drawn[row])
        assert torch.equal(alone, codes)


def test_what_cannot_be_done_is_refused() -> None:
    model, batch = Toy((0, 1), context=6), conditions(2)
    with pytest.raises(ConfigError, match="3 drawings for 2 rows"):
        whole(model, batch, [Drawing(frames=2)] * 3)
    with pytest.raises(MediaError, match="at most 6"):
        whole(model, batch, Drawing(frames=6))
    for bad in ({"frames": 0}, {"temperature": -1.0}, {"top_k": 0}, {"guidance": float("inf")}):
        with pytest.raises(ConfigError):
            Drawing(**{"frames": 3, **bad})
    with torch.no_grad():
        next(model.decoder.parameters())[0] = float("nan")
    with pytest.raises(ConfigError, match="higher precision"):
        whole(model, batch, Drawing(frames=2))


def test_the_loss_is_the_mean_over_the_books() -> None:
    """Each book counts alike, however few of its places are learned; against a plain sum."""
    torch.manual_seed(0)
    head, x = Codebooks(3, SIZE, DIM), torch.randn(2, 5, DIM)
    labels = torch.randint(0, SIZE, (2, 3, 5))
    labels[:, 1, :3] = IGNORE
    labels[:, 2] = IGNORE
    loss = head.loss(x, labels)
    mean = 0.0
    for book, layer in enumerate(head.lm_heads):
        places = [(b, s) for b in range(2) for s in range(5) if labels[b, book, s] != IGNORE]
        chances = [-layer(x[b, s]).log_softmax(0)[labels[b, book, s]] for b, s in places]
        mean = mean + sum(chances) / max(1, len(chances)) / 3
    torch.testing.assert_close(loss.mean, mean)
    assert loss.weight == 10
    assert head.loss(x, torch.full_like(labels, IGNORE)).total.item() == 0
