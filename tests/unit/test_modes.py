"""Text and pictures in turn: a picture is whole or is not begun."""

from __future__ import annotations

import pytest
import torch

from polymodal.core.errors import ConfigError
from polymodal.samplers.autoregressive import Guide, Settings, complete
from polymodal.samplers.modes import Interleaved, ModeGuide, PictureTokens, Wordless
from tests.toy_lm import ToyLM

TOKENS = PictureTokens(begin=10, end=11, codes=(15, 14, 13, 12), count=3)
VOCAB = 20


def rules(room: int, most: int | None = None, *, only: bool = False) -> Interleaved:
    return Interleaved(tokens=TOKENS, vocab_size=VOCAB, room=room, most=most, only=only, never=(19,))


def ids(guide: ModeGuide) -> list[int]:
    return guide.allowed().nonzero()[:, 0].tolist()


TEXT = [*range(10), 16, 17, 18]


def test_modes_by_hand() -> None:
    guide = rules(12).start()
    assert isinstance(guide, Guide)
    assert ids(guide) == sorted([*TEXT, 10])
    guide.take(3)
    guide.take(10)
    for code in (12, 15, 12):
        assert ids(guide) == [12, 13, 14, 15]
        guide.take(code)
    twin = guide.copy()
    assert ids(guide) == [11]
    guide.take(11)
    assert ids(guide) == sorted([*TEXT, 10]), "six are left, which is room for one more"
    guide.take(0)
    assert ids(guide) == sorted([*TEXT, 10]), "five are just enough"
    guide.take(0)
    assert ids(guide) == TEXT
    assert not guide.ended
    assert ids(twin) == [11], "a copy goes its own way"


def test_pictures_alone() -> None:
    guide = rules(10, 2, only=True).start()
    for token in (10, 12, 12, 12, 11, 10, 13, 13, 13):
        assert not guide.ended
        assert token in ids(guide)
        guide.take(token)
    assert ids(guide) == [11]
    guide.take(11)
    assert guide.ended
    for room, most in ((9, 2), (4, 1), (50, 0)):
        with pytest.raises(ConfigError, match="tokens to write them"):
            rules(room, most, only=True)
    assert ids(rules(50, 0).start()) == TEXT


@pytest.mark.proves("chameleon", "mode-aware sampling: whatever the model says, every picture is whole")
@pytest.mark.parametrize("beams", [1, 3])
def test_every_picture_is_whole(beams: int) -> None:
    torch.manual_seed(0)
    model = ToyLM(VOCAB, stop_ids=(2,), std=0.5)
    settings = [
        Settings(
            max_new_tokens=room, temperature=0.0 if beams > 1 else 2.0, seed=seed, beams=beams,
            constraint=rules(room, most),
        )
        for seed, (room, most) in enumerate([(30, None), (30, 1), (7, None), (4, None), (30, 0), (60, 3)])
    ]  # fmt: skip
    batch = model.prompt([[1, 4, 5]] * len(settings))
    pictures = []
    for answer, s in zip(complete(model, batch, settings, Wordless()), settings, strict=True):
        rest, count = list(answer.ids), 0
        while rest:
            if rest[0] != 10:
                assert rest.pop(0) in TEXT
                continue
            picture, rest = rest[:5], rest[5:]
            assert [*map(set, (picture[:1], picture[4:]))] == [{10}, {11}]
            assert set(picture[1:4]) <= {12, 13, 14, 15}
            count += 1
        assert isinstance(s.constraint, Interleaved)
        assert s.constraint.most is None or count <= s.constraint.most
        pictures.append(count)
    assert max(pictures) > 0 or beams > 1
