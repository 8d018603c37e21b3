"""Idefics (the first): Flamingo on LLaMA with an OpenCLIP tower, as the Hub has it.

Paper: Laurencon et al., "OBELICS: An Open Web-Scale Filtered Dataset of Interleaved Image-Text Documents", 2023,
https://arxiv.org/abs/2306.16527. Code: transformers. Hub: HuggingFaceM4/idefics-9b, HuggingFaceM4/idefics-9b-instruct,
HuggingFaceM4/idefics-80b, ...

    picture -> CLIP, class token and patches -> Perceiver resampler ---------+ keys and values
    text, <image> where a picture is -> embedding -> [gated block] -> layer -> ... -> next-token loss

What differs from OpenFlamingo: gated blocks are made like LLaMA's layers and stand before layers 0, n, 2n, ...; queries
and keys are normed, in them and in the resampler; the class token is a feature; an end of text hides the pictures
before it from what follows; new tokens have output rows of their own, which learn, as the output layer may.

Deviations: fresh gates are zero whatever ``alpha_initializer`` says. Exceptions among frozen layers are refused. The
two tokens of pictures must be the first of the added ones, as in all released checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor

from polymodal.backbones.families import FAMILIES, ControlIds
from polymodal.connectors.gated import GatedConfig
from polymodal.connectors.resampler import ResamplerConfig
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.files import read_json
from polymodal.encoders.vision_families import VISION_FAMILIES
from polymodal.encoders.vit import ViTConfig
from polymodal.modalities.image import CLIP_MEAN, CLIP_STD, Exact, ImageProcessor, load_processor
from polymodal.nn.norm import RMS
from polymodal.systems.base import PREPROCESSOR
from polymodal.systems.crossed import TOWER, CrossedConfig, CrossedGenerator, parts_of
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.weights.fields import IMAGE_FIELDS, MOST_LAYERS, Fields, FieldTable, read_fields, write_fields
from polymodal.weights.format import Format
from polymodal.weights.rules import Rule, Squeeze, rule

END_OF_UTTERANCE = "<end_of_utterance>"
VISION: FieldTable = (
    ("embed_dim", "dim", 768), ("num_hidden_layers", "num_layers", 32), ("num_attention_heads", "num_heads", 16),
    ("intermediate_size", "hidden_dim", 5120), *IMAGE_FIELDS[::2], ("patch_size", "patch_size", 14),
    ("hidden_act", "activation", "gelu"), ("layer_norm_eps", "norm_eps", 1e-5),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IdeficsConfig(CrossedConfig):
    """A CLIP tower, perhaps a resampler, gated blocks and a LLaMA.

    Attributes:
        freeze_text: whether the language model is frozen, but for its output layer, which `freeze_head` freezes.
        freeze_vision: whether the tower is.
    """

    freeze_text: bool = True
    freeze_head: bool = False
    freeze_vision: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backbone.num_layers % self.every:
            raise ConfigError(
                f"a gated block for each {self.every} of {self.backbone.num_layers} layers: not a multiple"
            )

    @property
    def keep_class(self) -> bool:
        return True

    @property
    def gated_layers(self) -> tuple[int, ...]:
        return tuple(range(0, self.backbone.num_layers, self.every))

    @property
    def fake_id(self) -> int:
        """The token before and after a picture."""
        return self.image_id - 1


@final
class Idefics(CrossedGenerator):
    """A vision-language model for prompts of interleaved pictures and texts."""

    config: IdeficsConfig

    def __init__(self, config: IdeficsConfig) -> None:
        super().__init__(config)
        c = config
        self.vision.requires_grad_(not c.freeze_vision)
        self.vision.norm.requires_grad_(False)  # nothing reads it; it is kept for the file's sake
        self.backbone.requires_grad_(not c.freeze_text)
        if self.backbone.lm_head is not None:
            self.backbone.lm_head.requires_grad_(not c.freeze_head)

    def init_weights(self, std: float | None = None) -> None:
        """All normal with the config's deviation."""
        super().init_weights(self.config.backbone.std if std is None else std)

    def order(self, ids: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
        """As its base, and nothing behind an end of text until the next picture."""
        number, places, ends = super().order(ids), ids == self.config.image_id, self._ends(ids).long()
        before = ends.cumsum(1) - ends  # ends of text before each token
        at_picture = before.masked_fill(~places, -1).cummax(1).values
        return number.masked_fill(before > at_picture, 0)

    def plain_from(self, batch: Batch) -> int:
        """Behind the last picture, and behind the last end of text, which hides it."""
        ends = self._ends(batch["ids"][0]).nonzero()
        return max(super().plain_from(batch), int(ends[-1]) + 1 if len(ends) else 0)

    def _ends(self, ids: Int[Tensor, "*batch"]) -> Tensor:
        return torch.isin(ids, torch.tensor(self.config.control.stop[:1], dtype=ids.dtype, device=ids.device))

    def use_tokenizer(self, tokenizer: LanguageTokenizer) -> None:
        super().use_tokenizer(tokenizer)
        end = tokenizer.backend.token_to_id(END_OF_UTTERANCE)
        self.stop_ids = tuple(dict.fromkeys([*([] if end is None else [end]), *self.stop_ids]))

    def spell(self, chat: Chat) -> Iterator[str | int]:
        """``<fake><image><fake>`` for a picture; ``User:`` and ``Assistant:`` where turns are known to the model.

        The base models know none: they continue one text with pictures, few-shot prompts among them.
        """
        assert self.tokenizer is not None
        c, end = self.config, self.tokenizer.backend.token_to_id(END_OF_UTTERANCE)
        if end is None and len(chat.turns) > 1:
            raise UnsupportedError(f"{self.source} has no token {END_OF_UTTERANCE}: it was trained on no conversations")
        for number, turn in enumerate(chat.turns):
            if end is not None:
                yield ("\n" if number else "") + ("Assistant:" if turn.role == "assistant" else "User:")
            picture = False
            for _, part in parts_of(Chat((turn,))):
                if isinstance(part, str):
                    yield part if turn.role == "assistant" else part.strip(" ")
                else:
                    yield from ([] if picture else [c.fake_id])
                    yield from (c.image_id, c.fake_id)
                picture = not isinstance(part, str)
            if end is not None:
                yield end
        if end is not None:
            yield "\nAssistant:"

    def default_images(self) -> ImageProcessor:
        return square(self.config.vision.image_size)


def read_hf(raw: Mapping[str, Any]) -> tuple[IdeficsConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "idefics")
    f.require("dropout", 0.0)
    f.require("cross_layer_activation_function", "swiglu")
    f.require("freeze_text_module_exceptions", [], ())
    f.require("freeze_vision_module_exceptions", [], ())
    f.ignore("fresh gates are zero", "alpha_initializer", "alphas_initializer_range")
    f.ignore("older names of what other fields say", "word_embed_proj_dim", "ffn_dim", "max_sequence_length")
    v, p = f.child("vision_config"), f.child("perceiver_config")
    v.require("attention_dropout", 0.0)
    v.ignore("where the tower came from, and its kind", "vision_model_name", "model_type")
    p.ignore("the whole config says whether there is one", "use_resampler", "model_type")
    backbone = FAMILIES["llama"].read(f)
    vision = ViTConfig(**read_fields(v, VISION), patch_bias=False, pre_norm=True)
    resampler = ResamplerConfig(
        num_latents=p.take("resampler_n_latents", int, 64),
        num_layers=p.take("resampler_depth", int, 6, most=MOST_LAYERS),
        num_heads=p.take("resampler_n_heads", int, 16), head_dim=p.take("resampler_head_dim", int, 96),
        qk_norm=p.take("qk_layer_norms_perceiver", bool, False), activation="relu",
    )  # fmt: skip
    a, norm = backbone.attention, RMS(eps=f.take("rms_norm_eps", float, 1e-6))
    f.require("hidden_act", "silu")
    gated = GatedConfig(
        num_heads=a.num_heads, head_dim=a.head_dim, hidden_dim=backbone.mlp.hidden_dim, mlp="swiglu", norm=norm,
        qk_norm=norm if f.take("qk_layer_norms", bool, False) else None,
        vector_gate=f.choose("alpha_type", {"float": False, "vector": True}, "float"),
    )  # fmt: skip
    new = f.take("additional_vocab_size", int, 0, least=0)
    if new < 2:
        f.problems.append(f"additional_vocab_size is {new}: the first two added tokens stand for pictures")
    every, freeze = f.take("cross_layer_interval", int, 1), f.take("freeze_text_layers", bool, True)
    head, tower = f.take("freeze_lm_head", bool, False), f.take("freeze_vision_layers", bool, True)
    used, control = f.take("use_resampler", bool, False), ControlIds.read(f)
    report = f.done()
    return IdeficsConfig(
        vision=vision, resampler=resampler if used else None, gated=gated, backbone=backbone, new_tokens=new,
        image_id=backbone.vocab_size + 1, control=control, every=every, freeze_text=freeze,
        freeze_head=head, freeze_vision=tower,
    ), report  # fmt: skip


def write_hf(c: IdeficsConfig) -> dict[str, Any]:
    r = c.resampler
    perceiver = {} if r is None else {
        "resampler_n_latents": r.num_latents, "resampler_depth": r.num_layers, "resampler_n_heads": r.num_heads,
        "resampler_head_dim": r.head_dim, "qk_layer_norms_perceiver": r.qk_norm,
    }  # fmt: skip
    return {
        "architectures": ["IdeficsForVisionText2Text"], **FAMILIES["llama"].write(c.backbone), **c.control.write(),
        "model_type": "idefics", "vision_config": write_fields(c.vision, VISION) | {"model_type": "idefics_vision"},
        "perceiver_config": perceiver, "use_resampler": r is not None, "additional_vocab_size": c.new_tokens,
        "cross_layer_interval": c.every, "qk_layer_norms": c.gated.qk_norm is not None,
        "alpha_type": "vector" if c.gated.vector_gate else "float", "freeze_text_layers": c.freeze_text,
        "freeze_lm_head": c.freeze_head, "freeze_vision_layers": c.freeze_vision,
    }  # fmt: skip


def rules_hf(c: IdeficsConfig) -> list[Rule]:
    t, o = "model.perceiver_resampler.blocks.{i}", "resampler.blocks.{i}"
    g, m = "model.gated_cross_attn_layers.{i}", "gated_blocks.{i}"
    gate = Squeeze((0, 1)) if c.gated.vector_gate else None
    attention = (
        ("context_layer_norm", "media_norm"), ("latents_layer_norm", "latents_norm"), ("q_layer_norm", "q_norm"),
        ("k_layer_norm", "k_norm"), ("output_proj", "o_proj"),
    )  # fmt: skip
    return [
        *FAMILIES["llama"].rules(c.backbone, "model", "lm_head", "backbone"),
        *VISION_FAMILIES[TOWER].rules("model.vision_model", "vision"),
        rule("model.embed_tokens.additional_embedding.weight", "new_tokens.weight"),
        rule("lm_head.additional_fc.weight", "new_logits.weight"),
        rule("model.perceiver_resampler.latents", "resampler.latents"),
        rule("model.perceiver_resampler.layer_norm.{p}", "resampler.norm.{p}"),
        *(rule(f"{t}.0.{theirs}.{{p}}", f"{o}.attn.{ours}.{{p}}") for theirs, ours in attention),
        *(rule(f"{t}.0.{n}_proj.weight", f"{o}.attn.{n}_proj.weight") for n in "qkv"),
        rule(f"{t}.1.ln.{{p}}", f"{o}.mlp_norm.{{p}}"),
        rule(f"{t}.1.fc.weight", f"{o}.mlp.up_proj.weight"),
        rule(f"{t}.1.c_proj.weight", f"{o}.mlp.down_proj.weight"),
        *(rule(f"{g}.cross_attn.{n}_proj.weight", f"{m}.attn.{n}_proj.weight") for n in "qkvo"),
        *(rule(f"{g}.cross_attn.{n}_layer_norm.weight", f"{m}.attn.{n}_norm.weight") for n in "qk"),
        *(rule(f"{g}.mlp.{n}_proj.weight", f"{m}.mlp.{n}_proj.weight") for n in ("gate", "up", "down")),
        rule(f"{g}.input_layernorm.weight", f"{m}.attn_norm.weight"),
        rule(f"{g}.post_attention_layernorm.weight", f"{m}.mlp_norm.weight"),
        rule(f"{g}.alpha_cross_attn", f"{m}.attn_gate", gate),
        rule(f"{g}.alpha_dense", f"{m}.mlp_gate", gate),
    ]


def square(side: int) -> ImageProcessor:
    return ImageProcessor(resize=Exact(height=side, width=side), resample="bicubic", mean=CLIP_MEAN, std=CLIP_STD)


def read_images(folder: Path, config: IdeficsConfig) -> Any:
    """Idefics' own processor is a plain square one under another name."""
    raw = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else None
    if not isinstance(raw, dict):
        return square(config.vision.image_size)
    if not str(raw.get("image_processor_type")).startswith("Idefics"):
        return load_processor(folder)
    plain = {name: value for name, value in raw.items() if name not in ("image_size", "image_num_channels")}
    plain |= {"image_processor_type": "BlipImageProcessor", "size": raw.get("image_size") or raw.get("size") or 224}
    return ImageProcessor.from_hf(plain)


Idefics.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf, read_images=read_images)}


def preset(sizes: Mapping[str, int]) -> Callable[[], IdeficsConfig]:
    tower = {"embed_dim": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    shared = {
        "model_type": "idefics", "additional_vocab_size": 2, "qk_layer_norms": True, "use_resampler": True,
        "vision_config": tower, "perceiver_config": {"qk_layer_norms_perceiver": True}, "cross_layer_interval": 4,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return lambda: read_hf(shared | dict(sizes))[0]


PRESETS = {
    "HuggingFaceM4/idefics-9b": preset({}),
    "HuggingFaceM4/idefics-80b": preset(
        {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64}
    ),
}
