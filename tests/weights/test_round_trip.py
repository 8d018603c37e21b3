"""A file, our system, a file again: equal in names, shapes and values, and the reference implementation reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import polymodal
from polymodal.systems import TABLE
from polymodal.weights.files import write_shards
from tests.nano import every_system, nano
from tests.parity.harness import randomise
from tests.parity.test_blip2 import OPT
from tests.parity.test_blip2 import config as blip2_config
from tests.parity.test_clap import AUDIO as CLAP_AUDIO
from tests.parity.test_clap import FUSED
from tests.parity.test_clap import TEXT as CLAP_TEXT
from tests.parity.test_codecs import DAC_FIELDS as DAC
from tests.parity.test_codecs import ENCODEC
from tests.parity.test_qwen2_audio import FIELDS as QWEN2_AUDIO
from tests.parity.test_qwen_vl import CASES as QWEN
from tests.parity.test_qwen_vl import IDS as QWEN_IDS
from tests.parity.test_wav2vec2 import SHAPE as WAV2VEC2

transformers = pytest.importorskip("transformers")

TOWER: dict[str, Any] = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 56,
}  # fmt: skip
IMAGE = {"image_size": 20, "patch_size": 4}
TEXT = TOWER | {"vocab_size": 50, "max_position_embeddings": 12}
DECODER = {f"decoder_{field}": value for field, value in TOWER.items()}
LANGUAGE = TOWER | {"vocab_size": 50, "max_position_embeddings": 64, "num_key_value_heads": 2}


def clip() -> Any:
    text = TEXT | {"hidden_size": 24, "eos_token_id": 49, "bos_token_id": 48}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=TOWER | IMAGE, projection_dim=16)
    )


def siglip() -> Any:
    text = TEXT | {"projection_size": 32}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=TOWER | IMAGE))


def siglip2() -> Any:
    text, vision = TEXT | {"projection_size": 32}, TOWER | {"num_patches": 16, "patch_size": 4}
    return transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**TOWER, **IMAGE, num_labels=7))


def mae() -> Any:
    return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**TOWER, **IMAGE, **DECODER))


def dinov2() -> Any:
    fields = TOWER | IMAGE | {"mlp_ratio": 2}
    del fields["intermediate_size"]
    return transformers.Dinov2Model(transformers.Dinov2Config(**fields))


def language() -> Any:
    """One family; tests/parity/test_language_models.py has them all."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LANGUAGE))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, vocab_size=50))


def bart() -> Any:
    sizes = {"layers": 2, "attention_heads": 4, "ffn_dim": 56}
    stacks = {f"{stack}_{field}": value for stack in ("encoder", "decoder") for field, value in sizes.items()}
    config = transformers.BartConfig(**stacks, d_model=32, vocab_size=50, max_position_embeddings=12)
    return transformers.BartForConditionalGeneration(config)


def whisper() -> Any:
    sizes = {"layers": 2, "attention_heads": 4, "ffn_dim": 56}
    stacks = {f"{stack}_{field}": value for stack in ("encoder", "decoder") for field, value in sizes.items()}
    ids = {"decoder_start_token_id": 41, "pad_token_id": 40, "bos_token_id": 40, "eos_token_id": 40}
    more = {"num_mel_bins": 8, "max_source_positions": 50, "max_target_positions": 20}
    config = transformers.WhisperConfig(**stacks, **ids, **more, d_model=32, vocab_size=50)
    return transformers.WhisperForConditionalGeneration(config)


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT))


def tower_and(language: str, **vision: Any) -> dict[str, Any]:
    """A CLIP tower unless ``vision`` names another, and a language model whose last token stands for pictures."""
    return {
        "vision_config": TOWER | IMAGE | {"model_type": "clip_vision_model"} | vision,
        "text_config": LANGUAGE | {"model_type": language, "head_dim": 8},
        "image_token_index": 49,
    }


def llava() -> Any:
    config = transformers.LlavaConfig(**tower_and("llama"), image_seq_length=25)
    return transformers.LlavaForConditionalGeneration(config)


