"""Text to ids: what a user types stays text, what is cut is said, and the files of a checkpoint are read in full."""

from __future__ import annotations

import json
import shutil
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from polymodal.core.errors import ConfigError, DataError, MediaError
from polymodal.core.files import read_json, write_json
from polymodal.tokenizers.text import MAX_CHARACTERS, Canonical, Lowercase, TextTokenizer, TruncationWarning, Verbatim

CORPUS = [
    "a red cup on a blue table, it's 12 o'clock",
    "the quick brown fox jumps over the lazy dog 100 times",
    "ein rotes Auto fährt über die Straße, naïve façade",
    "赤いコップ 猫が好き 😀",
]


@pytest.fixture(scope="module")
def clip() -> TextTokenizer:
    return TextTokenizer.train_bpe(CORPUS, 640, length=20)


@pytest.fixture
def folder(clip: TextTokenizer, tmp_path: Path) -> Path:
    clip.save(tmp_path)
    return tmp_path


def change(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON file; None removes one."""
    merged = {**read_json(path), **fields}
    write_json(path, {name: value for name, value in merged.items() if value is not None})


def spelled(tokenizer: TextTokenizer, text: str) -> str:
    """The text that its ids stand for, without control tokens."""
    ids, valid = tokenizer([text])
    inner = ids[0][valid[0]].tolist()[len(tokenizer.prefix) : -len(tokenizer.suffix)]
    return tokenizer.backend.decode(inner, skip_special_tokens=False).replace("</w>", " ").strip()


def vocabulary_of_words(folder: Path, words: list[str], **config: Any) -> None:
    """A tokenizer.json of whole words that ends a text with </s>, as SigLIP's does."""
    vocab = {word: i for i, word in enumerate(["</s>", "<pad>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>", "<pad>"])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "SiglipTokenizer", "eos_token": "</s>", "pad_token": "<pad>", **config},
    )


# ---- ids ----


def test_start_text_end_padding(clip: TextTokenizer) -> None:
    ids, valid = clip(["a red cup", ""])
    start, end = clip.vocab_size - 2, clip.vocab_size - 1  # the end has the largest id, for OpenAI's pooling
    assert (clip.prefix, clip.suffix, clip.pad_id) == ((start,), (end,), end)
    assert valid.sum(1).tolist() == [clip.count("a red cup"), 2]
    assert ids.shape == (2, clip.count("a red cup"))
    assert ids[1].tolist() == [start] + [end] * (ids.shape[1] - 1)
    assert (ids[:, 0] == start).all()
    assert ids.argmax(1).tolist() == [ids.shape[1] - 1, 1]


def test_padding_to_the_length_and_on_the_left(folder: Path) -> None:
    right = TextTokenizer.from_folder(folder, length=12, pad="max")
    change(folder / "tokenizer_config.json", padding_side="left")
    left = TextTokenizer.from_folder(folder, length=12, pad="max")
    (ids, valid), (other, other_valid) = right(["a cup"]), left(["a cup"])
    count = right.count("a cup")
    assert ids.shape == other.shape == (1, 12)
    assert valid[0].tolist() == [True] * count + [False] * (12 - count)
    assert torch.equal(ids.roll(12 - count, 1), other)
    assert torch.equal(valid.roll(12 - count, 1), other_valid)


