"""Text to token ids, from a checkpoint's own files.

Three promises that the libraries below do not make:

- What a user types is text. ``<|endoftext|>`` in a query is spelled out in ordinary tokens and ends nothing.
- A text that is too long is cut before its end token, never through it, and a `TruncationWarning` says so.
- Calls share no state that changes, so threads may share a tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Int
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from polymodal.core.errors import ConfigError, DataError, MediaError, did_you_mean
from polymodal.core.files import atomic_write, read_json, write_json

MAX_CHARACTERS = 1_000_000
Side: TypeAlias = Literal["right", "left"]
Pad: TypeAlias = Literal["longest", "max"]


class TruncationWarning(UserWarning):
    """Texts longer than a model reads were cut."""


# ---- what is done to a text before it is split ----


@dataclass(frozen=True)
class Verbatim:
    """The text as it is; what its tokenizer.json says is all that happens to it."""

    def __call__(self, text: str) -> str:
        return text


@dataclass(frozen=True)
class Lowercase:
    """SigLIP 2: lower case, as in its training, whatever the borrowed tokenizer.json says."""

    def __call__(self, text: str) -> str:
        return text.lower()


@dataclass(frozen=True)
class Canonical:
    """SigLIP: ASCII punctuation removed, runs of white space made one blank, ends stripped, lower case.

    Source: big_vision, ``evaluators/proj/image_text/prompt_engineering.py``.
    """

    lowercase: bool = True

    def __call__(self, text: str) -> str:
        text = (text.lower() if self.lowercase else text).translate(_NO_PUNCTUATION)
        return re.sub(r"\s+", " ", text).strip()


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
Cleaning: TypeAlias = Verbatim | Lowercase | Canonical


# ---- the tokenizer ----


@dataclass(frozen=True, kw_only=True, eq=False)
class TextTokenizer:
    """Texts to padded batches of ids: ``prefix``, the text's tokens, ``suffix``, padding."""

    backend: Tokenizer
    config: Mapping[str, Any]  # tokenizer_config.json, written back by `save`
    length: int  # tokens at most, control tokens included
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad_id: int
    pad_side: Side = "right"
    pad: Pad = "longest"
    clean: Cleaning = Verbatim()

    def __post_init__(self) -> None:
        if self.length <= len(self.prefix) + len(self.suffix):
            raise ConfigError(f"a length of {self.length} tokens leaves no room for text between the control tokens")
        # Cutting and padding happen here, once, and not in the backend, whose settings are shared and can be changed.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # special tokens that a user typed are text

    def __call__(self, texts: Sequence[str]) -> tuple[Int[Tensor, "texts length"], Bool[Tensor, "texts length"]]:
        """Ids, and which of them are not padding.

        ``pad="max"`` gives ``length`` columns (SigLIP was trained so), ``"longest"`` as many as the longest text needs.
        Texts that are too long lose their end and keep their end token; a `TruncationWarning` says so.

        Raises:
            MediaError: a text is not a str, has over a million characters or lone surrogates, or uses characters that
                this vocabulary can only spell with a control token.
        """
        if not texts:
            raise MediaError("a tokenizer needs at least one text")
        room = self.length - len(self.prefix) - len(self.suffix)
        contents = self._contents(texts)
        if any(len(content) > room for content in contents):
            warnings.warn(
                f"texts of more than {self.length} tokens are cut; TextTokenizer.count(text) tells how many a text has",
                TruncationWarning,
                stacklevel=2,
            )
        rows = [[*self.prefix, *content[:room], *self.suffix] for content in contents]
        width = self.length if self.pad == "max" else max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        valid = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            place = slice(0, len(row)) if self.pad_side == "right" else slice(width - len(row), width)
            ids[i, place] = torch.tensor(row)
            valid[i, place] = True
        return ids, valid

    def count(self, text: str) -> int:
        """How many tokens a text has, control tokens included, before any cut."""
        return len(self.prefix) + len(self._contents([text])[0]) + len(self.suffix)

    def _contents(self, texts: Sequence[str]) -> list[list[int]]:
        cleaned = [self.clean(checked_text(text)) for text in texts]
        contents = [encoding.ids for encoding in self.backend.encode_batch_fast(cleaned, add_special_tokens=False)]
        control = {*self.prefix, *self.suffix}
        for text, content in zip(texts, contents, strict=True):
            # Happens where the unknown token is the end token (CLIP) and the vocabulary lacks a byte.
            if not control.isdisjoint(content):
                raise MediaError(f"{quoted(text)} has characters that this vocabulary does not spell")
        return contents

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids."""
        settings = (self.length, self.prefix, self.suffix, self.pad_id, self.pad_side, self.pad, self.clean)
        return hashlib.sha256((self.backend.to_str() + repr(settings)).encode()).hexdigest()

    # -- files --

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, length: int | None = None, pad: Pad = "longest", clean: Cleaning | None = None
    ) -> TextTokenizer:
        """Reads ``tokenizer.json`` (or CLIP's ``vocab.json`` and ``merges.txt``), ``tokenizer_config.json`` and
        ``special_tokens_map.json``.

        Args:
            folder: of a checkpoint.
            length: tokens at most; the files' ``model_max_length`` if not given.
            pad: to the longest text of a batch, or always to ``length``.
            clean: what is done to a text first; what the files' ``tokenizer_class`` does if not given.

        Raises:
            ConfigError: a file is missing or broken, or says something that this class does not do.
        """
        folder = Path(folder)
        config = _read_config(folder)
        kind = _KINDS[_kind(config)]
        backend = read_backend(folder, config)
        prefix, suffix = control_ids(backend, config)
        if length is None:
            length = config.get("model_max_length")
            if not isinstance(length, int) or length > 2**20:
                raise ConfigError(f"{folder}: the files give no model_max_length; pass length")
        if clean is None:
            clean = Canonical(lowercase=config.get("do_lower_case", True)) if kind.canonical else kind.clean
        side = config.get("padding_side", kind.pad_side)
        if side not in ("right", "left"):
            raise ConfigError(f"{folder}: padding_side = {side!r} is neither right nor left")
        return cls(
            backend=backend,
            config=config,
            length=length,
            prefix=prefix,
            suffix=suffix,
            pad_id=token_id(backend, config, "pad_token"),
            pad_side=side,
            pad=pad,
            clean=clean,
        )

    def save(self, folder: str | Path) -> None:
        """Writes the three files that `from_folder` and transformers read."""
        folder = Path(folder)
        atomic_write(folder / "tokenizer.json", self.backend.to_str(pretty=True) + "\n")
        write_json(
            folder / "tokenizer_config.json",
            {**self.config, "model_max_length": self.length, "padding_side": self.pad_side},
        )
        special = {name: token_content(self.config[name]) for name in TOKENS if self.config.get(name) is not None}
        write_json(folder / "special_tokens_map.json", special)

    @classmethod
    def train_bpe(
        cls, texts: Iterable[str], vocab_size: int, *, length: int = 77, pad: Pad = "longest"
    ) -> TextTokenizer:
        """A tokenizer of CLIP's kind: lower case, byte-level BPE with end-of-word marks, start and end tokens.

        All 256 bytes are in the vocabulary, inside and at the end of a word, so every text can be spelled. The end
        token has the largest id, where OpenAI's pooling looks for it. transformers' ``CLIPTokenizer`` reads the files.

        Args:
            texts: to learn from; read once.
            vocab_size: ids at most, 514 for the bytes and control tokens among them; fewer if the texts give no more.
            length: tokens at most, control tokens included.
            pad: as in `from_folder`.

        Raises:
            ConfigError: the vocabulary is too small.
            DataError: there is no text to learn from.
        """
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        endings = [letter + _END_OF_WORD for letter in letters]
        vocab = {token: i for i, token in enumerate([*letters, *endings])}
        if vocab_size <= len(vocab) + 2:
            raise ConfigError(
                f"vocab_size {vocab_size} leaves no merges: {len(vocab) + 2} are bytes and control tokens"
            )
        learner = _clip_pipeline(models.BPE(end_of_word_suffix=_END_OF_WORD, unk_token=_CLIP_END))
        # Left to itself the trainer numbers the endings in the order of a randomly seeded hash map, ties between merges
        # fall by these numbers, and no two trainings agree. As "special" tokens they have their numbers beforehand.
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            end_of_word_suffix=_END_OF_WORD,
            initial_alphabet=letters,
            special_tokens=endings,
            show_progress=False,
        )
        learner.train_from_iterator(map(checked_text, texts), trainer)
        learnt = _merges(learner)
        if not learnt:
            raise DataError("train_bpe was given no text to learn from")
        # The vocabulary anew, in CLIP's order: bytes, endings, merges, control tokens.
        merges = []
        for left, right in learnt:
            if left + right not in vocab and len(vocab) == vocab_size - 2:
                break
            merges.append((left, right))
            vocab.setdefault(left + right, len(vocab))
        for token in (_CLIP_START, _CLIP_END):
            vocab[token] = len(vocab)
        model = models.BPE(vocab, merges, end_of_word_suffix=_END_OF_WORD, unk_token=_CLIP_END)
        return cls(
            backend=_clip_backend(model, _CLIP_START, _CLIP_END),
            config=_CLIP_CONFIG,
            length=length,
            prefix=(vocab[_CLIP_START],),
            suffix=(vocab[_CLIP_END],),
            pad_id=vocab[_CLIP_END],
            pad=pad,
        )


def checked_text(text: str) -> str:
    """The text, if a tokenizer can read it; else a `MediaError`."""
    if not isinstance(text, str):
        raise MediaError(f"a tokenizer takes str, not {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        raise MediaError(f"{quoted(text)} has {len(text):,} characters, more than the {MAX_CHARACTERS:,} allowed")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MediaError(
            f"{quoted(text)} has half of a surrogate pair: it was decoded with the wrong encoding"
        ) from None
    return text


def quoted(text: str) -> str:
    """A text's beginning for a message, in ASCII."""
    return ascii(text[:40] + ("..." if len(text) > 40 else ""))


# ---- CLIP's pipeline ----

_CLIP_START, _CLIP_END, _END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
_CLIP_CONFIG = {
    "tokenizer_class": "CLIPTokenizer",
    "bos_token": _CLIP_START,
    "eos_token": _CLIP_END,
    "unk_token": _CLIP_END,
    "pad_token": _CLIP_END,
}
# Control tokens as typed, English endings, words, single digits, everything else that is no space.
_CLIP_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _clip_pipeline(model: models.BPE) -> Tokenizer:
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _clip_backend(model: models.BPE, start: str, end: str) -> Tokenizer:
    backend = _clip_pipeline(model)
    vocab = backend.get_vocab()
    missing = [token for token in (start, end) if token not in vocab]
    if missing:  # adding them would give ids that the model has no embedding for
        raise ConfigError(f"the control token {missing[0]!r} is not in the vocabulary")
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (start, end)])
    backend.post_processor = processors.RobertaProcessing(
        (end, vocab[end]), (start, vocab[start]), trim_offsets=False, add_prefix_space=False
    )
    return backend


