"""FVD: nearer for films that move alike, further for others, even of the same frames; by a named extractor."""

from __future__ import annotations

import pytest

from polymodal.core.errors import DataError
from polymodal.data.worlds import clips
from polymodal.evaluate.films import film_features, fvd
from polymodal.evaluate.pictures import Features
from polymodal.systems.clip import CLIP
from tests.nano import nano


def test_fvd() -> None:
    films = [clips.item("train", index, frames=5).frames for index in range(80)]
    model = nano("clip").eval()
    assert isinstance(model, CLIP)
    half, other = (film_features(model, part, name="small") for part in (films[:40], films[40:]))
    assert half.extractor == f"small {model.fingerprint} over time"
    assert half.values.shape == (40, 3 * model.embedding_dim)
    assert fvd(half, half).value == pytest.approx(0, abs=1e-6)
    alike = fvd(half, other)
    assert "over time; 40 against 40" in str(alike)
    still = film_features(model, [film[[0] * 5] for film in films[40:]], name="small")
    mixed = film_features(model, [film[[2, 0, 4, 1, 3]] for film in films[40:]], name="small")
    assert alike.value < fvd(half, mixed).value
    assert alike.value < fvd(half, still).value
    with pytest.raises(DataError, match="cannot be compared"):
        fvd(half, Features("I3D", half.values))
    with pytest.raises(DataError, match="two are needed"):
        film_features(model, [films[0][:1]], name="small")
