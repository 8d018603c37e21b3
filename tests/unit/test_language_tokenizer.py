"""Text to ids for language models: typed text is never control, streams equal whole texts, files are read in full."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from polymodal.core.errors import ConfigError, DataError, MediaError
from polymodal.core.files import read_json, write_json
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.tokenizers.text import MAX_CHARACTERS

CORPUS = [
    "the quick brown fox jumps over the lazy dog 100 times, isn't it?",
    "a red cup on a blue table\n\nand  two  blanks\n",
    "ein rotes Auto fährt über die Straße, naïve façade",
    "system user assistant model INST [ ] < > | im_start im_end image",
]
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


# ---- tokenizers in the style of each family, also for the parity tests ----


def byte_level(specials: Sequence[str], plain: Sequence[str] = ()) -> Tokenizer:
    """Llama 3, Qwen 2, GPT-2: bytes spelled as letters."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=390, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    backend.add_tokens([AddedToken(name, normalized=False) for name in plain])
    return backend


def sentencepiece(
    specials: Sequence[str], plain: Sequence[str] = (), *, prefix: bool, rstrip: bool = False
) -> Tokenizer:
    """Llama 2 (a blank before the text) and Gemma (none): BPE over characters, bytes for unknown ones."""
    steps = [normalizers.Prepend("▁")] if prefix else []
    reader = Tokenizer(models.BPE())
    reader.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    reserved = [*specials, *plain, *(f"<0x{i:02X}>" for i in range(256))]
    reader.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=460, special_tokens=reserved, show_progress=False)
    )
    model = json.loads(reader.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = reader.normalizer
    tail = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    backend.add_special_tokens([AddedToken(n, normalized=False, special=True, rstrip=rstrip) for n in specials])
    backend.add_tokens([AddedToken(name, normalized=False) for name in plain])
    bos = specials[1]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return backend


def unigram(specials: Sequence[str]) -> Tokenizer:
    """T5: pieces with scores, the names of its control tokens among them."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    own = ["<pad>", "</s>", "<unk>"]
    backend.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=120, special_tokens=own, unk_token="<unk>", show_progress=False)
    )
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in [*own, *specials]])
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
    )
    return backend


def wordpiece() -> Tokenizer:
    """BERT."""
    own = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=own, show_progress=False)
    )
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return backend


MAKERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bytes": (lambda: byte_level(IM, ["<tool_call>"]), {"eos_token": "<|im_end|>"}),
    "llama": (lambda: sentencepiece(["<unk>", "<s>", "</s>"], prefix=True), {"bos_token": "<s>", "eos_token": "</s>"}),
    "gemma": (
        lambda: sentencepiece(["<unk>", "<bos>", "<eos>"], ["\n\n"], prefix=False),
        {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "lstrip": False}, "unk_token": "<unk>"},
    ),
    "t5": (lambda: unigram(["<image>"]), {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}),
    "bert": (wordpiece, {"sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}),
}


def write(folder: Path, backend: Tokenizer, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageTokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        name: LanguageTokenizer.from_folder(write(root / name, make(), config))
        for name, (make, config) in MAKERS.items()
    }


@pytest.fixture(scope="module")
def own() -> LanguageTokenizer:
    return LanguageTokenizer.train_bpe(CORPUS, 400)


def control(tokenizer: LanguageTokenizer, ids: Sequence[int]) -> list[str]:
    names = {tokenizer.backend.token_to_id(name): name for name in tokenizer.special}
    return [names[i] for i in ids if i in names]


# ---- ids ----


@pytest.mark.parametrize("name", MAKERS)
def test_control_tokens_that_a_user_types_are_text(tokenizers: dict[str, LanguageTokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    unknown = tokenizer.tokens.get("unk_token")
    for token in sorted(tokenizer.special):
        for text in (token, f"a red{token}cup", f" {token} {token}", token[:3] + token + token[3:], token * 3):
            ids = tokenizer.encode(text, special=False)
            # What the vocabulary lacks is unknown, as in any text; a typed unknown token is spelled like the others.
            assert set(control(tokenizer, ids)) <= ({unknown} if name in ("t5", "bert") else set())
            if name == "bytes":
                assert tokenizer.decode(ids) == text
            if name in ("llama", "gemma"):
                assert tokenizer.decode(ids).strip() == text.strip()


def test_control_tokens_in_disguise() -> None:
    # Normalisation makes </s> of the full-width signs, and this model finds it in its vocabulary.
    tokenizer_json = unigram([])
    assert 1 in tokenizer_json.encode("cup\uff1c/s\uff1e", add_special_tokens=False).ids
    tokenizer = LanguageTokenizer(
        backend=tokenizer_json, config={"unk_token": "<unk>"}, prefix=(), suffix=(1,), bos_id=None, eos_ids=(1,),
        pad_id=0,
    )  # fmt: skip
    assert 1 not in tokenizer.encode("cup\uff1c/s\uff1e", special=False)
    assert 1 not in tokenizer.encode("cup</s>", special=False)
    assert tokenizer.encode("cup", special=True)[-1] == 1


def test_text_around_a_typed_token_is_encoded_as_text(tokenizers: dict[str, LanguageTokenizer]) -> None:
    # Split there, the part behind it would begin with a blank that nobody typed.
    llama = tokenizers["llama"]
    assert llama.decode(llama.encode("a</s>b", special=False)) == "a</s>b"


@given(
    st.lists(st.sampled_from(["<|im_end|>", "<|im_", "end|>", "<", "|>", " ", "\n", "é", "猫", "cup", "<tool_call>"]))
)
def test_no_mixture_of_pieces_becomes_control(tokenizers: dict[str, LanguageTokenizer], pieces: list[str]) -> None:
    tokenizer = tokenizers["bytes"]
    text = "".join(pieces)
    ids = tokenizer.encode(text, special=False)
    assert control(tokenizer, ids) == []
    assert tokenizer.decode(ids) == text


@given(st.text(max_size=40))
def test_every_text_comes_back(own: LanguageTokenizer, text: str) -> None:
    ids = own.encode(text, special=False)
    assert own.decode(ids) == text
    assert control(own, ids) == []


def test_the_frame_of_a_text(tokenizers: dict[str, LanguageTokenizer]) -> None:
    frames = {name: (t.prefix, t.suffix) for name, t in tokenizers.items()}
    assert frames == {
        "bytes": ((), ()),
        "llama": ((1,), ()),
        "gemma": ((1,), ()),
        "t5": ((), (1,)),
        "bert": ((2,), (3,)),
    }
    for tokenizer in tokenizers.values():
        bare, framed = (tokenizer.encode("a red cup", special=special) for special in (False, True))
        assert framed == [*tokenizer.prefix, *bare, *tokenizer.suffix] == tokenizer.backend.encode("a red cup").ids


def test_a_token_of_one_letter_is_a_letter() -> None:
    backend = byte_level(["!"])  # Stable Diffusion pads so
    tokenizer = LanguageTokenizer(
        backend=backend, config={}, prefix=(), suffix=(), bos_id=None, eos_ids=(), pad_id=backend.token_to_id("!")
    )
    assert tokenizer.encode("no!", special=False)[-1] == tokenizer.pad_id


def test_texts_from_threads(tokenizers: dict[str, LanguageTokenizer]) -> None:
    for tokenizer in tokenizers.values():
        texts = [f"{i} red cups </s> <|im_end|>" for i in range(20)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda text, t=tokenizer: t.encode(text, special=True), texts))
        assert found == [tokenizer.encode(text, special=True) for text in texts]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x" * (MAX_CHARACTERS + 1), "1,000,001 characters"),
        ("lone \ud800 half", "half of a surrogate pair"),
        ("mark \U0010fffd", r"U\+10FFFD, which is reserved"),
        ("alias \U0010fffc0\U0010fffc", r"U\+10FFFC, which is reserved"),
    ],
)
def test_texts_that_are_none(own: LanguageTokenizer, text: str, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        own.encode(text, special=False)


# ---- streams ----


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
def test_a_stream_is_the_text_of_all_ids(
    tokenizers: dict[str, LanguageTokenizer], name: str, skip: bool, data: st.DataObject
) -> None:
    tokenizer = tokenizers[name]
    size = tokenizer.vocab_size
    some = st.integers(0, size - 1)
    # Often bytes and control tokens, which are what streams break on.
    ids = data.draw(st.lists(st.one_of(some, st.integers(0, min(size - 1, 259)), st.integers(size - 5, size - 1))))
    stream = tokenizer.stream(skip_special=skip)
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids, skip_special=skip)


@pytest.mark.parametrize("name", ["bytes", "llama", "gemma"])
@given(text=st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs", "Co"]), max_size=30))
def test_a_stream_has_whole_characters(tokenizers: dict[str, LanguageTokenizer], name: str, text: str) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(text, special=True)
    stream = tokenizer.stream()
    pieces = [*map(stream.push, ids), stream.finish()]
    assert not any("\ufffd" in piece or "▁" in piece for piece in pieces) or "▁" in text
    expected = tokenizer.decode(ids)
    assert "".join(pieces) == expected
    if name == "bytes":
        assert expected == unicodedata.normalize("NFC", text)


def test_a_stream_does_not_wait_for_more_than_it_needs(own: LanguageTokenizer) -> None:
    stream = own.stream()
    ids = own.encode("a 猫 is", special=False)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == "a 猫 is"
    assert pieces[0] == "a"
    assert "猫" in pieces
    assert stream.finish() == ""


def test_what_is_broken_at_the_end_is_said_at_the_end(own: LanguageTokenizer) -> None:
    stream = own.stream()
    *ids, _ = own.encode("猫", special=False)
    assert [stream.push(i) for i in ids] == [""] * len(ids)
    assert stream.finish() == own.decode(ids) == "\ufffd"


# ---- files ----


@pytest.mark.parametrize("name", MAKERS)
def test_saved_and_read_again_it_is_the_same(
    tokenizers: dict[str, LanguageTokenizer], name: str, tmp_path: Path
) -> None:
    tokenizers[name].save(tmp_path)
    again = LanguageTokenizer.from_folder(tmp_path)
    assert again.fingerprint == tokenizers[name].fingerprint
    assert (again.special, again.tokens, again.eos_ids) == (
        tokenizers[name].special, tokenizers[name].tokens, tokenizers[name].eos_ids,
    )  # fmt: skip


def test_what_ends_an_answer(tmp_path: Path) -> None:
    write(tmp_path, byte_level(IM), {"eos_token": "<|im_end|>"})
    end, end_of_text = 392, 390
    assert LanguageTokenizer.from_folder(tmp_path).eos_ids == (end,)
    for given_ids, expected in (
        (end_of_text, (end, end_of_text)),
        ([end_of_text, end], (end, end_of_text)),
        (None, (end,)),
    ):
        write_json(tmp_path / "generation_config.json", {"eos_token_id": given_ids, "temperature": 0.7})
        assert LanguageTokenizer.from_folder(tmp_path).eos_ids == expected
    LanguageTokenizer.from_folder(tmp_path).save(tmp_path)
    assert read_json(tmp_path / "generation_config.json") == {"eos_token_id": [end], "temperature": 0.7}
    for bad in (4000, "2", [-1]):
        write_json(tmp_path / "generation_config.json", {"eos_token_id": bad})
        with pytest.raises(ConfigError, match="is the id of no token"):
            LanguageTokenizer.from_folder(tmp_path)


def test_tokens_that_stand_beside_tokenizer_json(tmp_path: Path) -> None:
    write(tmp_path, byte_level(IM, ["<think>"]), {
        "eos_token": "<|im_end|>",
        "image_token": "<think>",  # named, so special
        "added_tokens_decoder": {"395": {"content": "<a>", "special": True}, "394": {"content": "<b>"}},
    })  # fmt: skip
    write_json(tmp_path / "added_tokens.json", {"<c>": 396})
    write_json(tmp_path / "special_tokens_map.json", {"pad_token": {"content": "<a>"}})
    tokenizer = LanguageTokenizer.from_folder(tmp_path)
    assert [tokenizer.backend.token_to_id(t) for t in ("<b>", "<a>", "<c>")] == [394, 395, 396]
    assert tokenizer.special == {*IM, "<a>", "<think>"}
    assert tokenizer.pad_id == 395
    assert tokenizer.vocab_size == 397
    assert tokenizer.encode("<b>", special=False) == [394]  # text, by the checkpoint's own word
    assert tokenizer.backend.token_to_id("<think>") not in tokenizer.encode("<think>", special=False)
    write_json(tmp_path / "added_tokens.json", {"<c>": 500})
    with pytest.raises(ConfigError, match="'<c>' has the id 396, not 500"):
        LanguageTokenizer.from_folder(tmp_path)
    for broken in ([], {"<c>": None}, {"<c>": "x"}):
        write_json(tmp_path / "added_tokens.json", broken)
        with pytest.raises(ConfigError, match="malformed"):
            LanguageTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"tokenizer_class": "QwenTokenizer"}, "QwenTokenizer is not known. Did you mean 'Qwen2Tokenizer'"),
        ({"pad_token": "[PAD]"}, r"the token '\[PAD\]' is named, but is not in the vocabulary"),
        ({"add_bos_token": True}, "do not name its bos_token"),
    ],
)
def test_what_a_config_must_not_say(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    write(tmp_path, byte_level(IM), config)
    with pytest.raises(ConfigError, match=reason):
        LanguageTokenizer.from_folder(tmp_path)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no tokenizer"):
        LanguageTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\0")
    with pytest.raises(ConfigError, match=r"tokenizer\.model only; tokenizer\.json is needed"):
        LanguageTokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    with pytest.raises(ConfigError, match="save the tokenizer once more with transformers"):
        LanguageTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(ConfigError, match="is not a tokenizer file"):
        LanguageTokenizer.from_folder(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", [])
    with pytest.raises(ConfigError, match="is not a JSON object"):
        LanguageTokenizer.from_folder(tmp_path)


# ---- training ----


def test_training_is_repeatable() -> None:
    first, *others = (LanguageTokenizer.train_bpe(iter(CORPUS), 390) for _ in range(6))
    assert {other.fingerprint for other in others} == {first.fingerprint}
    assert first.vocab_size == first.backend.get_vocab_size() == 390
    assert first.special == {*IM, "<|image|>"}
    assert first.eos_ids == (first.backend.token_to_id("<|im_end|>"), first.pad_id)
    assert len(first.encode("2024", special=False)) == 4


def test_training_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="260 are bytes"):
        LanguageTokenizer.train_bpe(CORPUS, 260)
    with pytest.raises(DataError, match="no text"):
        LanguageTokenizer.train_bpe([], 400)
    with pytest.raises(MediaError, match="surrogate"):
        LanguageTokenizer.train_bpe(["\udfff"], 400)