def llava_next() -> Any:
    grids = [[20, 40], [40, 20]]
    config = transformers.LlavaNextConfig(**tower_and("mistral"), image_seq_length=25, image_grid_pinpoints=grids)
    return transformers.LlavaNextForConditionalGeneration(config)


def paligemma() -> Any:
    parts = tower_and("gemma", model_type="siglip_vision_model", vision_use_head=False)
    return transformers.PaliGemmaForConditionalGeneration(transformers.PaliGemmaConfig(**parts, projection_dim=32))


def qwen(case: str) -> Any:
    _, name, fields = QWEN[case]
    config = getattr(transformers, f"{name}Config")(**fields, **QWEN_IDS)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def blip2() -> Any:
    return transformers.Blip2ForConditionalGeneration(blip2_config(OPT))


def blip2_qformer() -> Any:
    return transformers.Blip2ForImageTextRetrieval(blip2_config({}, use_qformer_text_input=True))


def encodec() -> Any:
    return transformers.EncodecModel(transformers.EncodecConfig(**ENCODEC))


def dac() -> Any:
    return transformers.DacModel(transformers.DacConfig(**DAC))


def wav2vec2() -> Any:
    return transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**WAV2VEC2))


def clap() -> Any:
    config = transformers.ClapConfig(audio_config=CLAP_AUDIO | FUSED, text_config=CLAP_TEXT, projection_dim=20)
    return transformers.ClapModel(config)


def qwen2_audio() -> Any:
    return transformers.Qwen2AudioForConditionalGeneration(transformers.Qwen2AudioConfig(**QWEN2_AUDIO))


MODELS: dict[str, Callable[[], Any]] = {
    "qwen2_audio": qwen2_audio,
    "wav2vec2": wav2vec2,
    "clap": clap,
    "encodec": encodec,
    "dac": dac,
    "vit": vit,
    "mae": mae,
    "dinov2": dinov2,
    "clip": clip,
    "siglip": siglip,
    "siglip2": siglip2,
    "language": language,
    "t5": t5,
    "bart": bart,
    "bert": bert,
    "whisper": whisper,
    "llava": llava,
    "llava_next": llava_next,
    "paligemma": paligemma,
    "blip2": blip2,
    "blip2_qformer": blip2_qformer,
    "qwen2_vl": lambda: qwen("qwen2-vl"),
    "qwen2_5_vl": lambda: qwen("qwen2.5-vl, tied"),
}


# They follow from the config, and transformers makes them anew where a file has none.
CLAP_BUFFERS = ("position_ids", "token_type_ids", "relative_position_index")


