"""Int8 layers: error, independence of the batch, what is replaced."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from polymodal.core.errors import ConfigError
from polymodal.nn.quantise import Int8Linear, quantise_int8
from polymodal.samplers.autoregressive import Settings, complete
from tests.toy_lm import ToyLM, tokenizer


@pytest.mark.parametrize("bias", [True, False])
def test_error_of_a_layer(bias: bool) -> None:
    layer = nn.Linear(256, 96, bias=bias)
    x = torch.randn(3, 5, 256) * torch.tensor([1e-4, 1.0, 300.0])[:, None, None]
    got, wanted = Int8Linear(layer.weight, layer.bias)(x), layer(x).detach()
    error = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert got.shape == wanted.shape
    assert 1e-4 < float(error.max()) < 0.02, "each token has its own scale, however small it is"


@given(st.integers(1, 9), st.floats(1e-3, 1e3))
def test_a_token_is_the_same_in_any_batch(rows: int, size: float) -> None:
    layer = Int8Linear(torch.randn(24, 40), torch.randn(24))
    x = torch.randn(rows, 40) * torch.linspace(1, size, rows)[:, None]
    together = layer(x)
    for row in range(rows):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


def test_extremes() -> None:
    layer = Int8Linear(torch.tensor([[0.0, 0.0], [1.0, -1.0]]), torch.tensor([3.0, 0.5]))
    assert layer(torch.zeros(1, 2)).tolist() == [[3.0, 0.5]]  # neither an empty input nor an empty row divides by zero
    assert layer(torch.empty(0, 2)).shape == (0, 2)
    assert layer(torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_what_is_replaced() -> None:
    model = ToyLM(64)
    before = model.state_dict()
    assert quantise_int8(model, skip=("decoder.blocks.0.attn", "decoder.lm_head")) is model
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["decoder.blocks.1.attn.q_proj"] is kinds["decoder.blocks.0.mlp.up_proj"] is Int8Linear
    assert kinds["decoder.blocks.0.attn.q_proj"] is kinds["decoder.lm_head"] is nn.Linear
    assert set(model.state_dict()) < set(before)
    with pytest.raises(ConfigError, match=r"no module 'decoder.lm_hed'.*'decoder.lm_head'"):
        quantise_int8(model, skip=("decoder.lm_hed",))


def test_greedy_tokens_are_the_same_alone_and_in_a_batch() -> None:
    model = quantise_int8(ToyLM(320, dim=64), skip=("decoder.lm_head",))
    assert isinstance(model, ToyLM)
    words, settings = tokenizer(), Settings(max_new_tokens=12)
    chats = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    together = complete(model, model.prompt(chats), settings, words)
    for chat, answer in zip(chats, together, strict=True):
        (alone,) = complete(model, model.prompt([chat]), settings, words)
        assert alone.ids == answer.ids
