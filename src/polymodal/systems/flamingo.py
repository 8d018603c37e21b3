"""Flamingo, as OpenFlamingo builds it: a frozen language model that sees pictures through gated layers between its own.

Papers: Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning", 2022,
https://arxiv.org/abs/2204.14198, and Awadalla et al., "OpenFlamingo", 2023, https://arxiv.org/abs/2308.01390. Code:
mlfoundations/open_flamingo (the first Flamingo has none). Hub: openflamingo/OpenFlamingo-9B-deprecated, ...

    picture -> CLIP, all patches -> Perceiver resampler, 64 latents --------+ keys and values
    text, <image> where a picture is -> embedding -> [gated block] -> layer -> ... -> next-token loss

Training details kept here: tower and language model are frozen; the resampler, the gated blocks and the input vectors
of the new tokens learn, weight decay is on the gated blocks alone. Gates start closed, latents with deviation one,
linear layers as torch has them. A text token sees the last picture before it; one before any gets zero. Features are
those of the tower's last layer without its class token, and without its last norm, which the tower's code of that time
(open_clip up to 2.23) gave to the class token alone. ``<|endofchunk|>`` ends what belongs to a picture, and an answer.
Loss weights of data sets belong to the mixture, not to the model.

Deviations: the output rows of new tokens do not learn where the output layer is not tied, as in OpenFlamingo, whose
checkpoints do not even hold them. The released checkpoints of version 2 stand on MPT and GPT-NeoX, backbones that are
not built here. They are pickles, which are never read: convert one to safetensors under its own names, and `join` it to
a tower and a language model. A saved model is one file with all three; its ``config.json`` is ours, with OpenFlamingo's
argument names. `Resampler` reads clips, `prompt` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from polymodal.backbones.decoder import Decoder
from polymodal.backbones.families import FAMILIES, ControlIds
from polymodal.connectors.gated import GatedConfig
from polymodal.connectors.resampler import ResamplerConfig
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError
from polymodal.encoders.vision_families import VISION_FAMILIES
from polymodal.encoders.vit import ViT
from polymodal.modalities.image import CLIP_MEAN, CLIP_STD, CenterCrop, ImageProcessor, ShortestEdge
from polymodal.systems.crossed import TOWER, CrossedConfig, CrossedGenerator, parts_of
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.weights.fields import MOST_LAYERS, Fields
from polymodal.weights.files import SINGLE, Checkpoint
from polymodal.weights.format import Format
from polymodal.weights.layouts import open_clip_blocks
from polymodal.weights.rules import Rule, Split, drop, plan, read_only, rule

FAMILIES_READ = {n: n for n, family in FAMILIES.items() if family.base in ("model", "model.decoder")}


@dataclass(frozen=True, kw_only=True)
class FlamingoConfig(CrossedConfig):
    """A CLIP tower, a resampler, gated blocks and a decoder.

    Attributes:
        family: the `model_type` of the language model.
        chunk_id: the token that ends what belongs to a picture.
    """

    resampler: ResamplerConfig
    family: str
    chunk_id: int

    def __post_init__(self) -> None:
        super().__post_init__()
        old = self.backbone.vocab_size
        if self.family not in FAMILIES_READ:
            raise ConfigError(f"OpenFlamingo's names are not defined for a backbone of the family {self.family!r}")
        if not all(old <= i < old + self.new_tokens for i in (self.image_id, self.chunk_id)):
            raise ConfigError(f"image_id {self.image_id} and chunk_id {self.chunk_id} are new tokens, from {old} on")
        if not (self.vision.pre_norm and self.vision.class_token):
            raise ConfigError("Flamingo's tower is CLIP's")


@final
class Flamingo(CrossedGenerator):
    """A vision-language model for few-shot prompts of interleaved pictures and texts."""

    config: FlamingoConfig

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__(config)
        self.stop_ids = tuple(dict.fromkeys([config.chunk_id, *config.control.stop]))
        if self.new_logits is not None:
            self.new_logits.requires_grad_(False)

    def no_decay(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if not name.startswith("gated_blocks.")]

    @classmethod
    def join(
        cls, config: FlamingoConfig, vision: ViT, backbone: Decoder, trained: str | Path | None = None
    ) -> Flamingo:
        """A model of a tower and a language model from checkpoints of their own, as OpenFlamingo is distributed.

        Args:
            config: of the whole.
            vision: e.g. ``load("openai/clip-vit-large-patch14").vision``.
            backbone: e.g. ``load("huggyllama/llama-7b").backbone``; rows of its tables behind the config's vocabulary,
                which are padding, are left out.
            trained: a folder with OpenFlamingo's ``model.safetensors``: ``perceiver.*``, the gated layers under either
                of their names, and the embedding table. Without it the model starts as its paper's.

        Raises:
            ConfigError: a part is of another shape than the config says.
            WeightsError: the trained part does not fit; every problem is listed.
        """
        rows, theirs = config.backbone.vocab_size, backbone.config
        if vision.config != config.vision:
            raise ConfigError(f"the tower is {vision.config}, not {config.vision}")
        if theirs.vocab_size < rows or replace(theirs, vocab_size=rows, std=config.backbone.std) != config.backbone:
            raise ConfigError(f"the language model is {theirs}, not {config.backbone}")
        model = cls.build(config)
        assert isinstance(model, cls)
        model.vision.load_state_dict(vision.state_dict())
        tables = {"embed_tokens.weight", "lm_head.weight"}
        model.backbone.load_state_dict(
            {name: t[:rows] if name in tables else t for name, t in backbone.state_dict().items()}
        )
        if trained is not None:
            model._load_trained(Path(trained))
        return model.eval()

    def _load_trained(self, folder: Path) -> None:
        # What OpenFlamingo saves beside what learns: every table called "embed", positions among them.
        parts: tuple[str, ...] = ("resampler.", "gated_blocks.", "new_tokens.", "backbone.embed_", "backbone.position.")
        with Checkpoint(folder, SINGLE) as checkpoint:
            if "lang_encoder.lm_head.weight" in checkpoint.meta():
                parts += ("backbone.lm_head.", "new_logits.")
            ours = {name: t for name, t in self.state_dict().items() if name.startswith(parts)}
            todo = plan(rules_hf(self.config), checkpoint.meta(), ours)
            for name, tensor in todo.tensors(checkpoint.read, str(folder)):
                self._fill(name, tensor)

    def use_tokenizer(self, tokenizer: LanguageTokenizer) -> None:
        super().use_tokenizer(tokenizer)
        self.stop_ids = tuple(dict.fromkeys([self.config.chunk_id, *self.stop_ids]))

    def spell(self, chat: Chat) -> Iterator[str | int]:
        """``<image>text<|endofchunk|><image>text ...``: the last text is left open, unless the assistant said it."""
        open_text, before = False, ""
        for role, part in parts_of(chat):
            if before == "assistant" and role != before and open_text:
                yield self.config.chunk_id
                open_text = False
            if isinstance(part, str):
                yield part
            else:
                if open_text:
                    yield self.config.chunk_id
                yield self.config.image_id
            open_text, before = isinstance(part, str), role
        if before == "assistant" and open_text:
            yield self.config.chunk_id

    def default_images(self) -> ImageProcessor:
        side = self.config.vision.image_size
        return ImageProcessor(
            resize=ShortestEdge(size=side), resample="bicubic", crop=CenterCrop(height=side, width=side),
            mean=CLIP_MEAN, std=CLIP_STD,
        )  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[FlamingoConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "open_flamingo")
    v, t, p = f.child("vision_config"), f.child("text_config"), f.child("perceiver_config")
    v.require("model_type", TOWER)
    family = FAMILIES[t.choose("model_type", FAMILIES_READ, "llama")]
    vision, backbone = VISION_FAMILIES[TOWER].read(v), family.read(t)
    p.require("ff_mult", 4)
    p.require("max_num_media", None)
    resampler = ResamplerConfig(
        num_latents=p.take("num_latents", int, 64), num_layers=p.take("depth", int, 6, most=MOST_LAYERS),
        num_heads=p.take("heads", int, 8), head_dim=p.take("dim_head", int, 64),
        num_frames=p.optional("max_num_frames", int),
    )  # fmt: skip
    heads, head_dim = f.take("heads", int, 8), f.take("dim_head", int, 64)
    new = {
        "new_tokens": f.take("num_new_tokens", int, 2), "every": f.take("cross_attn_every_n_layers", int, 1),
        "image_id": f.take("media_token_id", int), "chunk_id": f.take("eoc_token_id", int, least=0),
    }  # fmt: skip
    control = ControlIds.read(t)
    report = f.done()
    return FlamingoConfig(
        vision=vision, resampler=resampler, family=family.model_type, backbone=backbone, control=control, **new,
        gated=GatedConfig(num_heads=heads, head_dim=head_dim, hidden_dim=4 * backbone.dim),
    ), report  # fmt: skip


def write_hf(c: FlamingoConfig) -> dict[str, Any]:
    r, text = c.resampler, FAMILIES[c.family].write(c.backbone)
    return {
        "architectures": ["Flamingo"], "model_type": "open_flamingo",
        "vision_config": VISION_FAMILIES[TOWER].write(c.vision),
        "text_config": {"model_type": c.family, **text, **c.control.write()},
        "perceiver_config": {
            "num_latents": r.num_latents, "depth": r.num_layers, "heads": r.num_heads, "dim_head": r.head_dim,
            "ff_mult": 4, "max_num_frames": r.num_frames,
        },
        "heads": c.gated.num_heads, "dim_head": c.gated.head_dim, "cross_attn_every_n_layers": c.every,
        "num_new_tokens": c.new_tokens, "media_token_id": c.image_id, "eoc_token_id": c.chunk_id,
        "tie_word_embeddings": c.backbone.tied,
    }  # fmt: skip


def rules_hf(c: FlamingoConfig) -> list[Rule]:
    """The whole of OpenFlamingo's module; each layer of its language model has two names there, one is written."""
    base = f"lang_encoder.{FAMILIES[c.family].base}"
    layers = f"{base}.layers.{{i}}"
    rules = []
    for r in FAMILIES[c.family].rules(c.backbone, base, "lang_encoder.lm_head", "backbone"):
        old, new = (
            replace(r, theirs=tuple(t.replace(layers, name) for t in r.theirs))
            for name in ("lang_encoder.old_decoder_blocks.{i}", f"{layers}.decoder_layer")
        )
        rules += [_with_new(c, r)] if old == r else [old, *read_only([new])]
    for n, layer in enumerate(c.gated_layers):
        rules += _gated_rules(f"lang_encoder.gated_cross_attn_layers.{layer}", f"gated_blocks.{n}")
        rules += read_only(_gated_rules(f"{base}.layers.{layer}.gated_cross_attn_layer", f"gated_blocks.{n}"))
    t, o = "perceiver.layers.{i}", "resampler.blocks.{i}"
    return [
        *rules,
        rule("vision_encoder.class_embedding", "vision.class_token"),
        rule("vision_encoder.positional_embedding", "vision.position"),
        rule("vision_encoder.conv1.weight", "vision.patch_embed.weight"),
        rule("vision_encoder.ln_pre.{p}", "vision.pre_norm.{p}"),
        rule("vision_encoder.ln_post.{p}", "vision.norm.{p}"),
        drop("vision_encoder.proj", "of the pooled vector, which nothing here reads"),
        *open_clip_blocks("vision_encoder.transformer", "vision.blocks"),
        rule("perceiver.latents", "resampler.latents"),
        rule("perceiver.frame_embs", "resampler.frames"),
        rule("perceiver.norm.{p}", "resampler.norm.{p}"),
        rule(f"{t}.0.norm_media.{{p}}", f"{o}.attn.media_norm.{{p}}"),
        rule(f"{t}.0.norm_latents.{{p}}", f"{o}.attn.latents_norm.{{p}}"),
        *_block_rules(f"{t}.0", f"{t}.1", o),
    ]


