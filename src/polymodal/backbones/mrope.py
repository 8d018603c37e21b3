"""Multimodal rotary positions (M-RoPE) of the Qwen-VL family, and the Hub configs of its language models.

Source: Wang et al., "Qwen2-VL", 2024, https://arxiv.org/abs/2409.12191, section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polymodal.backbones.decoder import DecoderConfig
from polymodal.backbones.families import FAMILIES, ControlIds
from polymodal.core.errors import ConfigError, MediaError
from polymodal.nn.rope import Rope
from polymodal.weights.fields import Fields


def mrope_positions(
    places: Bool[Tensor, "batch tokens"],
    grid: Int[Tensor, "media 3"],
    row: Int[Tensor, " media"],
    interval: Float[Tensor, " media"] | None = None,
) -> Int[Tensor, "batch tokens 3"]:
    """Time, height and width of every token.

    Text has three equal ids that count on. A medium starts one after the largest id before it and counts in its own
    time, rows and columns from there; what follows starts one after *its* largest id.

    Args:
        places: where the tokens of media stand.
        grid: tokens of each medium in time, height and width.
        row: of the batch in which each medium stands; those of a row are in order.
        interval: ids from one step in time to the next; a sum of steps is rounded down. One if not given.

    Raises:
        MediaError: the places are not what the grids need, or text stands within a medium.
    """
    batch, length = places.shape
    position = torch.arange(length, device=places.device)[None, :, None].repeat(batch, 1, 3)
    slots = [here.nonzero()[:, 0] for here in places]
    used = [0] * batch
    steps = [1] * len(grid) if interval is None else interval.tolist()
    for (t, h, w), i, step in zip(grid.tolist(), row.tolist(), steps, strict=True):
        count = t * h * w
        mine = slots[i][used[i] : used[i] + count]
        used[i] += count
        if len(mine) != count or int(mine[-1] - mine[0]) != count - 1:
            raise MediaError(
                f"a medium of {t} x {h} x {w} tokens has no {count} placeholders in one piece in row {i}: the "
                "processor and the model disagree on the token count, or the prompt was cut inside a medium"
            )
        first = int(mine[0])
        after = first + count
        time = (torch.arange(t, device=position.device) * step).long()
        inside = torch.cartesian_prod(time, *(torch.arange(n, device=position.device) for n in (h, w)))
        position[i, first:after] = position[i, first] + inside
        position[i, after:] += int(inside.max()) + 1 - count
    left = [i for i in range(batch) if used[i] != len(slots[i])]
    if left:
        raise MediaError(f"row {left[0]} has {len(slots[left[0]])} placeholders for {used[left[0]]} media features")
    return position


def check_sections(backbone: DecoderConfig) -> None:
    """The positions of a backbone must have three axes that share out all frequencies.

    Raises:
        ConfigError: they have not.
    """
    rope = backbone.position
    half = rope.dims(backbone.attention.head_dim) // 2 if isinstance(rope, Rope) else 0
    if not isinstance(rope, Rope) or rope.sections is None or len(rope.sections) != 3 or sum(rope.sections) != half:
        raise ConfigError(f"M-RoPE needs three sections (time, height, width) of {half} frequencies together: {rope}")


# ---- configs of the Hub ----

# What transformers takes for the fields that a file leaves out: the 72B models.
_DEFAULTS: Final[dict[str, Any]] = {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_window_layers": 80,
    "rope_theta": 1e6, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
_SECTIONS: Final = (16, 24, 24)
_MEDIA_IDS: Final = (
    "image_token_id", "video_token_id", "vision_token_id", "vision_start_token_id", "vision_end_token_id",
)  # fmt: skip
_TOP: Final = {
    "model_type", "architectures", "vision_config", "text_config", "tie_word_embeddings", *_MEDIA_IDS,
}  # fmt: skip
_LANGUAGE: Final = (
    *_DEFAULTS, "hidden_act", "max_position_embeddings", "initializer_range", "use_cache", "attention_dropout",
    "use_sliding_window", "sliding_window", "layer_types", "rope_scaling", "rope_parameters",
)  # fmt: skip


def open_config(raw: Mapping[str, Any]) -> tuple[Fields, dict[str, Any]]:
    """The fields of a Qwen-VL config; and the keywords that both systems read from them: the decoder and token ids.

    The language model's fields are those of ``text_config``; older files, those of the Hub among them, have them at the
    top, and those of some versions have them in both.
    """
    nested = isinstance(raw.get("text_config"), Mapping)
    inner = dict(raw["text_config"]) if nested else {k: v for k, v in raw.items() if k not in _TOP}
    inner = {k: v for k, v in inner.items() if k not in _MEDIA_IDS}
    if raw.get("tie_word_embeddings") is True:  # it was in the one place and is in the other
        inner["tie_word_embeddings"] = True
    top = {k: v for k, v in raw.items() if nested or k in _TOP}
    f = Fields(top | {"text_config": _DEFAULTS | inner})
    f.take("tie_word_embeddings", bool, False)
    f.ignore("text_config says it", *_LANGUAGE)
    f.ignore("the template of chats writes it", "vision_token_id")
    text = f.child("text_config")
    text.ignore("the language model of this system", "model_type")
    backbone, control = FAMILIES["qwen2"].read(text), ControlIds.read(text)
    if isinstance(backbone.position, Rope) and backbone.position.sections is None:
        backbone = replace(backbone, position=replace(backbone.position, sections=_SECTIONS))
    ids = {"image_id": 151655, "video_id": 151656, "start_id": 151652, "end_id": 151653}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    taken = {ours: f.take(theirs, int, ids[ours], least=0) for ours, theirs in zip(ids, names, strict=True)}
    return f, {"backbone": backbone, "control": control, **taken}


def write_config(c: Any, vision: dict[str, Any], model_type: str, architecture: str) -> dict[str, Any]:
    """The reverse of `open_config`, with the fields of the tower."""
    text = {"model_type": f"{model_type}_text", **FAMILIES["qwen2"].write(c.backbone), **c.control.write()}
    return {
        "architectures": [architecture], "model_type": model_type, "text_config": text,
        "vision_config": {"model_type": f"{model_type}_vision", **vision}, "tie_word_embeddings": c.backbone.tied,
        "image_token_id": c.image_id, "video_token_id": c.video_id, "vision_start_token_id": c.start_id,
        "vision_end_token_id": c.end_id,
    }  # fmt: skip
