"""Positions of mixed sequences by the paper's rule, and attention within pieces of a packed sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polymodal.backbones.decoder import AttentionConfig, DecoderConfig, Gated, Learned
from polymodal.backbones.mrope import check_sections, mrope_positions
from polymodal.core.errors import ConfigError, MediaError
from polymodal.encoders.qwen_vision import PieceAttention, Pieces, QwenVision, QwenVisionConfig, Windows
from polymodal.nn.attention import attend
from polymodal.nn.norm import RMS, Layer
from polymodal.nn.rope import Rope, rotate

Medium = tuple[int, int, int, float]  # tokens in time, rows and columns; ids from one step in time to the next
Row = list[int | Medium]  # lengths of texts, and media
STEPS = st.sampled_from([0.0, 0.5, 1.0, 2.25, 9.0])
ROWS = st.lists(
    st.lists(
        st.integers(1, 4) | st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), STEPS),
        min_size=1, max_size=6,
    ),
    min_size=1, max_size=3,
)  # fmt: skip


def by_hand(row: Row) -> list[tuple[int, int, int]]:
    """The rule of the paper, token by token."""
    out: list[tuple[int, int, int]] = []
    for part in row:
        start = max((max(ids) for ids in out), default=-1) + 1
        if isinstance(part, int):
            out += [(start + i,) * 3 for i in range(part)]
        else:
            t, h, w, step = part
            out += [(start + int(i * step), start + j, start + k) for i in range(t) for j in range(h) for k in range(w)]
    return out


def tensors(rows: list[Row]) -> tuple[torch.Tensor, ...]:
    media = [(i, part) for i, row in enumerate(rows) for part in row if isinstance(part, tuple)]
    kinds = [[j for p in row for j in ([0] * p if isinstance(p, int) else [1] * (p[0] * p[1] * p[2]))] for row in rows]
    places = torch.zeros(len(rows), max(map(len, kinds)), dtype=torch.bool)
    for i, kind in enumerate(kinds):
        places[i, : len(kind)] = torch.tensor(kind, dtype=torch.bool)
    grid = torch.tensor([m[:3] for _, m in media], dtype=torch.int64).reshape(-1, 3)
    owner = torch.tensor([i for i, _ in media], dtype=torch.int64)
    return places, grid, owner, torch.tensor([m[3] for _, m in media], dtype=torch.float32)


@given(rows=ROWS)
def test_positions_follow_the_rule(rows: list[Row]) -> None:
    got = mrope_positions(*tensors(rows))
    for row, mine in zip(rows, got, strict=True):
        expected = by_hand(row)
        assert mine[: len(expected)].tolist() == [list(ids) for ids in expected]


def test_published_examples() -> None:
    """Three steps of 2 x 2 tokens and five of text, as the documentation of both models works out."""
    first = mrope_positions(*tensors([[(3, 2, 2, 1.0), 5]]))[0]
    assert first[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3, 4, 5, 6, 7]
    assert first[:, 1].tolist() == [0, 0, 1, 1] * 3 + [3, 4, 5, 6, 7]
    assert first[:, 2].tolist() == [0, 1, 0, 1] * 3 + [3, 4, 5, 6, 7]
    # One frame a second, two frames a step, 25 ids a second.
    timed = mrope_positions(*tensors([[(3, 2, 2, 50.0), 5]]))[0]
    assert timed[:, 0].tolist() == [0] * 4 + [50] * 4 + [100] * 4 + [101, 102, 103, 104, 105]


@pytest.mark.parametrize(
    ("places", "grid", "row"),
    [
        ([[0, 1, 1, 0]], [[1, 1, 3]], [0]),  # too few
        ([[0, 1, 1, 1]], [[1, 1, 2]], [0]),  # too many
        ([[1, 0, 1, 0]], [[1, 1, 2]], [0]),  # text within
        ([[0, 0], [1, 1]], [[1, 1, 2]], [0]),  # in another row
        ([[0, 0, 0]], [[1, 1, 1]], [0]),  # none at all
    ],
)
def test_places_that_do_not_fit_are_refused(places: list[list[int]], grid: list[list[int]], row: list[int]) -> None:
    with pytest.raises(MediaError, match="placeholders"):
        mrope_positions(torch.tensor(places).bool(), torch.tensor(grid), torch.tensor(row))


def test_sections_must_fit_the_heads() -> None:
    def backbone(position: Rope | Learned) -> DecoderConfig:
        attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8)
        return DecoderConfig(
            vocab_size=9, context=9, dim=16, num_layers=1, attention=attention, mlp=Gated(hidden_dim=8), norm=RMS(),
            position=position,
        )  # fmt: skip

    check_sections(backbone(Rope(sections=(2, 1, 1))))
    for wrong in (Rope(), Rope(sections=(2, 2)), Rope(sections=(2, 2, 1)), Learned(count=9)):
        with pytest.raises(ConfigError, match="three sections"):
            check_sections(backbone(wrong))


@given(pieces=st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_pieces_see_themselves_alone(pieces: list[int]) -> None:
    """Equal to attention with a mask, whatever the lengths and the order of the pieces."""
    torch.manual_seed(0)
    number = torch.tensor(pieces)
    attention = PieceAttention(8, 2)
    rotary = Rope().angles(torch.arange(len(pieces))[None, :, None], 4)
    x = torch.randn(len(pieces), 8)
    got = attention(x, Pieces.of(number, rotary))
    parts = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
    q, k, v = (t.unflatten(1, (2, 4)).transpose(0, 1)[None] for t in parts)
    mask = number[:, None] == number[None]
    out = attend(rotate(q, *rotary), rotate(k, *rotary), v, mask=mask[None, None])
    torch.testing.assert_close(got, attention.o_proj(out[0].transpose(0, 1).flatten(1)), rtol=1e-5, atol=1e-6)


TOWER = QwenVisionConfig(
    dim=16, num_layers=2, num_heads=2, hidden_dim=24, activation="swiglu", norm=RMS(), patch_size=4,
    windows=Windows(size=16, full=(1,)),
)  # fmt: skip


def test_windows_hide_and_full_layers_show() -> None:
    """A change of one patch reaches its window in a windowed layer, its frame in a full one, another frame never."""
    grid = torch.tensor([[2, 6, 4], [1, 2, 2]])
    place = QwenVision(TOWER).layout(grid)
    assert place[:, 0].tolist() == [0] * 24 + [1] * 24 + [2] * 4
    assert place[:5, 1:].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]]
    for full, reached in (((), (place[:, 0] == 0) & (place[:, 1] < 4)), ((0, 1), place[:, 0] == 0)):
        torch.manual_seed(0)
        config = QwenVisionConfig(**{**vars(TOWER), "windows": Windows(size=16, full=full)})
        tower = QwenVision(config)
        patches = torch.randn(13, 4, config.patch_dim)
        before = tower(patches, grid)
        patches[0, 0] += 1
        changed = (tower(patches, grid) - before).abs().amax(-1).flatten() > 1e-7
        assert torch.equal(changed, reached)


def test_configs_that_cannot_be_built() -> None:
    shape = vars(TOWER)
    with pytest.raises(ConfigError, match="four dimensions"):
        QwenVisionConfig(**{**shape, "num_heads": 8})
    with pytest.raises(ConfigError, match="smaller than a token"):
        QwenVisionConfig(**{**shape, "norm": Layer(), "windows": Windows(size=7)})