def saved_by_reference(name: str, folder: Path, **more: Any) -> Path:
    torch.manual_seed(0)
    model = MODELS[name]()
    randomise(model)
    model.save_pretrained(folder, **more)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """Those of the parts of a pipeline under their folder's name, as rules name them."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        part = "" if file.parent == folder else f"{file.parent.name}."
        found |= {f"{part}{name}": tensor for name, tensor in load_file(file).items()}
    return found


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def published_names(name: str, folder: Path) -> dict[str, Tensor]:
    """The tensors under the names that published files have, where transformers 5 saves under others."""
    found = tensors(folder)
    if name == "mae":
        return {n.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): t for n, t in found.items()}
    if name == "clap":
        return {n: t for n, t in found.items() if not n.endswith(CLAP_BUFFERS)}
    return found


def read_by_reference(name: str, folder: Path) -> Any:
    """The reference implementation of a folder; nothing may be missing, unexpected or of another shape."""
    reference = TABLE[name].resolve().reference
    model, info = getattr(transformers, reference.cls).from_pretrained(folder, output_loading_info=True)
    if name == "clap":
        info["missing_keys"] = {key for key in info["missing_keys"] if not key.endswith(CLAP_BUFFERS)}
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model


def test_every_system_has_a_reference_here() -> None:
    assert set(MODELS) == {name for name in TABLE if TABLE[name].resolve().reference is not None}


@every_system("weights: file, ours, file again: equal, one file and sharded", referenced=True)
@pytest.mark.parametrize("sharding", [None, "60KB"])
def test_round_trip(name: str, tmp_path: Path, sharding: str | None) -> None:
    more = {"max_shard_size": sharding} if sharding else {}
    theirs = saved_by_reference(name, tmp_path / "theirs", **more)
    model = polymodal.load(theirs)
    ours = model.save(tmp_path / "ours", shard_bytes=60_000 if sharding else 5 << 30)
    assert (len(list(ours.glob("*.safetensors"))) > 1) == bool(sharding)
    assert_equal(tensors(ours), published_names(name, theirs))
    assert_equal(model.to_hub(model.state_dict()), published_names(name, theirs))
    original, again = read_by_reference(name, theirs), read_by_reference(name, ours)
    assert_equal(again.state_dict(), original.state_dict())
    for part in ("", "text_config", "vision_config"):
        assert_same_fields(theirs, ours, part)


def assert_same_fields(theirs: Path, ours: Path, part: str) -> None:
    """What we write says the same as what the reference wrote, for every field that we write."""
    read = [json.loads((folder / "config.json").read_text()) for folder in (theirs, ours)]
    before, after = (whole.get(part, {}) if part else whole for whole in read)
    differ = {f for f in after if not f.endswith("_config") and before.get(f, after[f]) != after[f]}
    # Which token pads is the tokenizer's affair; transformers leaves a default where only CLIP's outer width counts.
    # Without a window, no layer is the first that has one.
    assert differ <= {"pad_token_id", "projection_dim", "max_window_layers"}, differ


@every_system("weights: a bf16 file, ours, a bf16 file again: equal", referenced=True)
def test_round_trip_in_bf16(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = MODELS[name]().to(torch.bfloat16)
    randomise(reference)
    reference.save_pretrained(tmp_path / "theirs")
    model = polymodal.load(tmp_path / "theirs")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ours = model.save(tmp_path / "ours", dtype=torch.bfloat16)
    assert_equal(tensors(ours), published_names(name, tmp_path / "theirs"))
    for title, tensor in read_by_reference(name, ours).state_dict().items():
        assert torch.equal(tensor, reference.state_dict()[title]), title


@every_system("weights: what we initialise, the reference implementation reads whole", referenced=True)
def test_what_we_build_the_reference_reads(name: str, tmp_path: Path) -> None:
    model = nano(name)
    if name == "blip2_qformer":  # the reference has no place for what stage 1 trains with
        model = polymodal.build(replace(model.config, trains=False))
    read_by_reference(name, model.save(tmp_path / "ours"))


@every_system("weights: saving over its own folder")
def test_saving_over_the_folder_that_it_was_loaded_from(name: str, tmp_path: Path) -> None:
    """The tensors may still be the file's own memory when it is replaced."""
    folder = nano(name).save(tmp_path / "model")
    before = tensors(folder)
    model = polymodal.load(folder)
    model.save(folder)
    model.save(folder, shard_bytes=60_000)
    assert_equal(tensors(folder), before)
    assert_equal(model.to_hub(model.state_dict()), before)
    assert_equal(tensors(polymodal.load(folder).save(tmp_path / "again")), before)


@pytest.mark.parametrize("shard_bytes", [60_000, 5 << 30])
def test_an_interrupted_write_leaves_the_earlier_checkpoint(tmp_path: Path, shard_bytes: int) -> None:
    folder = nano("siglip").save(tmp_path / "model", shard_bytes=shard_bytes)
    before = polymodal.load(folder).fingerprint

    def broken() -> Iterator[tuple[str, Tensor]]:
        other = nano("siglip", seed=1)
        for number, item in enumerate(other.to_hub(other.state_dict()).items()):
            if number == 40:
                raise OSError("no space left on device")
            yield item

    with pytest.raises(OSError, match="no space"):
        write_shards(folder, broken(), shard_bytes=shard_bytes)
    assert polymodal.load(folder).fingerprint == before
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
