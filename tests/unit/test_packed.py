"""Packed layers: the products of plain ones, what is replaced, and what a model says with them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import polymodal
from polymodal.core.errors import ConfigError
from polymodal.nn.packed import PackedLinear, can_pack, pack
from polymodal.samplers.autoregressive import Settings, complete
from polymodal.systems.base import System
from tests.nano import nano
from tests.toy_lm import ToyLM, tokenizer

pytestmark = pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN")
needs_bf16 = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this CPU has no bf16 products")


@given(rows=st.integers(0, 70), dim=st.integers(1, 40), out=st.integers(1, 40), bias=st.booleans())
def test_a_product_of_any_size(rows: int, dim: int, out: int, bias: bool) -> None:
    layer, x = nn.Linear(dim, out, bias=bias), torch.randn(2, rows, dim)
    got = PackedLinear(layer.weight, layer.bias)(x)
    torch.testing.assert_close(got, layer(x).detach(), atol=1e-5, rtol=1e-5)


@needs_bf16
def test_the_precision_is_that_of_the_layer() -> None:
    layer, x = nn.Linear(64, 32).bfloat16(), torch.randn(5, 64, dtype=torch.bfloat16)
    got = PackedLinear(layer.weight, layer.bias)(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, layer(x).detach(), atol=1e-2, rtol=1e-2)


def test_every_linear_layer_is_replaced_and_the_greedy_tokens_stay() -> None:
    torch.manual_seed(0)
    model, words, settings = ToyLM(320, dim=64), tokenizer(), Settings(max_new_tokens=12)
    chats = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    plain = [answer.ids for answer in complete(model, model.prompt(chats), settings, words)]
    assert pack(model) is model
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    with torch.inference_mode():
        assert [answer.ids for answer in complete(model, model.prompt(chats), settings, words)] == plain


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_state_is_that_of_the_layer(dtype: torch.dtype, bias: bool) -> None:
    plain = nn.Sequential(nn.Linear(17, 33, bias=bias), nn.LayerNorm(33)).to(dtype)
    packed = pack(copy.deepcopy(plain)).state_dict()
    assert packed.keys() == plain.state_dict().keys()
    assert all(torch.equal(packed[name], tensor) for name, tensor in plain.state_dict().items())


def test_an_index_serves_a_packed_model_and_a_packed_model_can_be_saved(tmp_path: Path) -> None:
    plain = nano("clip")
    assert isinstance(plain, System)
    folder = plain.save(tmp_path / "plain")
    packed = polymodal.load(folder)
    pack(packed)
    assert packed.fingerprint == polymodal.load(folder).fingerprint
    assert polymodal.load(packed.save(tmp_path / "packed")).fingerprint == packed.fingerprint


def test_a_layer_elsewhere_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0 is on meta: packed layers run on the CPU"):
        pack(nn.Sequential(nn.Linear(2, 2, device="meta")))


@pytest.mark.skipif(can_pack(torch.bfloat16), reason="this CPU has bf16 products")
def test_bf16_is_refused_where_the_cpu_has_no_products_of_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    with pytest.raises(ConfigError, match=r"cannot pack layers in torch\.bfloat16: load the model in fp32"):
        pack(model)
    assert type(model[0]) is nn.Linear  # nothing is replaced by halves
