"""Name layouts that several Hub formats share."""

from __future__ import annotations

from typing import Any, Final

from polymodal.weights.fields import TRANSFORMER_FIELDS, Fields, FieldTable, read_bert_fields, write_fields
from polymodal.weights.rules import Rule, Split, Squeeze, Transpose, renames, rule

# Names within a layer, theirs and ours, for `renames`.
PROJECTIONS: Final = {**{f"{n}_proj": f"{n}_proj" for n in "qkv"}, "out_proj": "o_proj"}
TO_PROJECTIONS: Final = {**{f"to_{n}": f"{n}_proj" for n in "qkv"}, "to_out.0": "o_proj"}  # diffusers'
FAIRSEQ_FEED_FORWARD: Final = {"fc1": "mlp.up_proj", "fc2": "mlp.down_proj", "final_layer_norm": "mlp_norm"}
FEED_FORWARD: Final = {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
QUERY_KEY_VALUE: Final = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}  # BERT's
VIT_ATTENTION: Final = {
    **{f"attention.attention.{theirs}": f"attn.{ours}" for theirs, ours in QUERY_KEY_VALUE.items()},
    "attention.output.dense": "attn.o_proj",
}


def clip_blocks(theirs: str, ours: str) -> list[Rule]:
    """The layers of CLIP and SigLIP as transformers names them: ``{theirs}.layers.{i}`` to ``{ours}.{i}``."""
    names = {
        **{f"self_attn.{theirs}": f"attn.{ours}" for theirs, ours in PROJECTIONS.items()},
        "layer_norm1": "attn_norm", "layer_norm2": "mlp_norm", **FEED_FORWARD,
    }  # fmt: skip
    return renames(f"{theirs}.layers.{{i}}", f"{ours}.{{i}}", names)


def open_clip_blocks(theirs: str, ours: str) -> list[Rule]:
    """The layers of CLIP as OpenAI and open_clip name them: ``{theirs}.resblocks.{i}`` to ``{ours}.{i}``."""
    t, o = f"{theirs}.resblocks.{{i}}", f"{ours}.{{i}}"
    qkv = [f"{o}.attn.{n}_proj" for n in "qkv"]
    return [
        rule(f"{t}.attn.in_proj_weight", [f"{n}.weight" for n in qkv], Split(3)),
        rule(f"{t}.attn.in_proj_bias", [f"{n}.bias" for n in qkv], Split(3)),
        *renames(t, o, {
            "attn.out_proj": "attn.o_proj", "ln_1": "attn_norm", "ln_2": "mlp_norm", "mlp.c_fc": "mlp.up_proj",
            "mlp.c_proj": "mlp.down_proj",
        }),
    ]  # fmt: skip


def open_clip_rules() -> list[Rule]:
    """All of CLIP as OpenAI and open_clip name it."""
    return [
        rule("logit_scale", "head.logit_scale"),
        rule("visual.proj", "image_projection.weight", Transpose()),
        rule("text_projection", "text_projection.weight", Transpose()),
        rule("visual.class_embedding", "vision.class_token"),
        rule("visual.positional_embedding", "vision.position"),
        rule("visual.conv1.weight", "vision.patch_embed.weight"),
        rule("visual.ln_pre.{p}", "vision.pre_norm.{p}"),
        rule("visual.ln_post.{p}", "vision.norm.{p}"),
        *open_clip_blocks("visual.transformer", "vision.blocks"),
        rule("token_embedding.weight", "text.embed_tokens.weight"),
        rule("positional_embedding", "text.position"),
        rule("ln_final.{p}", "text.norm.{p}"),
        *open_clip_blocks("transformer", "text.blocks"),
    ]


# Options of OpenCLIP's towers that no checkpoint of this architecture uses, with the value that they must have.
_OPEN_CLIP_BLOCK = {"ls_init_value": None, "act_kwargs": None, "norm_kwargs": None, "block_type": None} | dict.fromkeys(
    ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), False
)
_OPEN_CLIP_TOWER = _OPEN_CLIP_BLOCK | {"final_ln_after_pool": False, "output_tokens": False}
OPEN_CLIP_PLAIN: dict[str, dict[str, Any]] = {
    "model": {"custom_text": False, "init_logit_bias": None, "nonscalar_logit_scale": False},
    "vision": _OPEN_CLIP_TOWER
    | {"pool_type": "tok", "no_ln_pre": False, "attentional_pool": False, "pos_embed_type": "learnable"}
    | {"timm_model_name": None},
    "text": _OPEN_CLIP_TOWER
    | {"pool_type": "argmax", "no_causal_mask": False, "embed_cls": False, "proj_bias": False, "proj_type": "linear"}
    | {"hf_model_name": None},
}


def vit_blocks(theirs: str, ours: str) -> list[Rule]:
    """The layers of ViT and MAE as transformers names them (BERT's names): ``{theirs}.{i}`` to ``{ours}.{i}``."""
    names = {
        **VIT_ATTENTION, "layernorm_before": "attn_norm", "layernorm_after": "mlp_norm",
        "intermediate.dense": "mlp.up_proj", "output.dense": "mlp.down_proj",
    }  # fmt: skip
    return renames(f"{theirs}.{{i}}", f"{ours}.{{i}}", names)


