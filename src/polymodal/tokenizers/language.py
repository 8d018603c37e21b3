"""Text to token ids and back, for language models, from a checkpoint's own files.

Special tokens are control: they end turns and stand for pictures. Text that somebody typed never becomes one,
``<|im_end|>`` in a question is spelled out in ordinary tokens; only a chat template writes control tokens
(`polymodal.tokenizers.chat`). The backend alone does not promise this: it can be told to skip special tokens, but a
Unigram model finds ``</s>`` in its vocabulary all the same, and normalisation can make one of other characters.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from polymodal.core.errors import ConfigError, DataError, MediaError, did_you_mean
from polymodal.core.files import atomic_write, read_json, write_json
from polymodal.tokenizers.text import (
    TOKENS,
    checked_text,
    control_ids,
    quoted,
    read_backend,
    token_content,
    token_id,
)

# A picture is <|image|>, a clip <|video|>: what `train_bpe` is told to have among its control tokens.
CHATML = """\
{%- macro say(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {{- part.text if part.type == 'text' else '<|' + part.type + '|>' }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- say(messages[0].content) + '\\n\\n' }}
        {%- set messages = messages[1:] %}
    {%- endif %}
    {{- 'Tools, one JSON schema a line:\\n' }}
    {%- for tool in tools %}
        {{- (tool | tojson) + '\\n' }}
    {%- endfor %}
    {{- 'Call one with <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + say(message.content) }}
    {%- for call in message.tool_calls or [] %}
        {%- set function = {'name': call.function.name, 'arguments': call.function.arguments} %}
        {{- '<tool_call>' + (function | tojson) + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageTokenizer:
    """One text at a time to ids, without padding and without a limit: what is too long is the model's to say."""

    backend: Tokenizer
    config: Mapping[str, Any]  # tokenizer_config.json, written back by `save`
    prefix: tuple[int, ...]  # what a text begins and ends with when it is read with special=True
    suffix: tuple[int, ...]
    bos_id: int | None
    eos_ids: tuple[int, ...]  # each of them ends an answer
    pad_id: int | None

    def __post_init__(self) -> None:
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = False  # for templates; text goes through `Guard`

    # -- ids --

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The ids of a text, in which no character means anything but itself.

        Args:
            text: as typed. Control tokens in it are spelled out.
            special: with the control tokens that frame every text of this model (BOS, EOS, [CLS] ...), or without.

        Raises:
            MediaError: it is no str, has over a million characters, lone surrogates or reserved characters.
        """
        content = self.guard().encode(text)
        return [*self.prefix, *content, *self.suffix] if special else content

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids. Ids without a token, such as the padding of an embedding table, stand for nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> Stream:
        """Decodes ids as they come."""
        return Stream(self, skip_special)

    def guard(self, extra: Iterable[str] = ()) -> Guard:
        """Reads text with these control tokens: all special tokens, and added tokens that are not marked as special."""
        names = self.special | frozenset(extra)
        if names not in self._guards:
            self._guards[names] = Guard(self.backend, names, self.tokens.get("unk_token"))
        return self._guards[names]

    @functools.cached_property
    def _guards(self) -> dict[frozenset[str], Guard]:
        return {}

    # -- what there is --

    @functools.cached_property
    def added(self) -> frozenset[str]:
        """The tokens that are found in a text before it is split, special ones among them."""
        return frozenset(token.content for token in self.backend.get_added_tokens_decoder().values())

    @functools.cached_property
    def special(self) -> frozenset[str]:
        """The special tokens, which `decode` leaves out."""
        return frozenset(t.content for t in self.backend.get_added_tokens_decoder().values() if t.special)

    @functools.cached_property
    def tokens(self) -> dict[str, str]:
        """The tokens that the configuration names, e.g. ``{"eos_token": "</s>"}``: what templates may write."""
        return _named(self.config)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids."""
        settings = (self.prefix, self.suffix, self.bos_id, self.eos_ids, self.pad_id)
        return hashlib.sha256((self.backend.to_str() + repr(settings)).encode()).hexdigest()

    # -- files --

    @classmethod
    def from_folder(cls, folder: str | Path) -> LanguageTokenizer:
        """Reads ``tokenizer.json``, ``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json`` and
        the end tokens of ``generation_config.json``.

        ``tokenizer.json`` says how text is split. Of the rest only what it leaves open is read: which tokens are
        special, which frame a text (``add_bos_token``, ``add_eos_token``), which end an answer.

        Raises:
            ConfigError: a file is missing or broken, names a token that the vocabulary lacks, or is of a class whose
                tokenizer.json is not known to say all.
        """
        folder = Path(folder)
        config = read_tokenizer_config(folder)
        backend = read_backend(folder, config)
        _add_tokens(backend, config, folder)
        prefix, suffix = control_ids(backend, config)
        named = _named(config)
        eos = [token_id(backend, config, "eos_token")] if "eos_token" in named else []
        return cls(
            backend=backend,
            config=config,
            prefix=prefix,
            suffix=suffix,
            bos_id=token_id(backend, config, "bos_token") if "bos_token" in named else None,
            eos_ids=tuple(dict.fromkeys([*eos, *_generation_eos(folder, backend)])),
            pad_id=token_id(backend, config, "pad_token") if "pad_token" in named else None,
        )

    def save(self, folder: str | Path) -> None:
        """Writes the files that `from_folder` and transformers read; in ``generation_config.json`` the end tokens."""
        folder = Path(folder)
        atomic_write(folder / "tokenizer.json", self.backend.to_str(pretty=True) + "\n")
        write_json(folder / "tokenizer_config.json", dict(self.config))
        write_json(folder / "special_tokens_map.json", {n: t for n, t in self.tokens.items() if n in TOKENS})
        generation = folder / "generation_config.json"
        written = read_json(generation) if generation.is_file() else {}
        write_json(generation, {**written, "eos_token_id": list(self.eos_ids)})

    @classmethod
    def train_bpe(
        cls, texts: Iterable[str], vocab_size: int, *, special: Sequence[str] = ("<|image|>",)
    ) -> LanguageTokenizer:
        """Byte-level BPE with the control tokens of ChatML and a template for it.

        Bytes are in the vocabulary, so that every text can be spelled and ids are decoded to exactly it. Digits stand
        alone, as numbers are read better so. The same texts give the same tokenizer.

        Args:
            texts: to learn from; read once.
            vocab_size: ids at most, the bytes and control tokens among them; fewer if the texts give no more.
            special: control tokens beside ``<|endoftext|>`` (padding), ``<|im_start|>`` and ``<|im_end|>``. The
                template writes a picture as ``<|image|>``, a clip as ``<|video|>``.

        Raises:
            ConfigError: the vocabulary is too small.
            DataError: there is no text to learn from.
        """
        names = _control_tokens(special)
        backend = learn_bpe(texts, vocab_size, room=len(names))
        return cls._chatml(backend, names)

    @classmethod
    def of_words(cls, words: Iterable[str], *, special: Sequence[str] = ("<|image|>",)) -> LanguageTokenizer:
        """These words are one token each, alone and behind a blank; all else is spelled byte by byte, in lower case.

        For models too small to learn how merged letters are spelled: what they read, they spell.

        Args:
            words: in lower case, of letters only.
            special: as in `train_bpe`.
        """
        spelled = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
        known = sorted(set(words))
        tokens = dict.fromkeys([*spelled, *known, *(f"\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}{w}" for w in known)])
        vocab = {token: i for i, token in enumerate(tokens)}
        backend = _byte_level(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
        backend.normalizer = normalizers.Lowercase()
        return cls._chatml(backend, _control_tokens(special))

    @classmethod
    def _chatml(cls, backend: Tokenizer, names: Sequence[str]) -> LanguageTokenizer:
        """A trained backend with the control tokens of ChatML."""
        backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
        ids = backend.get_vocab(with_added_tokens=True)
        end, end_of_text = ids[_END], ids[_END_OF_TEXT]
        return cls(
            backend=backend,
            config={
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": _END,
                "pad_token": _END_OF_TEXT,
                "chat_template": CHATML,
            },
            prefix=(),
            suffix=(),
            bos_id=None,
            eos_ids=(end, end_of_text),
            pad_id=end_of_text,
        )


def _control_tokens(special: Sequence[str]) -> list[str]:
    return list(dict.fromkeys((_END_OF_TEXT, _START, _END, *special)))


def learn_bpe(texts: Iterable[str], vocab_size: int, *, room: int) -> Tokenizer:
    """A backend of byte-level BPE that leaves ``room`` for control tokens; see `LanguageTokenizer.train_bpe`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet) + room:
        raise ConfigError(
            f"vocab_size {vocab_size} leaves no merges: {len(alphabet) + room} are bytes and control tokens"
        )
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - room, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    backend.train_from_iterator(map(checked_text, texts), trainer)
    if backend.get_vocab_size() == len(alphabet):
        raise DataError("train_bpe was given no text to learn from")
    return backend


def _byte_level(model: models.BPE) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


_END_OF_TEXT, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# English endings; a word with the blank or sign before it; a digit; signs; line ends; blanks.
_PIECES = "|".join(
    [
        r"'(?i:s|t|re|ve|m|ll|d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


# ---- text that holds control tokens ----

# Private-use characters that no font and no alphabet uses; a text with one of them is refused.
MARK, _ALIAS = "\U0010fffd", "\U0010fffc"


class Guard:
    """Tells control tokens that a template wrote from those that somebody typed.

    `hide` breaks typed ones by a mark inside, then templates may trim, join and split the text. `encode_prompt` reads
    the rendered prompt by a copy of the tokenizer in which each control token has an unspeakable name: the template's
    are renamed with it, the marks are removed, and what is left of typed ones is text, encoded in its place, so that
    merges and spaces around it are those of text.
    """

    def __init__(self, backend: Tokenizer, names: frozenset[str], unknown: str | None) -> None:
        self.backend = backend
        # A token of one character, such as a padding "!", is a letter that users need.
        self.names = frozenset(name for name in names if len(name) > 1)
        self._unknown = unknown
        vocab = {name: backend.token_to_id(name) for name in self.names}
        missing = sorted(name for name, i in vocab.items() if i is None)
        if missing:
            raise ConfigError(f"the control token {missing[0]!r} is not in the vocabulary")
        self._name_of = {i: name for name, i in vocab.items()}
        self._lengths = sorted({len(name) for name in self.names}, reverse=True)
        firsts = "".join(sorted({name[0] for name in self.names}))
        self._first = re.compile(f"[{re.escape(firsts)}]" if firsts else r"(?!)")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with control tokens spelled out."""
        ids = self._ids(_typed(text))
        return ids if self._reads_as_text(text, ids) else self._renamed.encode(text, add_special_tokens=False).ids

    def hide(self, text: str) -> str:
        """The text with every control token in it broken, and what could begin one at its end."""
        broken = {i for i, _ in self._found(_typed(text))}
        # A template may trim a text and write another one after it.
        for end in {len(text), len(text.rstrip())}:
            for n in range(1, min(end + 1, self._lengths[0] if self._lengths else 0)):
                tail = text[end - n : end]
                if self._first.match(tail) and any(name.startswith(tail) for name in self.names):
                    broken.add(end - n)
        cuts = [0, *(i + 1 for i in sorted(broken)), len(text)]
        return MARK.join(text[a:b] for a, b in itertools.pairwise(cuts))

    def is_plain(self, text: str) -> bool:
        """Whether a text holds nothing that the bare backend would take for a control token."""
        return self.hide(text) == text and self._reads_as_text(text, self._ids(text))

    def encode_prompt(self, prompt: str, *, plain: bool) -> list[int]:
        """The ids of a rendered template whose typed texts are hidden; ``plain`` if `is_plain` held for all of them."""
        if plain:
            return self._ids(prompt)
        pieces, end = [], 0
        for i, n in self._found(prompt):
            if i >= end:
                pieces += [prompt[end:i], self._aliases[prompt[i : i + n]]]
                end = i + n
        text = "".join([*pieces, prompt[end:]]).replace(MARK, "")
        return self._renamed.encode(text, add_special_tokens=False).ids

    def _ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _reads_as_text(self, text: str, ids: Sequence[int]) -> bool:
        met = {self._name_of[i] for i in ids if i in self._name_of}
        # The unknown token stands for characters that the vocabulary lacks; typed, it is one to spell.
        return not met or (self._unknown is not None and met == {self._unknown} and self._unknown not in text)

    def _found(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, length) of the longest control token at each place where one begins; they may overlap."""
        for match in self._first.finditer(text):
            i = match.start()
            n = next((n for n in self._lengths if text[i : i + n] in self.names), 0)
            if n:
                yield i, n

    @functools.cached_property
    def _aliases(self) -> dict[str, str]:
        return {name: f"{_ALIAS}{i}{_ALIAS}" for i, name in enumerate(sorted(self.names))}

    @functools.cached_property
    def _renamed(self) -> Tokenizer:
        """The tokenizer with control tokens called by their aliases, in its vocabulary too; the ids are the same."""
        alias = self._aliases
        whole = json.loads(self.backend.to_str())
        for token in whole["added_tokens"]:
            if token["content"] in alias:
                token.update(content=alias[token["content"]], normalized=False)
        model = whole["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {alias.get(token, token): i for token, i in model["vocab"].items()}
        else:
            model["vocab"] = [[alias.get(token, token), score] for token, score in model["vocab"]]
        if "merges" in model:
            merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
            model["merges"] = [[a, b] for a, b in merges if alias.keys().isdisjoint((a, b, a + b))]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = alias.get(model["unk_token"], model["unk_token"])
        whole["post_processor"] = None
        copy = Tokenizer.from_str(json.dumps(whole))
        assert all(copy.token_to_id(alias[name]) == i for i, name in self._name_of.items())
        return copy


def _typed(text: str) -> str:
    checked_text(text)
    for reserved in (MARK, _ALIAS):
        if reserved in text:
            raise MediaError(
                f"{quoted(text)} has the private-use character U+{ord(reserved):X}, which is reserved: remove it"
            )
    return text


# ---- text as it comes ----


class Stream:
    """Text of ids as they come: whole characters only, and all pieces together are `LanguageTokenizer.decode` of all.

    A piece is held back while the next id may still change it: bytes of a character whose rest is missing, and runs of
    byte tokens, which a decoder reads as one.
    """

    def __init__(self, tokenizer: LanguageTokenizer, skip_special: bool = True) -> None:
        self._backend = tokenizer.backend
        tokens = tokenizer.backend.get_added_tokens_decoder()
        self._skip = {i for i, token in tokens.items() if token.special} if skip_special else set()
        decoder = tokenizer.backend.decoder
        falls_back = decoder is not None and decoder.decode(["<0x41>"]) == "A"
        self._bytes = {tokenizer.backend.token_to_id(f"<0x{i:02X}>") for i in range(256)} if falls_back else set()
        # Decoders treat the first token of a text differently, so each piece is decoded behind the one before.
        self._before: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that this id makes certain; often of one token, sometimes empty."""
        if token in self._skip:
            return ""
        self._held.append(token)
        if token in self._bytes:
            return ""
        text = self._text()
        return "" if not text or text.endswith("\N{REPLACEMENT CHARACTER}") else self._give(text)

    def finish(self) -> str:
        """The text that was held back: broken characters are replaced, as `decode` does."""
        return self._give(self._text())

    def _text(self) -> str:
        before = self._decode(self._before)
        text = self._decode([*self._before, *self._held])
        assert text.startswith(before), "a decoder changed text that was certain"
        return text[len(before) :]

    def _give(self, text: str) -> str:
        self._before, self._held = self._held, []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


# ---- reading a folder ----

# Classes whose tokenizer.json says all that they do.
_CLASSES = {
    "BartTokenizer", "BertTokenizer", "CodeGenTokenizer", "CodeLlamaTokenizer", "CohereTokenizer",
    "DistilBertTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "GemmaTokenizer", "LlamaTokenizer", "OPTTokenizer",
    "PreTrainedTokenizer", "Qwen2Tokenizer", "RobertaTokenizer", "T5Tokenizer", "TokenizersBackend", "WhisperTokenizer",
}  # fmt: skip


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def read_tokenizer_config(folder: str | Path) -> dict[str, Any]:
    """tokenizer_config.json, with the tokens of special_tokens_map.json where it names none; empty without the files.

    Raises:
        ConfigError: a file is broken, or names a class that is not known.
    """
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = Path(folder) / name
        read = read_json(path) if path.is_file() else {}
        if not isinstance(read, dict):
            raise ConfigError(f"{path} is not a JSON object")
        config.update((key, value) for key, value in read.items() if value is not None or key not in config)
    kind = config.get("tokenizer_class")
    if kind is not None and str(kind).removesuffix("Fast") not in _CLASSES:
        raise ConfigError(f"{folder}: the tokenizer_class {kind} is not known{did_you_mean(str(kind), _CLASSES)}")
    return config


def _named(config: Mapping[str, Any]) -> dict[str, str]:
    """The fields that name a token: bos_token, image_token ..."""
    return {
        name: token_content(token)
        for name, token in config.items()
        if name.endswith("_token") and (isinstance(token, str) or (isinstance(token, dict) and "content" in token))
    }


def _add_tokens(backend: Tokenizer, config: Mapping[str, Any], folder: Path) -> None:
    """The tokens that the files beside tokenizer.json declare, each with the id that it must have."""
    known = {t.content: t for t in backend.get_added_tokens_decoder().values()}
    try:
        wanted = _declared(known, config, folder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder}: the tokens that the files declare are malformed: {error!r}") from None
    for content, (i, token) in sorted(wanted.items(), key=lambda item: -1 if item[1][0] is None else item[1][0]):
        if content not in known or known[content].special != token.special:
            if i is None and backend.token_to_id(content) is None:
                raise ConfigError(f"{folder}: the token {content!r} is named, but is not in the vocabulary")
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if i is not None and backend.token_to_id(content) != i:
            raise ConfigError(f"{folder}: the token {content!r} has the id {backend.token_to_id(content)}, not {i}")


def _declared(
    known: Mapping[str, AddedToken], config: Mapping[str, Any], folder: Path
) -> dict[str, tuple[int | None, AddedToken]]:
    """Each declared token with its id, if one is declared."""
    wanted: dict[str, tuple[int | None, AddedToken]] = {}
    extra = folder / "added_tokens.json"
    for content, i in read_json(extra).items() if extra.is_file() else ():
        wanted[content] = (int(i), known.get(content) or AddedToken(content, normalized=False))
    for key, token in (config.get("added_tokens_decoder") or {}).items():
        flags = {flag: bool(token.get(flag)) for flag in (*_FLAGS, "special")}
        wanted[token["content"]] = (int(key), AddedToken(token["content"], **flags))
    # A token that is named is special, whatever its own entry says.
    lists = [config.get("additional_special_tokens") or [], config.get("extra_special_tokens") or []]
    listed = [token_content(t) for group in lists for t in (group.values() if isinstance(group, dict) else group)]
    for content in (*_named(config).values(), *listed):
        i, like = wanted.get(content, (None, known.get(content) or AddedToken(content, normalized=False)))
        wanted[content] = (i, AddedToken(content, special=True, **{flag: getattr(like, flag) for flag in _FLAGS}))
    return wanted


def _generation_eos(folder: Path, backend: Tokenizer) -> list[int]:
    path = folder / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for i in ids:
        if not isinstance(i, int) or not 0 <= i < 2**32 or backend.id_to_token(i) is None:
            raise ConfigError(f"{path}: eos_token_id {i!r} is the id of no token")
    return ids
