"""Answers that must belong to a language: a JSON schema, a regular expression, a grammar, a list of choices.

The optional package llguidance computes which tokens may come next; it is imported when a vocabulary is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from polymodal.core.errors import ConfigError, MissingDependency

# Between the parts of JSON: a small model would else write blanks until its tokens run out.
_ONE_BLANK = {"whitespace_pattern": " ?"}


def _llguidance() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise MissingDependency("constrained decoding", "llguidance", "serve") from None
    return llguidance


class Vocabulary:
    """The tokens that constraints are compiled against. Making one takes a second: make it once for a model.

    Args:
        tokenizer: the content of a ``tokenizer.json`` (``tokenizers.Tokenizer.to_str()``).
        size: how many scores the model gives; ids without a token are never allowed.
        stop_ids: the tokens that end an answer.

    Raises:
        MissingDependency: llguidance is not installed.
        ConfigError: the tokenizer is of a kind that llguidance cannot read, or there is no token to end with.
    """

    def __init__(self, tokenizer: str, size: int, stop_ids: Sequence[int]) -> None:
        if not stop_ids:
            raise ConfigError("a constrained answer needs a token to end with: the model names no stop_ids")
        self.size, self.stop_ids = size, tuple(stop_ids)
        try:
            self.backend = _llguidance().LLTokenizer(tokenizer, n_vocab=size, eos_token=list(stop_ids))
        except ValueError as error:
            raise ConfigError(f"this tokenizer cannot be constrained: {error}") from None


class Constraint:
    """A language that is compiled for a vocabulary; makes a fresh `TokenGuide` for each answer."""

    def __init__(self, grammar: str, vocabulary: Vocabulary, what: str) -> None:
        self._vocabulary = vocabulary
        self._matcher = _llguidance().LLMatcher(vocabulary.backend, grammar, log_level=0)
        if self._matcher.is_error():
            raise ConfigError(f"{what}: {_first_lines(self._matcher.get_error())}")

    @classmethod
    def json(cls, schema: Mapping[str, Any] | str, vocabulary: Vocabulary) -> Constraint:
        """JSON that a schema describes; an empty schema takes any JSON value.

        Raises:
            ConfigError: the schema is no JSON object, or uses what llguidance does not know.
        """
        text = schema if isinstance(schema, str) else json.dumps(schema)
        try:
            grammar = _llguidance().LLMatcher.grammar_from_json_schema(text, overrides=_ONE_BLANK)
        except ValueError as error:
            raise ConfigError(f"the JSON schema is not usable: {error}") from None
        return cls(grammar, vocabulary, "the JSON schema is not usable")

    @classmethod
    def regex(cls, pattern: str, vocabulary: Vocabulary) -> Constraint:
        """The whole answer matches a regular expression (the Rust dialect: no look-around, no back-references).

        Raises:
            ConfigError: the pattern does not parse.
        """
        grammar = _llguidance().LLMatcher.grammar_from_regex(pattern)
        return cls(grammar, vocabulary, f"the pattern {pattern!r} is not usable")

    @classmethod
    def grammar(cls, lark: str, vocabulary: Vocabulary) -> Constraint:
        """A context-free grammar in Lark's notation, with a rule ``start``.

        Raises:
            ConfigError: the grammar does not parse.
        """
        return cls(_llguidance().LLMatcher.grammar_from_lark(lark), vocabulary, "the grammar is not usable")

    @classmethod
    def choices(cls, answers: Sequence[str], vocabulary: Vocabulary) -> Constraint:
        """Exactly one of these texts.

        Raises:
            ConfigError: there is none, or one is empty.
        """
        if isinstance(answers, str) or not answers or not all(answers):
            raise ConfigError(f"choices are a list of texts that are not empty, not {answers!r}")
        start = "start: " + " | ".join(json.dumps(answer, ensure_ascii=False) for answer in answers)
        return cls.grammar(start, vocabulary)

    def start(self) -> TokenGuide:
        return TokenGuide(self._matcher.deep_copy(), self._vocabulary)


class TokenGuide:
    """Where one answer stands in its language."""

    def __init__(self, matcher: Any, vocabulary: Vocabulary) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def allowed(self) -> Bool[Tensor, " vocab"]:
        """The tokens that may come next; the end tokens where the answer is complete.

        Raises:
            ConfigError: the language is too complex to go on.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocabulary.size].astype(bool))
        mask[list(self._vocabulary.stop_ids)] = self._matcher.is_accepting()
        return mask

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    @property
    def ended(self) -> bool:
        return self._matcher.is_stopped()

    def copy(self) -> TokenGuide:
        return TokenGuide(self._matcher.deep_copy(), self._vocabulary)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(f"the constraint cannot go on: {_first_lines(self._matcher.get_error())}")


def _first_lines(message: str) -> str:
    return " ".join(message.split("\n")[:3])[:300]