def siglip_rules() -> list[Rule]:
    """All of SigLIP and SigLIP 2 but the patch embedding, as transformers names it."""
    qkv = [f"pool.attn.{n}_proj" for n in "qkv"]
    head = "vision_model.head"
    return [
        rule("logit_scale", "head.logit_scale"),
        rule("logit_bias", "head.logit_bias"),
        rule("vision_model.embeddings.position_embedding.weight", "vision.position"),
        rule("vision_model.post_layernorm.{p}", "vision.norm.{p}"),
        *clip_blocks("vision_model.encoder", "vision.blocks"),
        rule(f"{head}.probe", "pool.probe", Squeeze((0, 1))),
        rule(f"{head}.attention.in_proj_weight", [f"{n}.weight" for n in qkv], Split(3)),
        rule(f"{head}.attention.in_proj_bias", [f"{n}.bias" for n in qkv], Split(3)),
        *renames(head, "pool", {"attention.out_proj": "attn.o_proj", "layernorm": "norm", **FEED_FORWARD}),
        rule("text_model.embeddings.token_embedding.weight", "text.embed_tokens.weight"),
        rule("text_model.embeddings.position_embedding.weight", "text.position"),
        rule("text_model.final_layer_norm.{p}", "text.norm.{p}"),
        *clip_blocks("text_model.encoder", "text.blocks"),
        rule("text_model.head.{p}", "text_projection.{p}"),
    ]


def vit_embeddings(theirs: str, ours: str) -> list[Rule]:
    """Patches, class token and positions of ViT, MAE and DINOv2: ``{theirs}embeddings`` to ``{ours}``."""
    return [
        rule(f"{theirs}embeddings.cls_token", f"{ours}.class_token", Squeeze((0, 1))),
        rule(f"{theirs}embeddings.position_embeddings", f"{ours}.position", Squeeze((0,))),
        rule(f"{theirs}embeddings.patch_embeddings.projection.{{p}}", f"{ours}.patch_embed.{{p}}"),
    ]


def dinov2_rules(ours: str, *, swiglu: bool) -> list[Rule]:
    """All of DINOv2's backbone as transformers names it."""
    t, o = "encoder.layer.{i}", f"{ours}.blocks.{{i}}"
    mlp = renames(t, o, FEED_FORWARD)
    if swiglu:
        mlp = [
            rule(f"{t}.mlp.weights_in.{{p}}", [f"{o}.mlp.gate_proj.{{p}}", f"{o}.mlp.up_proj.{{p}}"], Split(2)),
            rule(f"{t}.mlp.weights_out.{{p}}", f"{o}.mlp.down_proj.{{p}}"),
        ]
    return [
        *vit_embeddings("", ours),
        rule("embeddings.mask_token", f"{ours}.mask_token", Squeeze((0,))),
        *renames(t, o, {**VIT_ATTENTION, "norm1": "attn_norm", "norm2": "mlp_norm"}),
        rule(f"{t}.layer_scale1.lambda1", f"{o}.attn_scale.weight"),
        rule(f"{t}.layer_scale2.lambda1", f"{o}.mlp_scale.weight"),
        *mlp,
        rule("layernorm.{p}", f"{ours}.norm.{{p}}"),
    ]


# ---- BLIP-2's Q-Former

_QFORMER: FieldTable = (
    *TRANSFORMER_FIELDS, ("cross_attention_frequency", "cross_every", 2), ("hidden_act", "activation", "gelu"),
    ("layer_norm_eps", "norm_eps", 1e-12),
)  # fmt: skip


def read_qformer(f: Fields) -> dict[str, Any]:
    """The shape of a Q-Former from the ``qformer_config`` of a system; what concerns its text is left to the caller."""
    f.require("model_type", "blip_2_qformer")
    f.ignore("it follows from the tower", "encoder_hidden_size")
    return read_bert_fields(f, _QFORMER)


def write_qformer(config: Any) -> dict[str, Any]:
    """The fields of `read_qformer`."""
    return {"model_type": "blip_2_qformer", **write_fields(config, _QFORMER)}


def qformer_rules(ours: str) -> list[Rule]:
    """A Q-Former and its queries as transformers names them; those of its text bind where it reads text."""
    t, o = "qformer.encoder.layer.{i}", f"{ours}.blocks.{{i}}"
    rules = [
        rule("query_tokens", f"{ours}.queries", Squeeze((0,))),
        rule("embeddings.word_embeddings.weight", f"{ours}.embed_tokens.weight"),
        rule("embeddings.position_embeddings.weight", f"{ours}.position.weight"),
        rule("qformer.layernorm.{p}", f"{ours}.norm.{{p}}"),
    ]
    for theirs, mine, norm in (("attention", "attn", "attn_norm"), ("crossattention", "cross_attn", "cross_norm")):
        rules += [
            *renames(f"{t}.{theirs}.attention", f"{o}.{mine}", QUERY_KEY_VALUE),
            *renames(f"{t}.{theirs}.output", o, {"dense": f"{mine}.o_proj", "LayerNorm": norm}),
        ]
    for kind, mine, norm in (("_query", "mlp", "mlp_norm"), ("", "text_mlp", "text_norm")):
        rules += [
            rule(f"{t}.intermediate{kind}.dense.{{p}}", f"{o}.{mine}.up_proj.{{p}}"),
            *renames(f"{t}.output{kind}", o, {"dense": f"{mine}.down_proj", "LayerNorm": norm}),
        ]
    return rules
