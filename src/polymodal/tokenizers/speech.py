"""The control tokens of models that write down speech, as Whisper has them, and words of their answers."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from typing import Final

from tokenizers import AddedToken

from polymodal.tokenizers.language import LanguageTokenizer, learn_bpe

END, START = "<|endoftext|>", "<|startoftranscript|>"
NO_TIMESTAMPS, PREVIOUS = "<|notimestamps|>", "<|startofprev|>"
TASKS: Final = ("translate", "transcribe")
_BROKEN: Final = "\N{REPLACEMENT CHARACTER}"  # bytes that are no character, or not yet
_UNSPACED: Final = frozenset({"zh", "ja", "th", "lo", "my", "yue"})  # written without blanks between words


def control_names(languages: Sequence[str], seconds: float | int) -> list[str]:
    """All control tokens in the order of their ids, which the rules rely on; times every 20 ms."""
    times = [f"<|{i * 0.02:.2f}|>" for i in range(round(seconds * 50) + 1)]
    named = [*languages, *TASKS, "startoflm", "startofprev", "nospeech", "notimestamps"]
    return [END, START, *(f"<|{name}|>" for name in named), *times]


def train_speech_bpe(
    texts: Iterable[str], vocab_size: int, *, languages: Sequence[str], seconds: float | int
) -> LanguageTokenizer:
    """Byte-level BPE with the control tokens of speech; errors as `LanguageTokenizer.train_bpe`.

    Args:
        texts: to learn from.
        vocab_size: ids at most, the bytes and control tokens among them.
        languages: codes.
        seconds: of a window.
    """
    names = control_names(languages, seconds)
    backend = learn_bpe(texts, vocab_size, room=len(names))
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    end = backend.token_to_id(END)
    assert end is not None
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
    return LanguageTokenizer(
        backend=backend,
        config={"tokenizer_class": "WhisperTokenizer", "add_prefix_space": False, "add_bos_token": False} | named,
        prefix=(),
        suffix=(),
        bos_id=end,
        eos_ids=(end,),
        pad_id=end,
    )


def spell(tokenizer: LanguageTokenizer, ids: Sequence[int], language: str | None) -> list[list[int]]:
    """The tokens of each word; marks stand alone, and so do characters where no blanks are written.

    Source: openai/whisper, tokenizer.py.
    """
    characters: list[list[int]] = [[]]
    whole, done = tokenizer.decode(ids), 0
    for token in ids:
        characters[-1].append(token)
        text = tokenizer.decode(characters[-1])
        broken = text.find(_BROKEN)
        # Bytes that stay broken in the whole text wait for nothing: a character of them ends here.
        if broken < 0 or whole[done + broken : done + broken + 1] == _BROKEN:
            characters.append([])
            done += len(text)
    pieces = [piece for piece in characters if piece]
    if language in _UNSPACED:
        return pieces
    words: list[list[int]] = []
    for piece in pieces:
        text = tokenizer.decode(piece)
        if text.startswith(" ") or text.strip() in string.punctuation or not words:
            words.append(list(piece))
        else:
            words[-1] += piece
    return words