def _with_new(c: FlamingoConfig, r: Rule) -> Rule:
    """The tables of tokens have the new ones' rows at their end."""
    new = {"backbone.embed_tokens.weight": "new_tokens.weight", "backbone.lm_head.weight": "new_logits.weight"}
    if not r.ours or r.ours[0] not in new:
        return r
    return replace(r, ours=(r.ours[0], new[r.ours[0]]), op=Split((c.backbone.vocab_size, c.new_tokens)))


def _gated_rules(theirs: str, ours: str) -> list[Rule]:
    return [
        rule(f"{theirs}.attn_gate", f"{ours}.attn_gate"),
        rule(f"{theirs}.ff_gate", f"{ours}.mlp_gate"),
        rule(f"{theirs}.attn.norm.{{p}}", f"{ours}.attn_norm.{{p}}"),
        *_block_rules(f"{theirs}.attn", f"{theirs}.ff", ours),
    ]


def _block_rules(attn: str, mlp: str, ours: str) -> list[Rule]:
    """What the blocks of the resampler and the gated ones have in common."""
    return [
        rule(f"{attn}.to_q.weight", f"{ours}.attn.q_proj.weight"),
        rule(f"{attn}.to_kv.weight", [f"{ours}.attn.{n}_proj.weight" for n in "kv"], Split(2)),
        rule(f"{attn}.to_out.weight", f"{ours}.attn.o_proj.weight"),
        rule(f"{mlp}.0.{{p}}", f"{ours}.mlp_norm.{{p}}"),
        rule(f"{mlp}.1.weight", f"{ours}.mlp.up_proj.weight"),
        rule(f"{mlp}.3.weight", f"{ours}.mlp.down_proj.weight"),
    ]


Flamingo.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}


def preset(every: int, text: Mapping[str, Any], chunk_id: int, new_tokens: int) -> Callable[[], FlamingoConfig]:
    tower = {
        "model_type": TOWER, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "quick_gelu",
    }  # fmt: skip
    raw = {
        "model_type": "open_flamingo", "vision_config": tower, "text_config": text, "eoc_token_id": chunk_id,
        "media_token_id": chunk_id + 1, "cross_attn_every_n_layers": every, "num_new_tokens": new_tokens,
    }  # fmt: skip
    return lambda: read_hf(raw)[0]


PRESETS = {
    "openflamingo/OpenFlamingo-9B-deprecated": preset(
        4, {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}, 32000, 3
    ),
    "flamingo-opt-1.3b": preset(
        1,
        {
            "model_type": "opt", "hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 24,
            "ffn_dim": 8192, "vocab_size": 50265, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
        },
        50265, 2,
    ),
}  # fmt: skip
