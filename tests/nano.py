"""A config of each system of the table that builds and trains in milliseconds, for tests of all systems alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

import polymodal
from polymodal.backbones.adaptive_unet import AdaptiveUNetConfig
from polymodal.backbones.bert import BertConfig
from polymodal.backbones.conditioned import ConditionedConfig
from polymodal.backbones.controlnet import ControlConfig
from polymodal.backbones.decoder import AttentionConfig, DecoderConfig, Gated, Learned, Plain
from polymodal.backbones.detr import DetrConfig
from polymodal.backbones.dit import DiTBackboneConfig
from polymodal.backbones.encdec import CrossDecoderConfig, EncDecConfig, RelativeBias, StackConfig, Unbiased
from polymodal.backbones.experts import ExpertConfig
from polymodal.backbones.families import ControlIds
from polymodal.backbones.levels import LevelConfig
from polymodal.backbones.mmdit import CentreCrop, MMDiTConfig
from polymodal.backbones.readouts import ReadoutConfig
from polymodal.backbones.steps import StepDecoderConfig
from polymodal.backbones.unet import Added, Level, Transformers, UNetConfig
from polymodal.backbones.unet1d import UNet1dConfig
from polymodal.backbones.unet_film import FilmUNetConfig
from polymodal.connectors.gated import GatedConfig
from polymodal.connectors.grid import PixelShuffle
from polymodal.connectors.mlp import MLP, Linear
from polymodal.connectors.qformer import QFormerConfig, TextTables
from polymodal.connectors.resampler import ResamplerConfig
from polymodal.connectors.token_learner import TokenLearnerConfig
from polymodal.core.batch import Batch
from polymodal.encoders.clip_text import CLIPTextConfig
from polymodal.encoders.efficientnet import EfficientNetConfig
from polymodal.encoders.htsat import HTSATConfig
from polymodal.encoders.qwen_vision import QwenVisionConfig, Windows
from polymodal.encoders.resnet import ResNetConfig
from polymodal.encoders.seanet import SEANetConfig
from polymodal.encoders.small_stem import SmallStemConfig
from polymodal.encoders.text import TextConfig
from polymodal.encoders.trunk import PixelTrunk
from polymodal.encoders.vit import ViTConfig
from polymodal.encoders.wav2vec2 import Wav2Vec2TowerConfig
from polymodal.encoders.whisper import WhisperEncoderConfig
from polymodal.heads.distillation import DistillationConfig
from polymodal.heads.reconstruction import PatchDecoderConfig
from polymodal.heads.score import ScoreConfig
from polymodal.heads.speech_codes import SpeechCodesConfig
from polymodal.modalities.tiles import Grid
from polymodal.nn.norm import RMS, AdaptiveRMS, Heads, Layer, OffsetRMS
from polymodal.nn.rope import AxialRope, Rope
from polymodal.nn.spans import Spans
from polymodal.samplers.flow import Dynamic, Flow
from polymodal.systems import TABLE
from polymodal.systems.act import ACTConfig
from polymodal.systems.bart import BARTConfig
from polymodal.systems.base import System
from polymodal.systems.behaviour import BehaviourConfig
from polymodal.systems.bert import BERTConfig
from polymodal.systems.blip2 import BLIP2Config
from polymodal.systems.blip2_qformer import BLIP2QFormerConfig
from polymodal.systems.chameleon_files import ChameleonConfig
from polymodal.systems.clap_files import CLAPConfig
from polymodal.systems.clip import CLIPConfig
from polymodal.systems.composed import ComposedConfig
from polymodal.systems.composed_crossed import ComposedCrossedConfig
from polymodal.systems.controlnet import ControlNetConfig
from polymodal.systems.cosmos_tokenizer import CosmosTokenizerConfig
from polymodal.systems.dac import DACConfig
from polymodal.systems.diamond import DiamondConfig
from polymodal.systems.diffusion_policy import DiffusionPolicyConfig
from polymodal.systems.dinov2 import DINOv2Config
from polymodal.systems.dit import DiTConfig
from polymodal.systems.flamingo import FlamingoConfig
from polymodal.systems.flux import FluxConfig
from polymodal.systems.idefics import IdeficsConfig
from polymodal.systems.iris import IrisConfig
from polymodal.systems.language import LanguageModelConfig
from polymodal.systems.llava import LlavaConfig
from polymodal.systems.llava_next import LlavaNextConfig
from polymodal.systems.mae import MAEConfig
from polymodal.systems.musicgen import MusicGenConfig
from polymodal.systems.octo import OctoConfig
from polymodal.systems.omni import OmniConfig
from polymodal.systems.openvla import OpenVLAConfig
from polymodal.systems.openvla_oft import OpenVLAOFTConfig
from polymodal.systems.paligemma import PaliGemmaConfig
from polymodal.systems.parti import PartiConfig
from polymodal.systems.pi0 import PI0Config
from polymodal.systems.pi0_fast import PI0FastConfig
from polymodal.systems.pi05 import PI05Config
from polymodal.systems.prismatic import PrismaticConfig
from polymodal.systems.qwen2_5_vl import Qwen2_5VLConfig
from polymodal.systems.qwen2_audio import Qwen2AudioConfig
from polymodal.systems.qwen2_vl import Qwen2VLConfig
from polymodal.systems.rt1 import RT1Config
from polymodal.systems.rt2 import RT2Config
from polymodal.systems.screen import ScreenConfig
from polymodal.systems.sd3 import SD3Config
from polymodal.systems.sdxl import SDXLConfig
from polymodal.systems.seanet_codec import EnCodecConfig
from polymodal.systems.siglip import SigLIPConfig
from polymodal.systems.siglip2 import NaFlexConfig, SigLIP2Config
from polymodal.systems.sora import SoraConfig
from polymodal.systems.stable_diffusion_files import StableDiffusionConfig
from polymodal.systems.stable_video import StableVideoConfig
from polymodal.systems.t5 import T5Config
from polymodal.systems.valle import VALLEConfig
from polymodal.systems.vit import VisionTransformerConfig
from polymodal.systems.wav2vec2_files import Wav2Vec2Config
from polymodal.systems.whisper import WhisperConfig
from polymodal.tokenizers.cosmos import CosmosNetConfig
from polymodal.tokenizers.film_vae import FilmPyramidConfig
from polymodal.tokenizers.pyramid import PyramidConfig
from polymodal.tokenizers.vae import VAEConfig
from polymodal.tokenizers.vq import LearnedCodes, VQConfig

M = TypeVar("M", bound=nn.Module)
SHAPE: dict[str, Any] = {"dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 64}
TOWER: dict[str, Any] = SHAPE | {"image_size": 16, "patch_size": 4}
TEXT: dict[str, Any] = SHAPE | {"vocab_size": 40, "context": 8}

NANO: dict[str, Any] = {
    "vit": VisionTransformerConfig(vision=ViTConfig(**TOWER), labels=("a", "b", "c")),
    "mae": MAEConfig(vision=ViTConfig(**TOWER), decoder=PatchDecoderConfig(**SHAPE)),
    "dinov2": DINOv2Config(
        vision=ViTConfig(**TOWER, layer_scale=1.0, mask_token=True),
        objective=DistillationConfig(
            global_size=16,
            local_size=8,
            num_locals=2,
            num_prototypes=24,
            hidden_dim=32,
            bottleneck_dim=16,
            ibot_bottleneck_dim=16,
        ),
    ),
    "clip": CLIPConfig(
        vision=ViTConfig(**TOWER, activation="quick_gelu", patch_bias=False, pre_norm=True),
        text=TextConfig(**TEXT),
        embed_dim=24,
        eot_id=39,
    ),
    "siglip": SigLIPConfig(vision=ViTConfig(**TOWER, class_token=False), text=TextConfig(**TEXT, causal=False)),
    "siglip2": SigLIP2Config(
        vision=NaFlexConfig(**SHAPE, patch_size=4, num_patches=16), text=TextConfig(**TEXT, causal=False)
    ),
}

DECODER = DecoderConfig(
    vocab_size=40,
    context=96,
    dim=32,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    mlp=Gated(hidden_dim=64),
    norm=RMS(),
    position=Rope(),
)
_CLIP_TOWER = ViTConfig(**TOWER, activation="quick_gelu", norm_eps=1e-5, patch_bias=False, pre_norm=True)
PATCHES: dict[str, Any] = {
    "vision_family": "siglip_vision_model",
    "vision": ViTConfig(**TOWER, class_token=False, activation="gelu_tanh"),
    "layers": 2,
    "image_id": 39,
    "control": ControlIds(start=1, stop=(2,), pad=0),
}
CLIP_PATCHES: dict[str, Any] = {"vision_family": "clip_vision_model", "vision": _CLIP_TOWER}
NANO |= {
    "language": LanguageModelConfig(family="llama", backbone=DECODER, control=PATCHES["control"]),
    "llava": LlavaConfig(**PATCHES | CLIP_PATCHES, connector=MLP(), family="llama", backbone=DECODER),
    "llava_next": LlavaNextConfig(
        **PATCHES | CLIP_PATCHES, connector=MLP(), family="llama", backbone=DECODER, grids=(Grid(16, 32), Grid(32, 16))
    ),
    "paligemma": PaliGemmaConfig(
        **PATCHES,
        connector=Linear(),
        family="gemma",
        backbone=replace(
            DECODER, norm=OffsetRMS(), tied=True, embed_scale=32**0.5, mlp=Gated(hidden_dim=64, activation="gelu_tanh")
        ),
    ),
}
NANO["prismatic"] = PrismaticConfig(
    vision_id="dinosiglip-vit-so-224px",
    towers=(
        ViTConfig(**TOWER, num_registers=4, class_position=False, layer_scale=1e-5),
        ViTConfig(**TOWER, class_token=False),
    ),
    language_id="llama2-7b-pure",
    family="llama",
    backbone=DECODER,
    control=PATCHES["control"],
)

_T5 = StackConfig(num_layers=2, num_heads=4, head_dim=8, mlp=Unbiased(hidden_dim=64), scale=1.0)
_BART = StackConfig(num_layers=2, num_heads=4, head_dim=8, mlp=Plain(hidden_dim=64), bias=True)
NANO |= {
    "t5": T5Config(
        backbone=EncDecConfig(
            vocab_size=40,
            dim=32,
            encoder=_T5,
            decoder=_T5,
            norm=RMS(),
            position=RelativeBias(),
            post_norm=False,
            start_id=0,
            pad_id=0,
            logit_scale=32**-0.5,
        )
    ),
    "bart": BARTConfig(
        backbone=EncDecConfig(
            vocab_size=40,
            dim=32,
            encoder=_BART,
            decoder=_BART,
            norm=Layer(),
            position=Learned(count=16, offset=2),
            post_norm=True,
            start_id=2,
            pad_id=1,
            fixed_id=1,
            logit_bias=True,
        )
    ),
    "bert": BERTConfig(text=BertConfig(**SHAPE, vocab_size=40, context=16)),
}


_MROPE: dict[str, Any] = {
    "backbone": replace(
        DECODER, position=Rope(sections=(2, 1, 1)), attention=replace(DECODER.attention, qkv_bias=True)
    ),
    "image_id": 36, "video_id": 37, "start_id": 38, "end_id": 39, "control": PATCHES["control"],
}  # fmt: skip
NANO |= {
    "qwen2_vl": Qwen2VLConfig(
        vision=QwenVisionConfig(**SHAPE, patch_size=4, activation="quick_gelu", norm=Layer(eps=1e-6)), **_MROPE
    ),
    "qwen2_5_vl": Qwen2_5VLConfig(
        vision=QwenVisionConfig(
            **SHAPE, patch_size=4, activation="swiglu", norm=RMS(), windows=Windows(size=16, full=(1,))
        ),
        **_MROPE,
    ),
}
_QFORMER: dict[str, Any] = {"num_queries": 4, "dim": 32, "num_layers": 3, "num_heads": 4, "hidden_dim": 64}
NANO |= {
    "blip2": BLIP2Config(
        vision=ViTConfig(**TOWER),
        qformer=QFormerConfig(**_QFORMER),
        family="opt",
        image_id=39,
        control=PATCHES["control"],
        # At the usual deviation a frozen random language model can hardly be steered.
        backbone=replace(
            DECODER,
            tied=True,
            std=0.2,
            attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=8, qkv_bias=True, out_bias=True),
            mlp=Plain(hidden_dim=64, activation="relu"),
            norm=Layer(),
            position=Learned(count=96, offset=2),
        ),
    ),
    "blip2_qformer": BLIP2QFormerConfig(
        vision=ViTConfig(**TOWER),
        embed_dim=24,
        qformer=QFormerConfig(**_QFORMER, text=TextTables(vocab_size=40, context=12)),
    ),
}
_LATENTS: dict[str, Any] = {"num_latents": 4, "num_layers": 2, "num_heads": 2, "head_dim": 8}
NANO |= {
    "flamingo": FlamingoConfig(
        vision=_CLIP_TOWER,
        resampler=ResamplerConfig(**_LATENTS),
        gated=GatedConfig(num_heads=2, head_dim=8, hidden_dim=128),
        family="llama",
        backbone=replace(DECODER, vocab_size=38, std=0.5),
        new_tokens=2,
        chunk_id=38,
        image_id=39,
        control=PATCHES["control"],
    ),
    "idefics": IdeficsConfig(
        vision=_CLIP_TOWER,
        resampler=ResamplerConfig(**_LATENTS, activation="relu", qk_norm=True),
        gated=GatedConfig(num_heads=4, head_dim=8, hidden_dim=64, mlp="swiglu", norm=RMS(), qk_norm=RMS()),
        backbone=replace(DECODER, vocab_size=38, attention=replace(DECODER.attention, num_kv_heads=4)),
        new_tokens=2,
        image_id=39,
        every=2,
        control=PATCHES["control"],
    ),
}
NANO |= {
    "composed": ComposedConfig(
        vision=ViTConfig(**TOWER, num_registers=2),
        connector=PixelShuffle(),
        backbone=replace(DECODER, vocab_size=39),
        image_id=39,
        layers=1,
        control=PATCHES["control"],
    ),
    "composed_crossed": ComposedCrossedConfig(
        vision=PATCHES["vision"],
        resampler=None,
        gated=GatedConfig(num_heads=2, head_dim=8, hidden_dim=256),
        backbone=replace(DECODER, vocab_size=39, std=0.3),
        new_tokens=1,
        image_id=39,
        control=PATCHES["control"],
    ),
}
_RESNET: dict[str, Any] = {"depths": (1, 1, 1, 1), "widths": (16, 16, 32, 32)}
NANO["act"] = ACTConfig(
    cameras=("top", "wrist"),
    image_height=64,
    image_width=96,
    state_width=3,
    action_width=5,
    horizon=6,
    vision=ResNetConfig(**_RESNET),
    transformer=DetrConfig(dim=32, num_heads=4, hidden_dim=64, dropout=0.0),
    num_encoder_layers=1,
    num_style_layers=1,
    latent_dim=4,
)
NANO["diffusion_policy"] = DiffusionPolicyConfig(
    cameras=("front", "wrist"),
    image_height=40,
    image_width=56,
    state_width=3,
    action_width=5,
    horizon=8,
    vision=ResNetConfig(**_RESNET, norm="group"),
    keypoints=4,
    crop=(36, 50),
    backbone=UNet1dConfig(widths=(16, 32), kernel_size=3, step_dim=16),
    steps=20,
    taken=20,
)
NANO["behaviour_cloning"] = BehaviourConfig(
    trunk=PixelTrunk(
        cameras=("front", "wrist"), image_size=16, channels=16, keypoints=8, state_width=3, dim=32, num_layers=1
    ),
    words=("blue", "cup", "put", "red", "the"),
    horizon=4,
    action_width=5,
    text_dim=32,
    context=8,
)
NANO["screen"] = ScreenConfig(
    words=("blue", "cup", "put", "red", "the"), height=48, width=32, channels=16, dim=32, num_layers=1, context=8,
    kinds=2, placed=(0,), typed=1, characters=4,
)  # fmt: skip
NANO["rt1"] = RT1Config(
    vision=EfficientNetConfig(width=0.25, depth=0.25, resolution=64, padding="open"),
    connector=TokenLearnerConfig(num_tokens=2, hidden_dim=8),
    backbone=StepDecoderConfig(dim=32, num_layers=2, num_heads=2, head_dim=24),
    words=("blue", "cup", "put", "red", "the"),
    context=4,
    text_dim=32,
    history=2,
    action_width=3,
    vocab_size=16,
)
NANO |= {
    "rt2": RT2Config(**vars(NANO["paligemma"]), action_dim=3),
    "openvla": OpenVLAConfig(**vars(NANO["prismatic"]), action_dim=3, num_bins=16, padding=0, empty_id=None),
    "openvla_oft": OpenVLAOFTConfig(
        **vars(NANO["prismatic"]), action_dim=3, horizon=2, state_dim=4, film=True, empty_id=None
    ),
}
_PI: dict[str, Any] = {
    "vision": PATCHES["vision"],
    "family": "gemma",
    "backbone": replace(NANO["paligemma"].backbone, vocab_size=39),
    "image_id": 39,
    "control": PATCHES["control"],
    "cameras": ("front", "wrist"),
    "horizon": 4,
    "action_width": 5,
    "state_width": 3,
    "prompt": 32,
}
_EXPERT: dict[str, Any] = {"dim": 16, "mlp": Gated(hidden_dim=32, activation="gelu_tanh")}
NANO |= {
    "pi0": PI0Config(**_PI, expert=ExpertConfig(**_EXPERT)),
    "pi0_fast": PI0FastConfig(
        **vars(NANO["paligemma"])
        | {"backbone": replace(NANO["paligemma"].backbone, vocab_size=160, context=512), "image_id": 159},
        action_id=150,
        cameras=("front", "wrist"),
        horizon=4,
        action_width=3,
        state_width=2,
    ),
    "pi05": PI05Config(**_PI, expert=ExpertConfig(**_EXPERT, norm=AdaptiveRMS())),
}
NANO["octo"] = OctoConfig(
    cameras=("front", "wrist"),
    image_size=16,
    vision=SmallStemConfig(channels=(64, 64), dim=24),
    text=_T5,
    vocab_size=40,
    text_dim=32,
    context=8,
    horizon=3,
    action_width=4,
    backbone=ReadoutConfig(**SHAPE),
    head=ScoreConfig(hidden_dim=16, num_layers=1, time_dim=8),
)

NANO["encodec"] = EnCodecConfig(
    sample_rate=600,
    bandwidths=(0.3, 0.6, 1.2),
    seanet=SEANetConfig(dim=8, filters=6, ratios=(4, 2), num_lstm_layers=1),
    codebook_size=16,
)
NANO["dac"] = DACConfig(
    sample_rate=1200, dim=4, decoder_dim=24, ratios=(2, 4), num_codebooks=3, codebook_size=16, codebook_dim=4
)


NANO["whisper"] = WhisperConfig(
    encoder=WhisperEncoderConfig(**SHAPE, num_mels=16, positions=50),
    backbone=CrossDecoderConfig(
        vocab_size=40,
        dim=32,
        decoder=replace(_BART, key_bias=False),
        norm=Layer(),
        position=Learned(count=48),
        post_norm=False,
        start_id=31,
        pad_id=30,
        fixed_id=30,
    ),
)


NANO["musicgen"] = MusicGenConfig(
    text=EncDecConfig(
        vocab_size=40, dim=32, encoder=_T5, decoder=_T5, norm=RMS(), position=RelativeBias(), post_norm=False,
        start_id=0, pad_id=0, logit_scale=32**-0.5,
    ),
    backbone=ConditionedConfig(
        dim=24, stack=StackConfig(num_layers=2, num_heads=3, head_dim=8, mlp=Unbiased(hidden_dim=48, activation="gelu"))
    ),
    codec=EnCodecConfig(
        sample_rate=800, bandwidths=(2.0,), codebook_size=32, seanet=SEANetConfig(dim=12, filters=4, ratios=(4, 2))
    ),
)  # fmt: skip


NANO["wav2vec2"] = Wav2Vec2Config(
    audio=Wav2Vec2TowerConfig(
        **SHAPE, conv_dims=(16, 24), conv_kernels=(4, 3), conv_strides=(3, 2), position_kernel=4, position_groups=4
    ),
    head=SpeechCodesConfig(num_codes=6, code_dim=8, proj_dim=12, num_negatives=5),
    times=Spans(share=0.5, length=2),
)


NANO["qwen2_audio"] = Qwen2AudioConfig(
    audio=WhisperEncoderConfig(**SHAPE, num_mels=16, positions=50),
    backbone=replace(DECODER, attention=replace(DECODER.attention, qkv_bias=True)),
    audio_id=39,
    control=PATCHES["control"],
)


NANO["clap"] = CLAPConfig(
    audio=HTSATConfig(num_mels=8, spec_size=32, dim=16, depths=(2, 2), num_heads=(2, 4), window=4, fusion=2),
    text=BertConfig(**TEXT, num_types=1, offset=2),
    embed_dim=24,
)  # fmt: skip


NANO["valle"] = VALLEConfig(
    symbols=(" ", "a", "b", "d", "e", "o", "t"),
    first=NANO["musicgen"].backbone,
    rest=LevelConfig(**SHAPE),
    codec=NANO["musicgen"].codec,
    prompt_seconds=0.05,
)


NANO["vqgan"] = VQConfig(
    net=PyramidConfig(widths=(32, 32), num_blocks=1, latent_dim=16),
    codes=LearnedCodes(size=32, dim=8, commitment=1.0, codebook=0.25),
    resolution=16,
)


_PROMPT = CLIPTextConfig(tower=TextConfig(**TEXT, activation="quick_gelu"), eot_id=39)
_LATENT = VAEConfig(pyramid=PyramidConfig(widths=(8, 16), num_blocks=1, latent_dim=4, groups=4))
_CROSSED = Transformers(num_heads=2)
NANO["stable_diffusion"] = StableDiffusionConfig(
    text=_PROMPT,
    backbone=UNetConfig(
        levels=(Level(dim=32, transformers=_CROSSED), Level(dim=32)), middle=_CROSSED, context_dim=32, num_blocks=1,
        groups=4, side=8, convolved=True,
    ),
    vae=_LATENT,
)  # fmt: skip
NANO["controlnet"] = ControlNetConfig(
    base=NANO["stable_diffusion"],
    control=ControlConfig(widths=(8, 16)),
)
NANO["sdxl"] = SDXLConfig(
    text=_PROMPT,
    text_2=replace(_PROMPT, embed_dim=24),
    backbone=UNetConfig(
        levels=(Level(dim=32), Level(dim=32, transformers=_CROSSED)), middle=_CROSSED, context_dim=64, num_blocks=1,
        groups=4, side=8, added=Added(dim=24 + 6 * 8, waves=8),
    ),
    vae=_LATENT,
)  # fmt: skip


NANO["chameleon"] = ChameleonConfig(
    backbone=replace(DECODER, vocab_size=80, attention=replace(DECODER.attention, qk_norm=Heads())),
    vision=replace(NANO["vqgan"], resolution=8),
    code_ids=tuple(range(71, 39, -1)),
    image_id=80,
    start_id=72,
    end_id=73,
    turn_id=74,
    control=ControlIds(start=1, stop=(2,)),
)


NANO["omni"] = OmniConfig(
    backbone=replace(NANO["chameleon"].backbone, vocab_size=40 + 5 + 32 + 3 * 16),
    vision=NANO["chameleon"].vision,
    codec=replace(NANO["encodec"], bandwidths=(0.6, 0.9)),
    words=40,
    control=ControlIds(start=1, stop=(2,)),
    audio_weight=0.5,
)


_DRAWN = replace(_LATENT, mixed=False, shift=0.1)
_WORDS = NANO["musicgen"].text
NANO["dit"] = DiTConfig(
    backbone=DiTBackboneConfig(
        latent_size=8, dim=32, num_layers=2, num_heads=4, hidden_dim=128, num_classes=5, wave_gap=1
    ),
    vae=_LATENT,
)
_JOINT = MMDiTConfig(
    values=16, out_values=16, dim=32, num_layers=2, num_heads=4, hidden_dim=128, context_dim=32, pooled_dim=32,
    position=AxialRope(dims=(2, 2, 4)), num_single_layers=1, qk_norm=RMS(), guidance=True,
)  # fmt: skip
NANO["flux"] = FluxConfig(
    clip=_PROMPT, t5=_WORDS, backbone=_JOINT, vae=_DRAWN, sampling=Flow(shift=Dynamic(), spacing="even"), t5_tokens=6,
    side=4,
)  # fmt: skip
NANO["sd3"] = SD3Config(
    clip=replace(_PROMPT, embed_dim=10), clip_large=replace(_PROMPT, embed_dim=14),
    t5=replace(_WORDS, dim=72, logit_scale=72**-0.5),
    backbone=replace(
        _JOINT, position=CentreCrop(side=8, base=4), context_dim=72, pooled_dim=24, num_single_layers=0,
        extra_attention=1, guidance=False,
    ),
    vae=_DRAWN, sampling=Flow(shift=3.0), t5_tokens=6, side=4,
)  # fmt: skip


NANO["parti"] = PartiConfig(
    backbone=EncDecConfig(
        vocab_size=33, dim=32, encoder=replace(_BART, num_layers=1), decoder=_BART, norm=Layer(),
        position=Learned(count=16), post_norm=False, start_id=32, pad_id=32, tied=False,
    ),
    vision=NANO["chameleon"].vision,
    text_vocab_size=40,
    text_context=12,
)  # fmt: skip


NANO["cosmos_tokenizer"] = CosmosTokenizerConfig(
    net=CosmosNetConfig(
        latent_dim=4, encoder_widths=(8, 8, 12, 12), decoder_widths=(8, 8, 12, 12), num_blocks=1, attention=(2,),
        resolution=16,
    ),
)  # fmt: skip


NANO["stable_video"] = StableVideoConfig(
    vision=NANO["clip"].vision,
    embed_dim=24,
    backbone=FilmUNetConfig(
        levels=(Level(dim=32, transformers=_CROSSED), Level(dim=32)), middle=_CROSSED, context_dim=24, num_blocks=1,
        in_channels=8, side=12, added=Added(dim=24, waves=8), frames=2,
    ),
    vae=VAEConfig(pyramid=FilmPyramidConfig(widths=(32, 32), latent_dim=4)),
)  # fmt: skip


NANO["sora"] = SoraConfig(
    text=_WORDS, backbone=replace(_JOINT, position=AxialRope(dims=(4, 2, 2)), guidance=False), side=16, frames=5,
    vae=replace(NANO["cosmos_tokenizer"].net, time=4), text_tokens=12,
)  # fmt: skip


NANO["diamond"] = DiamondConfig(
    backbone=AdaptiveUNetConfig(
        in_channels=9, widths=(16, 24), blocks=(1, 1), attention=(1,), condition_dim=32, group=8
    ),
    action_scale=(0.5, 0.5, 1.0), width=18, height=12, history=2,
)  # fmt: skip
NANO["iris"] = IrisConfig(
    vision=replace(NANO["vqgan"], net=replace(NANO["vqgan"].net, widths=(16, 16, 16), groups=8), resolution=8),
    backbone=replace(DECODER, vocab_size=32, context=4 * 5, position=Rope(sections=(2, 1, 1))),
    action_scale=(0.5, 0.5, 1.0), moments=4,
)  # fmt: skip


def shaken(model: M, std: float = 0.1) -> M:
    """With noise on every weight, so that nothing stays zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model


def every_system(claim: str, kind: type[System] = System, *, referenced: bool = False) -> pytest.MarkDecorator:
    """Runs a test once for each system of a kind, as ``name``, a proof of ``claim`` for that system.

    ``referenced`` leaves out those whose `reference` no public class is: their own tests hold their files to account.
    """
    names = [name for name in NANO if issubclass(TABLE[name].resolve(), kind)]
    names = [name for name in names if not referenced or TABLE[name].resolve().reference is not None]
    cases = [pytest.param(name, marks=pytest.mark.proves(name, claim), id=name) for name in names]
    return pytest.mark.parametrize("name", cases)


def nano(name: str, seed: int = 0) -> System:
    """A system of this name at nano size, initialised as its paper says."""
    torch.manual_seed(seed)
    return polymodal.build(NANO[name])


def nano_batch(model: System, size: int = 6, seed: int = 0) -> Batch:
    """Random inputs for `loss`, as the system's spec asks for them."""
    generator = torch.Generator().manual_seed(seed)
    return Batch({key: spec.random(size, generator) for key, spec in model.inputs_spec().items()})
