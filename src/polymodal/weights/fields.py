"""Reading a Hub config so that every field is read, required or ignored with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as short
from typing import Any, TypeVar

from polymodal.core.errors import ConfigError, did_you_mean
from polymodal.nn.mlp import ActivationName

T = TypeVar("T")
_NOTHING: Any = object()
# A stranger's config must not make us build a billion layers before the weights have been looked at.
LARGEST = 2**20
MOST_LAYERS = 1000
MOST_LEVELS = 16  # each halves a picture


class FieldsError(ConfigError):
    """A config cannot be read; the message and ``problems`` list everything that is wrong with it."""

    def __init__(self, where: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(f"{where} cannot be read:\n" + "\n".join(f"  - {p}" for p in problems))


# Fields that transformers writes, or wrote in 2022, into every config, and that say nothing about the weights.
GENERIC: dict[str, str] = dict.fromkeys(
    [
        "_name_or_path",
        "architectures",
        "auto_map",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "_commit_hash",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "pruned_heads",
        "is_encoder_decoder",
        "is_decoder",
        "cross_attention_hidden_size",
        "add_cross_attention",
        "tie_encoder_decoder",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "chunk_size_feed_forward",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "tokenizer_class",
        "prefix",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "task_specific_params",
        "problem_type",
        "tie_word_embeddings",
        "initializer_range",
        "initializer_factor",
        "gradient_checkpointing",
    ],
    "bookkeeping of transformers, not part of the architecture",
)


class Fields:
    """A Hub config (or a nested part of it) that remembers which fields were looked at.

    Problems are collected over the whole config and raised together by `done`.
    """

    def __init__(self, values: Any, where: str = "config.json", problems: list[str] | None = None) -> None:
        self._where = where
        self._seen: dict[str, str] = {}
        self._children: dict[str, Fields] = {}
        self.problems: list[str] = [] if problems is None else problems
        if not isinstance(values, Mapping):
            self.problems.append(f"{where} is {short(values)}, expected an object")
            values = {}
        self._values = values

    def take(self, name: str, kind: type[T], default: T = _NOTHING, *, least: int = 1, most: int = LARGEST) -> T:
        """The field's value, checked for its type (an int is a float, too) and its range.

        A value that is a problem gives the default, so that the rest can be looked at.
        """
        self._seen[name] = "read"
        value = self._values.get(name, default)
        if value is _NOTHING:
            self.problems.append(f"{self._where}: {name} is missing{did_you_mean(name, self._values)}")
            return kind()
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            problem = f"expected {kind.__name__}"
        elif isinstance(value, float) and not 0 <= value <= most:
            problem = f"expected 0 to {most:,}"
        elif kind is int and not least <= value <= most:  # type: ignore[operator]
            problem = f"expected {least} to {most:,}"
        else:
            return value
        self.problems.append(f"{self._where}: {name} is {short(value)}, {problem}")
        return kind() if default is _NOTHING else default

    def optional(self, name: str, kind: type[T]) -> T | None:
        """The field's value, or None where it is missing or null."""
        self._seen[name] = "read"
        return None if self._values.get(name) is None else self.take(name, kind, least=0)

    def has(self, name: str) -> bool:
        """Whether the config says anything about this field."""
        return self._values.get(name) is not None

    def is_list(self, name: str) -> bool:
        return isinstance(self._values.get(name), list)

    def numbers(self, name: str, kind: type[T], *, most: int = LARGEST, longest: int | None = None) -> tuple[T, ...]:
        """A list of at most ``longest`` numbers of one kind, none above ``most``."""
        values = self.take(name, list)
        if longest is not None and len(values) > longest:
            self.problems.append(f"{self._where}: {name} has {len(values):,} numbers, expected at most {longest}")
            values = values[:longest]
        each = Fields({str(i): value for i, value in enumerate(values)}, f"{self._where}: {name}", self.problems)
        return tuple(each.take(str(i), kind, least=0, most=most) for i in range(len(values)))

    def choose(self, name: str, options: Mapping[str, T], default: str = _NOTHING) -> T:
        """The field's value, translated; unknown values are a problem."""
        value = self.take(name, str, default)
        if value in options:
            return options[value]
        self.problems.append(f"{self._where}: {name} is {short(value)}; understood: {', '.join(sorted(options))}")
        return next(iter(options.values()))

    def require(self, name: str, *values: Any) -> None:
        """The field, if it is there, must have this value, or one of these: nothing else is supported."""
        self._seen[name] = "required"
        if name in self._values and self._values[name] not in values:
            good = " or ".join(repr(v) for v in values)
            self.problems.append(f"{self._where}: {name} is {short(self._values[name])}; only {good} is supported")

    def __contains__(self, name: str) -> bool:
        """Whether the config has this field, be it null."""
        return name in self._values

    def ignore(self, reason: str, *names: str) -> None:
        """These fields are not needed, for the written reason."""
        self._seen |= dict.fromkeys(names, f"ignored: {reason}")

    def child(self, name: str) -> Fields:
        """A nested config; problems are shared."""
        self._seen[name] = "read"
        if name not in self._children:
            value = self._values.get(name)
            self._children[name] = Fields({} if value is None else value, f"{self._where}: {name}", self.problems)
        return self._children[name]

    def done(self) -> dict[str, str]:
        """What was done with each field.

        Raises:
            FieldsError: with every problem of this config and its parts, among them fields that nobody looked at.
        """
        report = self._report()
        if self.problems:
            raise FieldsError(self._where, self.problems)
        return report

    def _report(self) -> dict[str, str]:
        for name in self._values:
            if name not in self._seen and name not in GENERIC:
                self.problems.append(f"{self._where}: the field {name} = {short(self._values[name])} is not understood")
        report = {
            f"{self._where}: {n}": self._seen.get(n) or f"ignored: {GENERIC[n]}"
            for n in self._values
            if n in self._seen or n in GENERIC
        }
        for child in self._children.values():
            report |= child._report()
        return report


