"""Samples, tokens, batches, the registry, atomic files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.files import atomic_path, atomic_write, read_json
from polymodal.core.registry import Entry, Registry
from polymodal.core.sample import Image, Sample, Text, samples
from polymodal.core.tokens import Modality, Tokens
from polymodal.systems import TABLE


def tokens(batch: int, length: int, *, causal: bool, modality: Modality = Modality.TEXT) -> Tokens:
    return Tokens.of(torch.randn(batch, length, 3), causal=causal, modality=modality)


def test_a_sample_is_made_of_whatever_a_user_has(tmp_path: Path) -> None:
    picture = PILImage.new("RGB", (2, 2))
    sample = Sample.of([tmp_path / "cup.JPG", "what colour?", [picture, np.zeros((2, 2), np.uint8)], b"png"])
    assert [type(p) for p in sample.parts] == [Image, Text, Image, Image, Image]
    assert sample.texts == [Text("what colour?")]
    assert Sample.of(sample) is sample


@pytest.mark.parametrize("wrong", [3, None, 2.5, {"a": 1}, Path("song.xyz"), Path("noextension"), []])
def test_what_is_no_sample_is_refused_with_what_would_be(wrong: object) -> None:
    with pytest.raises(MediaError):
        Sample.of(wrong)


def test_a_lone_string_is_one_sample_and_a_list_is_many() -> None:
    assert len(samples("a cup")) == 1
    assert len(samples(["a cup", "a plate"])) == 2
    assert len(samples(t for t in ["a", "b", "c"])) == 3
    assert samples([["a", "b"]])[0].texts == [Text("a"), Text("b")]


def see(a: Tokens) -> torch.Tensor:
    return a.mask()[:, 0]


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_concat_lets_each_part_see_all_before_it_and_none_after(
    batch: int, first: int, second: int, causal_a: bool, causal_b: bool
) -> None:
    a, b = tokens(batch, first, causal=causal_a), tokens(batch, second, causal=causal_b, modality=Modality.IMAGE)
    both = Tokens.concat([a, b])
    mask = see(both)
    assert mask[:, first:, :first].all()
    assert not mask[:, :first, first:].any()
    assert torch.equal(mask[:, :first, :first], see(a))
    assert torch.equal(mask[:, first:, first:], see(b))
    assert (both.position[:, first:].amin((1, 2)) == a.position.amax((1, 2)) + 1).all()
    assert both.modality[0].tolist() == [int(Modality.TEXT)] * first + [int(Modality.IMAGE)] * second


def test_masks_are_causal_full_and_blind_to_padding_and_other_samples() -> None:
    assert torch.equal(see(tokens(1, 4, causal=True))[0], torch.ones(4, 4).tril().bool())
    assert see(tokens(1, 4, causal=False)).all()
    valid = torch.tensor([[True, True, False]])
    padded = Tokens.of(torch.randn(1, 3, 2), causal=False, modality=Modality.TEXT, valid=valid)
    assert see(padded)[0].tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    packed = Tokens(
        x=torch.randn(1, 4, 2), valid=torch.ones(1, 4, dtype=torch.bool), block=torch.tensor([[0, 1, 0, 1]]),
        position=torch.tensor([[[0], [1], [0], [1]]]), modality=torch.zeros(1, 4, dtype=torch.int64),
        sample=torch.tensor([[0, 0, 1, 1]]),
    )  # fmt: skip
    causal = torch.ones(2, 2).tril().bool()
    assert torch.equal(see(packed)[0], torch.block_diag(causal, causal).bool())


def test_scatter_puts_features_in_order_and_refuses_another_count() -> None:
    text = tokens(2, 3, causal=True)
    where = torch.tensor([[False, True, True], [True, False, False]])
    features = torch.arange(9.0).view(3, 3)
    out = text.scatter(where, features)
    assert torch.equal(out.x[where], features)
    assert torch.equal(out.x[~where], text.x[~where])
    for wrong in (features[:2], torch.cat([features, features])):
        with pytest.raises(MediaError, match=f"3 placeholder tokens for {len(wrong)}"):
            text.scatter(where, wrong)


def test_an_unknown_name_gets_a_suggestion_and_entries_resolve() -> None:
    with pytest.raises(ConfigError, match="'siglip'"):
        TABLE["sigclip"]
    assert "clip" in TABLE
    assert TABLE["clip"].resolve().__name__ == "CLIP"
    entry = Entry(name="x", module="m", cls="C", paper="p", year=2020, url="u")
    with pytest.raises(AssertionError):
        Registry("system", (entry, entry))


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    atomic_write(file, "[1]")
    with pytest.raises(TypeError), atomic_path(file) as temporary:
        temporary.write_text("[2" + 3)  # type: ignore[operator]
    assert read_json(file) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"a\.json is not valid JSON"):
        read_json(file)
    with pytest.raises(ConfigError, match="does not exist"):
        read_json(tmp_path / "b.json")
