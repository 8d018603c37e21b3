"""Language models against transformers: outputs, loss, gradients, configs both ways, and greedy text."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymodal import load
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError
from polymodal.systems.language import LanguageModel, read_hf, write_hf
from tests.parity.harness import (
    assert_greedy_text,
    assert_learns_alike,
    assert_same_files,
    cases,
    compare_gradients,
    file_gradients,
    save_reference,
    transformers_class,
)

TINY: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0], "original_max_position_embeddings": 8,
}  # fmt: skip
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", TINY),
    "llama 3.1": ("LlamaConfig", "LlamaForCausalLM", TINY | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, biases, linear": (
        "LlamaConfig", "LlamaForCausalLM",
        TINY | {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", TINY | {"sliding_window": 5}),
    "mistral, no window": ("MistralConfig", "MistralForCausalLM", TINY | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", TINY | {"tie_word_embeddings": True}),
    "qwen2, windows, yarn": (
        "Qwen2Config", "Qwen2ForCausalLM",
        TINY | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "rope_parameters": YARN},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", TINY),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", TINY),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", TINY | {"sliding_window": 5, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", TINY | {"sliding_window": 5, "num_hidden_layers": 7}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", TINY),
    "phi3, long": (
        "Phi3Config", "Phi3ForCausalLM",
        TINY | {"rope_parameters": LONG, "original_max_position_embeddings": 8, "sliding_window": 6},
    ),
    "opt": ("OPTConfig", "OPTForCausalLM", {"vocab_size": 90, "max_position_embeddings": 64} | OPT),
    "gpt2": (
        "GPT2Config", "GPT2LMHeadModel", {"vocab_size": 90, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ),
}  # fmt: skip


@pytest.fixture(params=cases(dict.fromkeys(CASES, "language")), scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Any, Path]:
    config, cls, values = CASES[request.param]
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(0)
    # gelu_new, dropout: the reference's defaults; eval() turns the latter off.
    reference = transformers_class(cls)(transformers_class(config)(**values, attn_implementation="eager"))
    reference = save_reference(reference, folder, 0.2)
    model = load(folder)
    assert isinstance(model, LanguageModel)
    return model, reference, folder


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_outputs_loss_and_gradients(pair: tuple[LanguageModel, Any, Path], tmp_path: Path) -> None:
    model, reference, _ = pair
    batch = Batch(ids=ids(3, 13), labels=ids(3, 13).masked_fill(torch.arange(13) < 4, -100))
    model.zero_grad()
    reference.zero_grad()
    model.train(False)
    result = reference(input_ids=batch["ids"], labels=batch["labels"])
    assert_learns_alike(model, batch, reference, result.logits, result.loss, tmp_path, padded=False)


def test_padding_at_the_end_changes_nothing(pair: tuple[LanguageModel, Any, Path]) -> None:
    model = pair[0]
    text = ids(3, 13)
    valid = torch.arange(13) < torch.tensor([13, 6, 9])[:, None]
    with torch.no_grad():
        padded = model(Batch(ids=text, valid=valid))
        for row, length in enumerate((13, 6, 9)):
            alone = model(Batch(ids=text[row : row + 1, :length]))
            if "phi3, long" not in str(pair[2]) and length > 8:
                torch.testing.assert_close(padded[row, :length], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_text(pair: tuple[LanguageModel, Any, Path], seed: int) -> None:
    model, reference, _ = pair
    lengths = torch.randint(1, 11, (5,), generator=torch.Generator().manual_seed(seed)) + 9
    batch = Batch(ids=ids(5, 20, seed), valid=torch.arange(20) < lengths[:, None])
    assert_greedy_text(
        model, reference, batch, lambda part: {"input_ids": part["ids"], "attention_mask": part["valid"].long()}
    )


def test_round_trip(pair: tuple[LanguageModel, Any, Path], tmp_path: Path) -> None:
    model, reference, folder = pair
    again = assert_same_files(model, reference, folder, tmp_path)
    text = ids(1, 12)
    with torch.no_grad():
        assert torch.equal(again(text).logits, reference(text).logits)
    assert read_hf(write_hf(model.config))[0] == model.config


@pytest.mark.proves("language", "published facts: the first Qwen computes what Qwen 2 does with its weights mapped")
def test_the_first_qwen(tmp_path: Path) -> None:
    """transformers has no class for it: the same function under other names, q, k and v fused, the gate called w2."""
    torch.manual_seed(0)
    values = TINY | {"num_key_value_heads": 4, "head_dim": 8}
    config = transformers_class("Qwen2Config")(**values, attn_implementation="eager")
    reference = save_reference(transformers_class("Qwen2ForCausalLM")(config), tmp_path, 0.2)
    names = {
        "model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "model.layers": "transformer.h",
        "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.w1", "mlp.gate_proj": "mlp.w2", "mlp.down_proj": "mlp.c_proj",
    }  # fmt: skip

    def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {}
        for name, tensor in tensors.items():
            new = functools.reduce(lambda n, pair: n.replace(*pair), names.items(), name)
            if "q_proj" in name:
                tensor = torch.cat([tensors[name.replace("q_proj", f"{n}_proj")] for n in "qkv"])
                new = new.replace("self_attn.q_proj", "attn.c_attn")
            if "k_proj" not in name and "v_proj" not in name:
                out[new] = tensor
        return out

    folder = tmp_path / "qwen"
    folder.mkdir()
    raw = {
        "model_type": "qwen", "vocab_size": 90, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "kv_channels": 8, "seq_length": 64, "no_bias": True, "layer_norm_epsilon": 1e-6,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    file = renamed(load_file(tmp_path / "model.safetensors"))
    save_file(file, folder / "model.safetensors")
    model = load(folder)
    assert isinstance(model, LanguageModel)
    batch = Batch(ids=ids(3, 13), labels=ids(3, 13).masked_fill(torch.arange(13) < 4, -100))
    result = reference(input_ids=batch["ids"], labels=batch["labels"])
    torch.testing.assert_close(model(batch), result.logits, rtol=1e-5, atol=1e-5)
    loss = model.loss(batch).mean
    torch.testing.assert_close(loss, result.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    result.loss.backward()
    compare_gradients(model, renamed(file_gradients(reference, tmp_path / "gradients")))
    again = load_file(model.save(tmp_path / "again") / "model.safetensors")
    assert again.keys() == file.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in file.items())
    assert model.reference is None, "the certificate has nothing to compare with"
    with pytest.raises(ConfigError, match="is odd"):
        read_hf(raw | {"intermediate_size": 97})
