"""Chameleon's config, how transformers writes it, and the names of its weights. Not a system itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from polymodal.backbones.decoder import DecoderConfig
from polymodal.backbones.families import ControlIds, chameleon_rules, read_chameleon, write_chameleon
from polymodal.core.errors import ConfigError
from polymodal.systems.vqgan_files import read_vq, vq_rules, write_vq
from polymodal.tokenizers.vq import VQConfig
from polymodal.weights.fields import Fields
from polymodal.weights.format import write_whole
from polymodal.weights.rules import Rule

_NAMES: Final = {"image_id": "<image>", "start_id": "<racm3:break>", "end_id": "<eoss>", "turn_id": "<reserved08706>"}
_CODE: Final = "IMGIMG"  # begins the name of a code's token: its digits as the letters A to J follow, and a Z


@dataclass(frozen=True, kw_only=True)
class ChameleonConfig:
    """A decoder, a tokenizer of pictures, and which tokens pictures are.

    Attributes:
        code_ids: the token of each code.
        image_id: stands for each code of a picture until it is known which.
        start_id, end_id: stand around a picture.
        turn_id: ends a turn of a chat.
    """

    backbone: DecoderConfig
    vision: VQConfig
    code_ids: tuple[int, ...]
    image_id: int
    start_id: int
    end_id: int
    turn_id: int | None = None
    control: ControlIds = field(default_factory=ControlIds)

    def __post_init__(self) -> None:
        codes, size = set(self.code_ids), self.backbone.vocab_size
        if len(codes) != self.vision.codes.size or len(self.code_ids) != len(codes) or max(codes) >= size:
            raise ConfigError(f"{len(codes)} tokens below {size} for {self.vision.codes.size} codes of pictures")
        special = {i for i in (self.image_id, self.start_id, self.end_id, self.turn_id) if i is not None}
        within = special - {self.image_id}  # that one is never embedded
        if codes & special or self.image_id < 0 or not all(0 <= token < size for token in within):
            raise ConfigError(f"a picture or a turn begins or ends with no token below {size}, or with that of a code")


def read_hf(raw: Mapping[str, Any]) -> tuple[ChameleonConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "chameleon")
    backbone, vision = read_chameleon(f), read_vq(f.child("vq_config"))
    control = ControlIds.read(f, ControlIds(start=1, stop=(2,)))
    f.ignore("vocabulary_map has it", "image_token_id")
    names = f.take("vocabulary_map", dict)
    codes: dict[int, int] = {}
    for name, token in names.items():
        digits = "".join(str("ABCDEFGHIJ".find(letter)) for letter in name[len(_CODE) : -1])
        if name.startswith(_CODE) and digits.isdigit() and len(digits) < 10:
            codes[int(digits)] = token
    special = {ours: names.get(theirs) for ours, theirs in _NAMES.items()}
    ids = [*codes.values(), *(token for name, token in special.items() if name != "turn_id" or token is not None)]
    if any(type(i) is not int or i < 0 for i in ids) or sorted(codes) != list(range(vision.codes.size)):
        f.problems.append(
            f"config.json: vocabulary_map names {len(codes)} of {vision.codes.size} codes (IMGIMG...Z), or lacks one "
            f"of {', '.join([*_NAMES.values()][:3])}, or names what is no token"
        )
    report = f.done()
    code_ids = tuple(codes[code] for code in range(len(codes)))
    return ChameleonConfig(backbone=backbone, vision=vision, code_ids=code_ids, control=control, **special), report  # type: ignore[arg-type]


def write_hf(c: ChameleonConfig) -> dict[str, Any]:
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = {f"{_CODE}{str(code).translate(letters)}Z": token for code, token in enumerate(c.code_ids)}
    names |= {theirs: vars(c)[ours] for ours, theirs in _NAMES.items() if vars(c)[ours] is not None}
    raw = {
        "architectures": ["ChameleonForConditionalGeneration"], "model_type": "chameleon",
        **write_chameleon(c.backbone), **c.control.write(), "vq_config": write_vq(c.vision), "vocabulary_map": names,
    }  # fmt: skip
    return write_whole(c, raw, read_hf)


def rules_hf(c: ChameleonConfig) -> list[Rule]:
    return [
        *chameleon_rules(c.backbone, "model", "lm_head", "backbone"),
        *vq_rules("model.vqmodel.", "vision.", c.vision),
    ]


LARGE: Final[Mapping[str, Any]] = {
    "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 48, "num_attention_heads": 64,
    "num_key_value_heads": 8, "swin_norm": True, "model_parallel_size": 4,
}  # fmt: skip


def published(fields: Mapping[str, Any]) -> ChameleonConfig:
    """A config of the Hub, from the fields in which it differs from the small model's."""
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = {f"{_CODE}{str(code).translate(letters)}Z": 4 + code for code in range(8192)}
    names |= {"<eoss>": 8196, "<racm3:break>": 8197, "<reserved08706>": 8710, "<image>": 8711}
    control = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return read_hf({"model_type": "chameleon", "vocabulary_map": names, **control, **fields})[0]