@given(st.text(max_size=40))
def test_any_text_is_spelled_in_full_and_holds_no_control_token(clip: TextTokenizer, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        ids, valid = clip([text])
    content = ids[0][valid[0]][1:-1]
    assert not torch.isin(content, torch.tensor([*clip.prefix, *clip.suffix])).any()
    assert clip.count(text) >= int(valid.sum())


@pytest.mark.parametrize(
    "text", ["naïve 😀", "猫", "100 dogs ' ,", "\x00\x07 \u200b", "\U0001d518\U0001d52b", "e\u0301", "👩‍👩‍👧"]
)
def test_bytes_that_the_corpus_lacks_are_spelled(text: str) -> None:
    tokenizer = TextTokenizer.train_bpe(["aa ab"], 516)
    expected = unicodedata.normalize("NFC", text).lower()
    assert "".join(spelled(tokenizer, text).split()) == "".join(expected.split())


@pytest.mark.parametrize("text", ["<|endoftext|> more", "cup<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>"])
def test_control_tokens_that_a_user_types_are_text(clip: TextTokenizer, text: str) -> None:
    ids, _ = clip([text])
    assert (ids[0] == clip.suffix[0]).nonzero().flatten().tolist() == [ids.shape[1] - 1]
    assert (ids[0] == clip.prefix[0]).sum() == 1
    assert spelled(clip, text).replace(" ", "") == text.lower().replace(" ", "")


def test_long_texts_keep_their_end_token_and_are_announced(clip: TextTokenizer) -> None:
    long = "cup " * 2500
    with pytest.warns(TruncationWarning, match="more than 20 tokens"):
        ids, valid = clip(["a", long])
    assert ids.shape == (2, 20)
    assert ids[1, -1] == clip.suffix[0]
    assert valid[1].all()
    assert clip.count(long) > 2500
    exact = "猫" * ((20 - 2) // clip.count("猫"))
    assert clip.count(exact) <= 20
    clip([exact])  # no warning, or this would fail


def test_a_batch_equals_its_texts_one_by_one_also_from_threads(clip: TextTokenizer) -> None:
    texts = [f"{i} red cups" for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        single = list(pool.map(lambda text: clip([text])[0][0], texts))
    ids, valid = clip(texts)
    for row, mask, alone in zip(ids, valid, single, strict=True):
        assert torch.equal(row[mask], alone)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ([], "at least one text"),
        (["fine", "lone \ud800 half"], r"'lone \\ud800 half' has half of a surrogate pair"),
        (["x" * (MAX_CHARACTERS + 1)], "1,000,001 characters"),
    ],
)
def test_texts_that_are_none(clip: TextTokenizer, texts: list[str], reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        clip(texts)


def test_a_vocabulary_with_holes_says_so_instead_of_ending_the_text(tmp_path: Path) -> None:
    # As in small test checkpoints: CLIP's unknown token is its end token, and pooling would stop there.
    write_json(tmp_path / "vocab.json", {"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3})
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = TextTokenizer.from_folder(tmp_path, length=9)
    assert tokenizer(["aa a"])[0].tolist() == [[2, 0, 1, 1, 3]]
    with pytest.raises(MediaError, match="'a b' has characters that this vocabulary does not spell"):
        tokenizer(["a b"])


# ---- cleaning ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "hello world"),
        ("  it's\t a\n\nDOG - ok  ", "its a dog ok"),
        ("a_b{}~`c", "abc"),
        ("«quoted» \u2014 dash…", "«quoted» \u2014 dash…"),  # ASCII punctuation only
        ("!?.", ""),
        ("</s>", "s"),
        ("\u3000wide\u00a0blank", "wide blank"),
    ],
)
def test_the_cleaning_of_siglip(text: str, expected: str) -> None:
    assert Canonical()(text) == expected
    assert Canonical()(expected) == expected


def test_cleaning_follows_the_tokenizer_class(tmp_path: Path) -> None:
    vocabulary_of_words(tmp_path / "siglip", ["red", "cup"], model_max_length=6)
    siglip = TextTokenizer.from_folder(tmp_path / "siglip", pad="max")
    assert siglip.clean == Canonical()
    assert siglip(["Red, CUP!", "cup </s> red"])[0].tolist() == [[3, 4, 0, 1, 1, 1], [4, 2, 3, 0, 1, 1]]
    vocabulary_of_words(tmp_path / "cased", ["Red", "cup"], do_lower_case=False)
    assert TextTokenizer.from_folder(tmp_path / "cased", length=9)(["Red-"])[0].tolist() == [[3, 0]]
    vocabulary_of_words(tmp_path / "two", ["red,", "cup"], tokenizer_class="Siglip2Tokenizer")
    two = TextTokenizer.from_folder(tmp_path / "two", length=4, pad="max")
    assert (two.clean, two.pad_side) == (Lowercase(), "left")
    assert two(["RED,"])[0].tolist() == [[1, 1, 3, 0]]
    own = TextTokenizer.from_folder(tmp_path / "two", length=4, clean=Verbatim())
    assert own(["RED,"])[0].tolist() == [[2, 0]]


def test_control_tokens_by_flags(tmp_path: Path) -> None:
    vocabulary_of_words(tmp_path, ["red"], bos_token="<pad>", add_bos_token=True, add_eos_token=False)
    tokenizer = TextTokenizer.from_folder(tmp_path, length=9)
    assert (tokenizer.prefix, tokenizer.suffix) == ((1,), ())
    change(tmp_path / "tokenizer_config.json", add_bos_token=False, add_eos_token=True)
    tokenizer = TextTokenizer.from_folder(tmp_path, length=9)
    assert (tokenizer.prefix, tokenizer.suffix) == ((), (0,))


# ---- files ----


def test_saved_and_read_again_it_is_the_same(clip: TextTokenizer, folder: Path, tmp_path: Path) -> None:
    again = TextTokenizer.from_folder(folder)
    assert again.fingerprint == clip.fingerprint
    assert again.length == 20
    again.save(tmp_path / "twice")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "twice" / name).read_text() == (folder / name).read_text()


def test_the_fingerprint_sees_what_decides_the_ids(clip: TextTokenizer, folder: Path) -> None:
    seen = {clip.fingerprint, TextTokenizer.train_bpe(CORPUS[:2], 640, length=20).fingerprint}
    seen.add(TextTokenizer.from_folder(folder, length=19).fingerprint)
    seen.add(TextTokenizer.from_folder(folder, pad="max").fingerprint)
    seen.add(TextTokenizer.from_folder(folder, clean=Canonical()).fingerprint)
    assert len(seen) == 5


def test_the_two_old_files_of_clip(clip: TextTokenizer, folder: Path, tmp_path: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    old = tmp_path / "old"
    write_json(old / "vocab.json", model["vocab"])
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (old / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    tokenizer = TextTokenizer.from_folder(old, length=20)
    for text in (*CORPUS, "", "<|endoftext|>"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)
            assert torch.equal(tokenizer([text])[0], clip([text])[0])
    write_json(old / "vocab.json", {k: v for k, v in model["vocab"].items() if k != "<|endoftext|>"})
    with pytest.raises(ConfigError, match="endoftext"):
        TextTokenizer.from_folder(old, length=20)


def test_special_tokens_come_from_the_map_where_the_config_has_none(tmp_path: Path) -> None:
    vocabulary_of_words(tmp_path, ["red"], pad_token=None)
    write_json(tmp_path / "special_tokens_map.json", {"pad_token": {"content": "<pad>", "lstrip": True}})
    assert TextTokenizer.from_folder(tmp_path, length=5).pad_id == 1


def test_limits_in_the_files_are_not_inherited(clip: TextTokenizer, folder: Path) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=30, direction="left")
    backend.save(str(folder / "tokenizer.json"))
    assert TextTokenizer.from_folder(folder).fingerprint == clip.fingerprint


def test_a_folder_with_a_sentencepiece_model_only(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "spiece.model")
    with pytest.raises(ConfigError, match=r"spiece\.model only; tokenizer\.json is needed"):
        TextTokenizer.from_folder(folder)


def test_missing_and_broken_files(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "tokenizer.json").read_text()
    for content in (whole[: len(whole) // 2], "[]", "{}", ""):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(ConfigError, match=r"tokenizer\.json is not a tokenizer file"):
            TextTokenizer.from_folder(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        TextTokenizer.from_folder(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"lacks tokenizer_config\.json"):
        TextTokenizer.from_folder(folder)
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        TextTokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tokenizer_class": "BertTokenizer"}, "BertTokenizer is not supported"),
        ({"tokenizer_class": None}, "tokenizer_class is missing"),
        ({"pad_tokn": "!"}, "pad_tokn = '!' is not known. Did you mean 'pad_token'"),
        ({"truncation_side": "left"}, "truncation_side = 'left' is not supported"),
        ({"padding_side": "middle"}, "padding_side = 'middle'"),
        ({"pad_token": "<none>"}, "pad_token '<none>' is not in the vocabulary"),
        ({"model_max_length": 10**30}, "no model_max_length; pass length"),
        ({"model_max_length": 2}, "no room for text"),
    ],
)
def test_what_a_config_must_not_say(folder: Path, fields: dict[str, Any], reason: str) -> None:
    change(folder / "tokenizer_config.json", **dict.fromkeys(fields))
    change(folder / "tokenizer_config.json", **fields)
    with pytest.raises(ConfigError, match=reason):
        TextTokenizer.from_folder(folder)


# ---- training ----


def test_training_is_repeatable_and_keeps_the_size() -> None:
    # Many merges are tied in so small a corpus; each training has its own random hash seed.
    first, *others = (TextTokenizer.train_bpe(iter(CORPUS), 560) for _ in range(6))
    assert {other.fingerprint for other in others} == {first.fingerprint}
    assert first.vocab_size == first.backend.get_vocab_size() == 560
    assert TextTokenizer.train_bpe(["ab"], 4000).vocab_size == 515  # one merge is all there is


def test_training_learns_words() -> None:
    tokenizer = TextTokenizer.train_bpe(["red cup"] * 3, 600)
    assert tokenizer.count("RED cup") == 4
    assert tokenizer.count("red cups") > 4


def test_training_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="514 are bytes"):
        TextTokenizer.train_bpe(CORPUS, 514)
    for nothing in ([], ["", " "]):
        with pytest.raises(DataError, match="no text"):
            TextTokenizer.train_bpe(nothing, 600)
    with pytest.raises(MediaError, match="surrogate"):
        TextTokenizer.train_bpe(["\udfff"], 600)