def _merges(backend: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]


# ---- reading a folder ----


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a tokenizer class of transformers does beyond its tokenizer.json."""

    clean: Cleaning = Verbatim()
    canonical: bool = False
    pad_side: Side = "right"


_KINDS = {
    "CLIPTokenizer": _Kind(),
    "SiglipTokenizer": _Kind(canonical=True),
    "Siglip2Tokenizer": _Kind(clean=Lowercase(), pad_side="left"),
    "GemmaTokenizer": _Kind(pad_side="left"),
    "RobertaTokenizer": _Kind(),
    "PreTrainedTokenizer": _Kind(),
    "TokenizersBackend": _Kind(),
}
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_READ = {
    *TOKENS, "tokenizer_class", "model_max_length", "padding_side", "do_lower_case", "add_bos_token", "add_eos_token",
}  # fmt: skip
# Of no effect on the ids: what decodes, what is also in tokenizer.json, what other modes of use need.
_IGNORED = {
    "added_tokens_decoder", "additional_special_tokens", "auto_map", "backend", "chat_template",
    "clean_up_tokenization_spaces", "errors", "extra_ids", "extra_special_tokens", "is_local", "legacy",
    "local_files_only", "max_length", "model_input_names", "name_or_path", "pad_to_multiple_of", "pad_token_type_id",
    "padding", "processor_class", "return_tensors", "sp_model_kwargs", "spaces_between_special_tokens",
    "special_tokens_map_file", "split_special_tokens", "stride", "tokenizer_file", "trim_offsets", "truncation",
    "truncation_strategy", "use_default_system_prompt", "use_fast", "vocab_size",
}  # fmt: skip
_MUST_BE = {"add_prefix_space": (False, None), "truncation_side": ("right", None)}


def _kind(config: Mapping[str, Any]) -> str:
    name = config.get("tokenizer_class")
    if not isinstance(name, str):
        raise ConfigError("tokenizer_config.json: tokenizer_class is missing, so the text's cleaning is not known")
    name = name.removesuffix("Fast")
    if name not in _KINDS:
        raise ConfigError(f"tokenizer_config.json: {name} is not supported{did_you_mean(name, _KINDS)}")
    return name


def _read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the control tokens of special_tokens_map.json where it names none."""
    if not (folder / "tokenizer_config.json").is_file():
        if (folder / "tokenizer.json").is_file():
            raise ConfigError(f"{folder} lacks tokenizer_config.json, which names the padding token")
        return dict(_CLIP_CONFIG)  # OpenAI's two files and nothing else; `read_backend` says if these are missing too
    config = read_json(folder / "tokenizer_config.json")
    if not isinstance(config, dict):
        raise ConfigError(f"{folder / 'tokenizer_config.json'} is not a JSON object")
    problems = [
        f"{name} = {config[name]!r} is not supported" for name, good in _MUST_BE.items() if config.get(name) not in good
    ]
    unknown = config.keys() - _READ - _IGNORED - _MUST_BE.keys()
    problems += [f"{name} = {config[name]!r} is not known{did_you_mean(name, _READ | _IGNORED)}" for name in unknown]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in sorted(problems))
        raise ConfigError(f"{folder / 'tokenizer_config.json'}:\n{listed}")
    special = folder / "special_tokens_map.json"
    for name, token in read_json(special).items() if special.is_file() else ():
        if name in TOKENS and config.get(name) is None:
            config[name] = token
    if _kind(config) == "CLIPTokenizer":
        config = {**_CLIP_CONFIG, **{name: value for name, value in config.items() if value is not None}}
    return config


