"""Names and shapes of full-size checkpoints: every tensor is taken, every parameter filled, nothing is allocated."""

from __future__ import annotations

import functools
import importlib
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from polymodal.nn.skeleton import skeleton
from polymodal.systems import TABLE

transformers = pytest.importorskip("transformers")

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SO400M = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}


def clip(vision: dict[str, Any], width: int = 512, activation: str = "quick_gelu", eos: int = 2) -> dict[str, Any]:
    text = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 64,
        "hidden_act": activation,
        "eos_token_id": eos,
    }
    return {"text_config": text, "vision_config": vision | {"hidden_act": activation}, "projection_dim": width}


def siglip(shape: dict[str, Any], vision: dict[str, Any], vocab: int = 32000) -> dict[str, Any]:
    text = shape | {"vocab_size": vocab, "projection_size": shape.get("hidden_size", 768)}
    return {"text_config": text, "vision_config": shape | vision}


def dinov2(dim: int, layers: int, heads: int, *, swiglu: bool = False) -> dict[str, Any]:
    sizes = {"hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"image_size": 518, "patch_size": 14, "use_swiglu_ffn": swiglu}


def language(cls: str, **fields: Any) -> dict[str, Any]:
    return {"architectures": [cls]} | fields


def decoder(
    dim: int, hidden: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int, **more: Any
) -> dict[str, Any]:
    """The fields of most language models."""
    sizes = {"hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers, "vocab_size": vocab}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return sizes | heads_of | {"max_position_embeddings": context} | more


def control(start: int, stop: int, pad: int | None = None) -> dict[str, Any]:
    return {"bos_token_id": start, "eos_token_id": stop} | ({} if pad is None else {"pad_token_id": pad})


def t5(dim: int, hidden: int, layers: int, heads: int, *, flan: bool) -> dict[str, Any]:
    sizes = {"d_model": dim, "d_ff": hidden, "num_layers": layers, "num_decoder_layers": layers, "num_heads": heads}
    more = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if flan else {}
    return sizes | more | {"decoder_start_token_id": 0, "n_positions": 512, "output_past": True}


def bart(architecture: str, **fields: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "forced_bos_token_id": 0} | fields


def whisper(dim: int, layers: int, heads: int, *, english: bool = False, **fields: Any) -> dict[str, Any]:
    end = 50256 if english else 50257
    stacks = {
        f"{s}_{n}": v for s in ("encoder", "decoder") for n, v in (("layers", layers), ("attention_heads", heads))
    }
    stacks |= {"encoder_ffn_dim": 4 * dim, "decoder_ffn_dim": 4 * dim, "num_hidden_layers": layers}
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": end + 1}
    old = {"forced_decoder_ids": [[1, 50259]], "suppress_tokens": [1, 2], "begin_suppress_tokens": [220, end]}
    return {"d_model": dim, "vocab_size": 51864 if english else 51865} | stacks | ids | old | fields


SMALL_BART = {f"{s}_{n}": v for s in ("encoder", "decoder") for n, v in (("layers", 6), ("attention_heads", 12))}
SMALL_BART |= {"d_model": 768, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
CLIP_336 = LARGE | {"image_size": 336, "patch_size": 14, "projection_dim": 768, "model_type": "clip_vision_model"}
SIGLIP_224 = SO400M | {"image_size": 224, "patch_size": 14, "model_type": "siglip_vision_model"}


def llava(**text: Any) -> dict[str, Any]:
    """Their configs leave much of the text's to the defaults of its family, the control tokens too."""
    parts = {"vision_config": CLIP_336 | {"vocab_size": 32000}, "text_config": text | {"vocab_size": 32064}}
    return parts | {"image_token_index": 32000, "ignore_index": -100, "tie_word_embeddings": False}


def paligemma(dim: int, text: dict[str, Any]) -> dict[str, Any]:
    vision = {"projection_dim": dim, "projector_hidden_act": "gelu_fast", "num_image_tokens": 256}
    return control(2, 1, 0) | {
        "vision_config": SIGLIP_224 | vision | {"vision_use_head": False},
        "text_config": text | {"vocab_size": 257216, "num_image_tokens": 256},
        "hidden_size": dim,
        "projection_dim": dim,
        "image_token_index": 257152,
        "ignore_index": -100,
    }


def wav2vec2_large(cls: str) -> dict[str, Any]:
    norms = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
    codes = {} if cls.endswith("CTC") else {"codevector_dim": 768, "proj_codevector_dim": 768}
    return LARGE | norms | codes | {"architectures": [cls]}


# Hub name -> system, the fields in which its published config differs from the defaults of transformers (with those
# that transformers does not know, where files have some), and how many parameters it has.
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "openai/clip-vit-base-patch32": ("clip", clip({}), 151_277_313),
    "openai/clip-vit-base-patch16": ("clip", clip({"patch_size": 16}), 149_620_737),
    "openai/clip-vit-large-patch14": ("clip", clip(LARGE | {"patch_size": 14}, 768), 427_616_513),
    "openai/clip-vit-large-patch14-336": (
        "clip",
        clip(LARGE | {"patch_size": 14, "image_size": 336}, 768),
        427_944_193,
    ),
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": ("clip", clip({}, activation="gelu", eos=49407), 151_277_313),
    "google/siglip-base-patch16-224": ("siglip", siglip({}, {}), 203_155_970),
    "google/siglip-so400m-patch14-384": (
        "siglip",
        siglip(SO400M, {"patch_size": 14, "image_size": 384}),
        877_960_498,
    ),
    "google/siglip2-base-patch16-224": ("siglip", siglip({}, {}, vocab=256000), 375_187_970),
    "google/siglip2-base-patch16-naflex": ("siglip2", siglip({}, {"num_patches": 256}, vocab=256000), 375_234_050),
    "facebook/dinov2-small": ("dinov2", dinov2(384, 12, 6), 22_056_576),
    "facebook/dinov2-base": ("dinov2", dinov2(768, 12, 12), 86_580_480),
    "facebook/dinov2-large": ("dinov2", dinov2(1024, 24, 16), 304_368_640),
    "facebook/dinov2-giant": ("dinov2", dinov2(1536, 40, 24, swiglu=True), 1_136_480_768),
    "facebook/vit-mae-base": ("mae", {}, 111_907_840),
    "google/vit-base-patch16-224": ("vit", {"id2label": {i: f"LABEL_{i}" for i in range(1000)}}, 86_567_656),
    "HuggingFaceTB/SmolLM2-135M": (
        "language",
        language(
            "LlamaForCausalLM",
            **decoder(576, 1536, 30, 9, 3, 49152, 8192, tie_word_embeddings=True, initializer_range=1 / 24),
            **control(0, 0),
            rope_theta=100000,
            rope_interleaved=False,
            is_llama_config=True,
            rms_norm_eps=1e-5,
        ),
        134_515_008,
    ),
    "meta-llama/Llama-3.2-1B": (
        "language",
        language(
            "LlamaForCausalLM",
            **decoder(2048, 8192, 16, 32, 8, 128256, 131072, tie_word_embeddings=True, head_dim=64),
            **control(128000, 128001),
            rope_theta=500000.0,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            rms_norm_eps=1e-5,
        ),
        1_235_814_400,
    ),
    "lmsys/vicuna-7b-v1.5": (
        "language",
        language(
            "LlamaForCausalLM",
            **decoder(4096, 11008, 32, 32, 32, 32000, 4096, rms_norm_eps=1e-5),
            **control(1, 2, 0),
        ),
        6_738_415_616,
    ),
    "mistralai/Mistral-7B-v0.1": (
        "language",
        language(
            "MistralForCausalLM",
            **decoder(4096, 14336, 32, 32, 8, 32000, 32768, sliding_window=4096, rms_norm_eps=1e-5, rope_theta=1e4),
        ),
        7_241_732_096,
    ),
    "Qwen/Qwen2.5-0.5B": (
        "language",
        language(
            "Qwen2ForCausalLM",
            **decoder(896, 4864, 24, 14, 2, 151936, 32768, tie_word_embeddings=True, rope_theta=1e6),
            **control(151643, 151643),
            max_window_layers=24,
            sliding_window=32768,
            use_sliding_window=False,
            use_mrope=False,
        ),
        494_032_768,
    ),
    "Qwen/Qwen3-0.6B": (
        "language",
        language(
            "Qwen3ForCausalLM",
            **decoder(1024, 3072, 28, 16, 8, 151936, 40960, tie_word_embeddings=True, rope_theta=1e6, head_dim=128),
            **control(151643, 151645),
            sliding_window=None,
        ),
        596_049_920,
    ),
    "google/gemma-2b": (
        "language",
        language("GemmaForCausalLM", **decoder(2048, 16384, 18, 8, 1, 256000, 8192, head_dim=256, hidden_act="gelu")),
        2_506_172_416,
    ),
    "google/gemma-2-2b": (
        "language",
        language("Gemma2ForCausalLM", **decoder(2304, 9216, 26, 8, 4, 256000, 8192, head_dim=256)),
        2_614_341_888,
    ),
    "google/gemma-3-1b-pt": (
        "language",
        language(
            "Gemma3ForCausalLM",
            **decoder(1152, 6912, 26, 4, 1, 262144, 32768, head_dim=256, sliding_window=512),
        ),
        999_885_952,
    ),
    "microsoft/Phi-3-mini-4k-instruct": (
        "language",
        language("Phi3ForCausalLM", **decoder(3072, 8192, 32, 32, 32, 32064, 4096, sliding_window=2047)),
        3_821_079_552,
    ),
    "facebook/opt-125m": ("language", language("OPTForCausalLM", prefix="</s>"), 125_239_296),
    "openai-community/gpt2": ("language", language("GPT2LMHeadModel", n_ctx=1024), 124_439_808),
    "google-t5/t5-small": ("t5", t5(512, 2048, 6, 8, flan=False), 60_506_624),
    "google/flan-t5-base": ("t5", t5(768, 2048, 12, 12, flan=True), 247_577_856),
    "google/flan-t5-xl": ("t5", t5(2048, 5120, 24, 32, flan=True), 2_849_757_184),
    "google/flan-t5-xxl": ("t5", t5(4096, 10240, 24, 64, flan=True), 11_135_332_352),
    "openai/whisper-tiny": ("whisper", whisper(384, 4, 6), 37_760_640),
    "openai/whisper-tiny.en": ("whisper", whisper(384, 4, 6, english=True), 37_760_256),
    "openai/whisper-base": ("whisper", whisper(512, 6, 8), 72_593_920),
    "openai/whisper-small": ("whisper", whisper(768, 12, 12), 241_734_912),
    "openai/whisper-medium": ("whisper", whisper(1024, 24, 16), 763_857_920),
    "openai/whisper-large-v2": ("whisper", whisper(1280, 32, 20), 1_543_304_960),
    "openai/whisper-large-v3": (
        "whisper",
        whisper(1280, 32, 20, num_mel_bins=128, vocab_size=51866),
        1_543_490_560,
    ),
    "openai/whisper-large-v3-turbo": (
        "whisper",
        whisper(1280, 32, 20, num_mel_bins=128, vocab_size=51866, decoder_layers=4),
        808_878_080,
    ),
    "facebook/bart-base": ("bart", bart("BartModel", **SMALL_BART), 139_420_416),
    "facebook/bart-large": ("bart", bart("BartModel"), 406_291_456),
    "facebook/bart-large-cnn": ("bart", bart("BartForConditionalGeneration", vocab_size=50264), 406_290_432),
    "google-bert/bert-base-uncased": ("bert", {}, 109_514_298),
    "google-bert/bert-base-cased": ("bert", {"vocab_size": 28996}, 108_340_804),
    "google-bert/bert-large-uncased": ("bert", LARGE, 335_174_458),
    "llava-hf/llava-1.5-7b-hf": (
        "llava",
        llava(model_type="llama", max_position_embeddings=4096, rms_norm_eps=1e-5) | {"pad_token_id": 32001},
        7_063_427_072,
    ),
    "llava-hf/llava-v1.6-mistral-7b-hf": (
        "llava_next",
        llava(
            model_type="mistral", max_position_embeddings=32768, rms_norm_eps=1e-5, sliding_window=None, rope_theta=1e6
        ),
        7_566_747_648,
    ),
    "google/paligemma-3b-pt-224": (
        "paligemma",
        paligemma(2048, decoder(2048, 16384, 18, 8, 1, 257216, 8192, model_type="gemma")),
        2_923_466_480,
    ),
    "google/paligemma2-3b-pt-224": (
        "paligemma",
        paligemma(2304, {"model_type": "gemma2"}) | {"_vocab_size": 257152},
        3_032_242_416,
    ),
    "facebook/encodec_24khz": (
        "encodec",
        {"num_filters": 32, "target_bandwidths": [1.5, 3.0, 6.0, 12.0, 24.0]},
        14_851_810,
    ),
    "facebook/encodec_48khz": (
        "encodec",
        {
            "target_bandwidths": [3.0, 6.0, 12.0, 24.0],
            "sampling_rate": 48000,
            "audio_channels": 2,
            "normalize": True,
            "chunk_length_s": 1.0,
            "overlap": 0.01,
            "use_causal_conv": False,
            "norm_type": "time_group_norm",
        },
        14_856_294,
    ),
    "facebook/encodec_32khz": (
        "encodec",
        {
            "target_bandwidths": [2.2],
            "sampling_rate": 32000,
            "num_filters": 64,
            "upsampling_ratios": [8, 5, 4, 4],
            "use_causal_conv": False,
            "codebook_size": 2048,
            "use_conv_shortcut": False,
        },
        56_884_674,
    ),
    "descript/dac_16khz": ("dac", {"downsampling_ratios": [2, 4, 5, 8], "n_codebooks": 12}, 74_141_697),
    "descript/dac_24khz": (
        "dac",
        {"downsampling_ratios": [2, 4, 5, 8], "n_codebooks": 32, "sampling_rate": 24000},
        74_653_857,
    ),
    "descript/dac_44khz": ("dac", {"sampling_rate": 44100, "quantizer_dropout": 0}, 76_620_777),
}
PUBLISHED |= {
    "facebook/wav2vec2-base": ("wav2vec2", {}, 95_044_608),
    "facebook/wav2vec2-base-960h": ("wav2vec2", {"architectures": ["Wav2Vec2ForCTC"]}, 94_396_320),
    "facebook/wav2vec2-large-lv60": ("wav2vec2", wav2vec2_large("Wav2Vec2ForPreTraining"), 317_390_592),
    "facebook/wav2vec2-large-960h-lv60-self": ("wav2vec2", wav2vec2_large("Wav2Vec2ForCTC"), 315_471_520),
}
every_checkpoint = pytest.mark.parametrize(
    "checkpoint",
    [
        pytest.param(
            name, marks=pytest.mark.proves(system, "weights: total on names and shapes of full-size checkpoints")
        )
        for name, (system, _, _) in PUBLISHED.items()
    ],
)


@functools.cache
def reference(checkpoint: str) -> Any:
    """The public implementation at full size, without memory."""
    system, fields, _ = PUBLISHED[checkpoint]
    (name,) = fields.get("architectures", [TABLE[system].resolve().reference.cls])
    return without_memory(getattr(transformers, name), fields)


def without_memory(cls: Any, fields: dict[str, Any]) -> Any:
    with skeleton():
        model = cls(cls.config_class(**fields))
    if model.config.model_type == "t5" and not fields.get("tie_word_embeddings", True):
        # transformers 5 builds it tied, whatever the config says, and loads it untied.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model


def written(fields: dict[str, Any]) -> dict[str, Any]:
    """A config as it is after a file: with names for keys, whatever they were."""
    return json.loads(json.dumps(fields))


def tensors(model: Any) -> dict[str, Tensor]:
    """Names and shapes in the file, which are not always those in memory; of tied tensors the file has the first."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    kept = {name: t for name, t in state.items() if first.setdefault(id(t), name) == name}
    return dict(transformers.core_model_loading.revert_weight_conversion(model, kept))


@every_checkpoint
def test_every_tensor_is_taken_and_every_parameter_filled(checkpoint: str) -> None:
    system, fields, count = PUBLISHED[checkpoint]
    cls, model = TABLE[system].resolve(), reference(checkpoint)
    fmt = cls.formats["hf"]
    whole, brief = model.config.to_dict(), model.config.to_diff_dict()
    # transformers 5 does not repeat what says how to generate; the published files do.
    config, same, again = (
        fmt.read(written(fields | raw))[0] for raw in (whole, brief, {"model_type": whole["model_type"]})
    )
    assert config == same == again
    with skeleton():
        ours = cls(config)
    todo = ours.plan(fmt, tensors(model))
    assert todo.problems == []
    assert todo.dropped == todo.initialised == {}
    assert {n for step in todo.steps for n in step.ours} == set(ours.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in model.parameters()) == count
    assert all(t.is_meta for t in ours.state_dict().values())
    preset = importlib.import_module(TABLE[system].module).PRESETS[checkpoint]()
    if system == "vit":  # the names of the classes are a checkpoint's affair
        assert (preset.vision, len(preset.labels)) == (config.vision, len(config.labels))
    else:
        assert preset == config


@every_checkpoint
def test_what_we_write_is_what_was_published(checkpoint: str) -> None:
    """Names and shapes of a save are those of the file, and its config gives the same model in transformers."""
    system = PUBLISHED[checkpoint][0]
    cls, model = TABLE[system].resolve(), reference(checkpoint)
    fmt = cls.formats["hf"]
    config, _ = fmt.read(written(model.config.to_dict()))
    with skeleton():
        ours = cls(config)
    raw = fmt.write(config)
    twin = without_memory(type(model), raw)
    assert fmt.read(written(raw | twin.config.to_dict()))[0] == config
    shapes = {n: t.shape for n, t in ours.to_hub(ours.state_dict()).items()}
    published = {n.replace("decoder_encoder.layer", "decoder_layers"): t.shape for n, t in tensors(model).items()}
    assert shapes == published
    assert {n: t.shape for n, t in tensors(twin).items()} == {n: t.shape for n, t in tensors(model).items()}


def test_every_system_has_a_published_checkpoint_here() -> None:
    # Their published configs are flat, or of several parts: tests/parity has them in test_qwen_vl, test_blip2,
    # test_prismatic, test_flamingo, test_openvla and test_lerobot_policies; those of pi0 and pi0.5 are in
    # tests/systems/test_pi_policies, those of painters in test_full_size_painters and test_full_size_unets.
    elsewhere = {
        "prismatic", "qwen2_vl", "qwen2_5_vl", "blip2", "blip2_qformer", "flamingo", "idefics", "pi0", "pi05",
        "openvla", "openvla_oft", "act", "diffusion_policy", "clap", "musicgen", "qwen2_audio", "chameleon", "vqgan",
        "cosmos_tokenizer", "dit", "sd3", "flux", "stable_diffusion", "sdxl", "controlnet",
        "stable_video",
    }  # fmt: skip
    # No file of others has them, or none in safetensors.
    nowhere = {
        "composed", "composed_crossed", "behaviour_cloning", "pi0_fast", "rt1", "rt2", "octo", "screen", "valle",
        "parti", "sora", "omni", "diamond", "iris",
    }  # fmt: skip
    assert {system for system, _, _ in PUBLISHED.values()} | elsewhere | nowhere == set(TABLE)


QWEN: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"], "attn_dropout_prob": 0.0, "bf16": False, "emb_dropout_prob": 0.0,
    "fp16": False, "fp32": False, "hidden_size": 4096, "intermediate_size": 22016, "initializer_range": 0.02,
    "kv_channels": 128, "layer_norm_epsilon": 1e-06, "max_position_embeddings": 8192, "model_type": "qwen",
    "no_bias": True, "num_attention_heads": 32, "num_hidden_layers": 32, "onnx_safe": None, "rotary_emb_base": 10000,
    "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 8192, "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer", "transformers_version": "4.32.0", "use_cache": True, "use_dynamic_ntk": True,
    "use_flash_attn": "auto", "use_logn_attn": True, "vocab_size": 151936,
}  # fmt: skip


@pytest.mark.proves("language", "weights: total on names and shapes of full-size checkpoints")
def test_the_first_qwen() -> None:
    """Qwen/Qwen-7B, which transformers has no class for."""
    module = importlib.import_module(TABLE["language"].module)
    config = module.read_hf(QWEN)[0]
    assert config == module.PRESETS["Qwen/Qwen-7B"]()
    assert module.read_hf(module.write_hf(config))[0] == config
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("transformer.wte.weight", "lm_head.weight"), (151936, 4096))
    shapes["transformer.ln_f.weight"] = (4096,)
    for i in range(32):
        layer = {"ln_1.weight": (4096,), "ln_2.weight": (4096,), "attn.c_attn.bias": (3 * 4096,)}
        layer |= {"attn.c_attn.weight": (3 * 4096, 4096), "attn.c_proj.weight": (4096, 4096)}
        layer |= {"mlp.w1.weight": (11008, 4096), "mlp.w2.weight": (11008, 4096), "mlp.c_proj.weight": (4096, 11008)}
        shapes |= {f"transformer.h.{i}.{name}": shape for name, shape in layer.items()}
    with skeleton():
        ours = TABLE["language"].resolve()(config)
    todo = ours.plan(ours.formats["hf"], {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert todo.problems == []
    assert todo.dropped == todo.initialised == {}
    assert sum(p.numel() for p in ours.parameters()) == 7_721_324_544
    assert {name: tuple(t.shape) for name, t in ours.to_hub(ours.state_dict()).items()} == shapes


@pytest.mark.proves("clip", "weights: the oldest published files")
def test_clip_files_of_2021() -> None:
    """OpenAI's own files on the Hub: a buffer of positions a tower, and configs with every default spelled out."""
    cls = TABLE["clip"].resolve()
    fmt, model = cls.formats["hf"], reference("openai/clip-vit-base-patch32")
    generation = {"bad_words_ids": None, "num_beams": 1, "top_k": 50, "torch_dtype": None, "pruned_heads": {}}
    text = {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1, "dropout": 0.0, "projection_dim": 512}
    vision = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None, "dropout": 0.0, "projection_dim": 512}
    raw = {
        "model_type": "clip",
        "projection_dim": 512,
        "logit_scale_init_value": 2.6592,
        "text_config": generation | text,
        "text_config_dict": None,
        "vision_config": generation | vision,
        "vision_config_dict": None,
    }
    config, _ = fmt.read(raw)
    assert config.eot_id == 49407
    with skeleton():
        ours = cls(config)
    old = tensors(model)
    old["text_model.embeddings.position_ids"] = torch.empty(1, 77, dtype=torch.int64, device="meta")
    old["vision_model.embeddings.position_ids"] = torch.empty(1, 50, dtype=torch.int64, device="meta")
    todo = ours.plan(fmt, old)
    assert todo.problems == []
    assert len(todo.dropped) == 2