# The `hidden_act` values of the Hub and their names here.
ACTIVATIONS: dict[str, ActivationName] = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}

ACTIVATION_NAMES: dict[str, str] = {ours: theirs for theirs, ours in ACTIVATIONS.items()}

# (their field, our field, the default of the Hub's config class): read and written by the same table.
FieldTable = tuple[tuple[str, str, Any], ...]

TRANSFORMER_FIELDS: FieldTable = (
    ("hidden_size", "dim", 768),
    ("num_hidden_layers", "num_layers", 12),
    ("num_attention_heads", "num_heads", 12),
    ("intermediate_size", "hidden_dim", 3072),
)
IMAGE_FIELDS: FieldTable = (
    ("image_size", "image_size", 224),
    ("patch_size", "patch_size", 16),
    ("num_channels", "num_channels", 3),
)


def read_fields(fields: Fields, table: FieldTable) -> dict[str, Any]:
    """Keywords for one of our configs from the fields of a Hub config."""

    def read(theirs: str, ours: str, default: Any) -> Any:
        if ours == "activation":
            return fields.choose(theirs, ACTIVATIONS, default)
        most = MOST_LAYERS if ours == "num_layers" else LARGEST
        return fields.take(theirs, type(default), default, most=most)

    return {ours: read(theirs, ours, default) for theirs, ours, default in table}


def read_bert_fields(fields: Fields, table: FieldTable) -> dict[str, Any]:
    """`read_fields` of a BERT, whose heads share its width evenly."""
    fields.require("position_embedding_type", "absolute")
    reason = "dropout of training, which these models are built without"
    fields.ignore(reason, "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    shape = read_fields(fields, table)
    if shape["dim"] % max(shape["num_heads"], 1):
        fields.problems.append(f"config.json: hidden_size {shape['dim']} is not a multiple of num_attention_heads")
        shape["num_heads"] = 1
    return shape


def write_fields(config: Any, table: FieldTable) -> dict[str, Any]:
    """The fields of a Hub config from one of our configs."""
    values = {theirs: getattr(config, ours) for theirs, ours, _ in table}
    return {theirs: ACTIVATION_NAMES[v] if theirs == "hidden_act" else v for theirs, v in values.items()}
