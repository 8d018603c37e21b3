"""FAST: a chunk of actions as a few tokens.

Source: Pertsch et al. 2025, https://arxiv.org/abs/2501.09747; format of ``physical-intelligence/fast``: tokenizer.json
and processor_config.json. A chunk (normalised by its quantiles) goes through a cosine transform over time, is scaled,
rounded and written as ``horizon * dim`` characters, low frequencies first, which a byte-level BPE makes short.

**Deviations**: theirs loses characters that its alphabet lacks, and reads every answer of another length as zeros. Ours
has an alphabet for whatever lies within `LIMIT`, clips the rest, reads nothing but chunks, and has the constraint that
lets a model write nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Float64
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.files import atomic_write, read_json, write_json
from polymodal.tokenizers.chunk_text import ChunkConstraint, ChunkText, alphabet, token_bytes

LIMIT: Final = 10.0  # of a normalised number, as normalisers have it
FILES: Final = ("tokenizer.json", "processor_config.json")
_FIRST_CODE: Final = 128  # below are characters of one byte, which decoders of texts like to change
_CLASS: Final = "UniversalActionProcessor"


class FAST:
    """Writes and reads chunks of one shape.

    Args:
        backend: the byte-level BPE.
        scale: what coefficients are multiplied by before they are rounded: the larger, the more exact and the longer.
        min_token: the coefficient that is written as character 0.
        horizon: steps of a chunk.
        dim: numbers of one action.

    Raises:
        ConfigError: the tokenizer is of another kind, or cannot write any chunk.
    """

    def __init__(self, backend: Tokenizer, *, scale: float, min_token: int, horizon: int, dim: int) -> None:
        if not isinstance(backend.decoder, decoders.ByteLevel) or not isinstance(backend.model, models.BPE):
            raise ConfigError("FAST's tokenizer is a byte-level BPE; this is another kind")
        if not 0 < scale < 1e4 or horizon < 1 or dim < 1:
            raise ConfigError(f"FAST: scale {scale}, horizon {horizon}, dim {dim}")
        self.backend, self.scale, self.min_token = backend, scale, min_token
        self.horizon, self.dim = horizon, dim
        # No chunk within the limit has a larger coefficient.
        bound = _bound(horizon, scale)
        vocab = backend.get_vocab(with_added_tokens=True)
        self._tokens = [token_bytes(token) for token, _ in sorted(vocab.items(), key=lambda item: item[1])]
        written = alphabet(vocab)
        first, last = max(0, -bound - min_token), min(bound - min_token, _LARGEST)
        codes = [code for code in range(first, last + 1) if all(byte in written for byte in chr(code).encode())]
        if not codes or sorted(vocab.values()) != list(range(len(vocab))):
            raise ConfigError(f"FAST: a vocabulary that writes no coefficient from {-bound} to {bound}")
        self._codes = np.array(codes)

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    @cached_property
    def _transform(self) -> Float64[np.ndarray, "horizon horizon"]:
        """The orthonormal DCT-II: frequencies by steps."""
        k, t = np.arange(self.horizon)[:, None], np.arange(self.horizon) + 0.5
        m = np.sqrt(2 / self.horizon) * np.cos(np.pi / self.horizon * k * t)
        m[0] /= np.sqrt(2)
        return m

    @classmethod
    def fit(cls, chunks: Float[Tensor, "chunks horizon dim"], *, scale: float = 10.0, vocab_size: int = 1024) -> FAST:
        """A tokenizer for chunks like these, which are normalised.

        Raises:
            ConfigError: the vocabulary is too small for its alphabet.
            MediaError: a number is not finite.
        """
        horizon, dim = chunks.shape[1:]
        bound = _bound(horizon, scale)
        min_token = -bound - _FIRST_CODE
        if bound - min_token > _LARGEST:
            raise ConfigError(f"FAST: scale {scale} is too fine for {horizon} steps")
        needed = {byte for code in range(_FIRST_CODE, bound - min_token + 1) for byte in chr(code).encode()}
        if vocab_size < len(needed):
            raise ConfigError(f"FAST: {vocab_size} tokens, and its alphabet alone takes {len(needed)}")
        symbols = [
            symbol for byte, symbol in sorted(alphabet(pre_tokenizers.ByteLevel.alphabet()).items()) if byte in needed
        ]
        backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
        # Unlike theirs not split at what would be words and numbers in a text.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        made = partial(cls, backend, scale=scale, min_token=min_token, horizon=horizon, dim=dim)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, show_progress=False, initial_alphabet=symbols
        )
        backend.train_from_iterator(made().write(chunks), trainer)
        return made()

    # -- chunks <-> characters <-> tokens

    def write(self, chunks: Float[Tensor, "batch horizon dim"]) -> list[str]:
        """The characters of chunks. What lies beyond `LIMIT` is clipped.

        Raises:
            MediaError: a chunk has another shape, or holds NaN.
        """
        if chunks.shape[1:] != (self.horizon, self.dim):
            raise MediaError(f"chunks of {self.horizon} steps of {self.dim} numbers, not {tuple(chunks.shape[1:])}")
        x = chunks.double().cpu().numpy()
        if np.isnan(x).any():
            raise MediaError("a chunk of actions that holds what is not a number (NaN)")
        codes = np.rint(self._transform @ x.clip(-LIMIT, LIMIT) * self.scale).astype(np.int64) - self.min_token
        after = np.searchsorted(self._codes, codes).clip(1, len(self._codes) - 1)
        below, above = self._codes[after - 1], self._codes[after]
        codes = np.where(codes - below < above - codes, below, above)
        return [row.tobytes().decode("utf-16-le") for row in codes.reshape(len(codes), -1).astype("<u2")]

    def encode(self, chunks: Float[Tensor, "batch horizon dim"]) -> list[list[int]]:
        """The tokens of chunks; errors as of `write`."""
        return [e.ids for e in self.backend.encode_batch(self.write(chunks), add_special_tokens=False)]

    def decode(self, tokens: Sequence[Sequence[int]]) -> Float[Tensor, "batch horizon dim"]:
        """The chunks of tokens.

        Raises:
            MediaError: tokens that are no chunk: too long, too short, no such token, half a character.
        """
        size = self.horizon * self.dim
        texts = [self._spelled(row) for row in tokens]
        wrong = [text for text in texts if len(text) != size or not self._characters.issuperset(text)]
        if wrong:
            raise MediaError(
                f"action tokens of {len(wrong[0])} characters, and a chunk has {size}, of its own kind: sample under "
                "the constraint, and this cannot occur"
            )
        codes = np.frombuffer("".join(texts).encode("utf-16-le"), "<u2").astype(np.float64)
        coefficients = codes.reshape(-1, self.horizon, self.dim) + self.min_token
        return torch.from_numpy(self._transform.T @ coefficients / self.scale).float()

    def _spelled(self, tokens: Sequence[int]) -> str:
        if any(not 0 <= token < self.vocab_size for token in tokens):
            raise MediaError(f"{list(tokens)[:20]} are no action tokens, which go from 0 to {self.vocab_size - 1}")
        try:
            return b"".join([self._tokens[token] for token in tokens]).decode()
        except UnicodeDecodeError:
            raise MediaError("action tokens that break off within a character: no chunk of actions") from None

    @cached_property
    def _characters(self) -> frozenset[str]:
        return frozenset(map(chr, self._codes))

    def constraint(
        self,
        ids: Sequence[int] | None = None,
        size: int | None = None,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
    ) -> ChunkConstraint:
        """Answers that are exactly one chunk.

        Args:
            ids: of each token in the vocabulary of the language model; None: it writes nothing but these tokens.
            size: how many scores the language model gives.
            before: ids that are always written first, after: last.
        """
        ids = range(self.vocab_size) if ids is None else ids
        return ChunkConstraint(self._text, ids, len(ids) if size is None else size, before, after)

    @cached_property
    def _text(self) -> ChunkText:
        return ChunkText(self._tokens, [c.encode() for c in self._characters], self.horizon * self.dim)

    # -- files

    @classmethod
    def from_folder(cls, folder: Path, *, horizon: int | None = None, dim: int | None = None) -> FAST:
        """Reads the published format, which need not say the shape of a chunk; what is given here goes before it.

        Raises:
            ConfigError: the files are missing or broken, or nothing says the shape.
        """
        raw = read_json(folder / FILES[1])
        if not isinstance(raw, dict) or raw.get("processor_class") != _CLASS:
            raise ConfigError(f"{folder / FILES[1]} is no {_CLASS}")
        shape = {"horizon": horizon or raw.get("time_horizon"), "dim": dim or raw.get("action_dim")}
        if lacking := [name for name, value in shape.items() if value is None]:
            raise ConfigError(f"{folder} does not say {' and '.join(lacking)} of a chunk: give them")
        numbers: dict[str, Any] = {**shape, "scale": raw.get("scale"), "min_token": raw.get("min_token")}
        if not all(isinstance(v, int if n != "scale" else int | float) and v == v for n, v in numbers.items()):
            raise ConfigError(f"{folder / FILES[1]}: {numbers} are not numbers")
        try:
            backend = Tokenizer.from_file(str(folder / FILES[0]))
        except Exception as error:  # the library raises nothing more special
            raise ConfigError(f"{folder / FILES[0]} cannot be read: {error}") from None
        return cls(backend, **(numbers | {"scale": float(numbers["scale"])}))

    def save(self, folder: Path) -> None:
        """Writes the published format."""
        atomic_write(folder / FILES[0], self.backend.to_str())
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        write_json(folder / FILES[1], {
            "action_dim": self.dim, "auto_map": {"AutoProcessor": f"processing_action_tokenizer.{_CLASS}"},
            "min_token": self.min_token, "processor_class": _CLASS, "scale": self.scale, "time_horizon": self.horizon,
            "vocab_size": self.vocab_size,
        })  # fmt: skip


_LARGEST: Final = 0xD7FF  # where characters begin that no text may hold


def _bound(horizon: int, scale: float) -> int:
    """The largest coefficient of a chunk within `LIMIT`."""
    return int(np.ceil(LIMIT * np.sqrt(horizon) * scale))