def read_backend(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a folder's files describe."""
    whole, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    # The library raises a bare Exception for a broken file.
    if whole.is_file():
        try:
            return Tokenizer.from_file(str(whole))
        except Exception as error:
            raise ConfigError(f"{whole} is not a tokenizer file, or is cut off") from error
    if vocab.is_file() and merges.is_file():
        if str(config.get("tokenizer_class")).removesuffix("Fast") != "CLIPTokenizer":
            raise ConfigError(
                f"{folder}: vocab.json and merges.txt are read for CLIP only; {whole.name} is needed: save the "
                "tokenizer once more with transformers"
            )
        try:
            model = models.BPE.from_file(
                str(vocab), str(merges), end_of_word_suffix=_END_OF_WORD, unk_token=token_content(config["unk_token"])
            )
        except Exception as error:
            raise ConfigError(f"{folder}: vocab.json and merges.txt are broken or do not belong together") from error
        return _clip_backend(model, token_content(config["bos_token"]), token_content(config["eos_token"]))
    models_of_sentencepiece = sorted(path.name for path in folder.glob("*.model"))
    if models_of_sentencepiece:
        raise ConfigError(
            f"{folder} has {models_of_sentencepiece[0]} only; tokenizer.json is needed: newer revisions of the "
            "checkpoint ship it, or save the tokenizer once more with transformers"
        )
    raise ConfigError(f"{folder} has no tokenizer: tokenizer.json, or vocab.json and merges.txt, are needed")


def token_content(token: str | Mapping[str, Any]) -> str:
    """A control token is written as a str, or as an object with its stripping rules."""
    return token if isinstance(token, str) else token["content"]


def token_id(backend: Tokenizer, config: Mapping[str, Any], name: str) -> int:
    """The id of a control token that the configuration names, e.g. ``pad_token``; a `ConfigError` if there is none."""
    if config.get(name) is None:
        raise ConfigError(f"the tokenizer's files do not name its {name}")
    found = backend.token_to_id(token_content(config[name]))
    if found is None:
        raise ConfigError(f"the {name} {token_content(config[name])!r} is not in the vocabulary")
    return found


def control_ids(backend: Tokenizer, config: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and after every text: by add_bos_token and add_eos_token if given, else by tokenizer.json."""
    if config.get("add_bos_token") is not None or config.get("add_eos_token") is not None:
        prefix = (token_id(backend, config, "bos_token"),) if config.get("add_bos_token") else ()
        return prefix, (token_id(backend, config, "eos_token"),) if config.get("add_eos_token") else ()
    backend.no_truncation()  # a tokenizer.json saved after use holds the last call's limits
    backend.no_padding()
    bare = len(backend.encode("a", add_special_tokens=False).ids)
    framed = backend.encode("a")
    start = next((i for i, special in enumerate(framed.special_tokens_mask) if not special), 0)
    return tuple(framed.ids[:start]), tuple(framed.ids[start + bare :])
