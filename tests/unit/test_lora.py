from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from polymodal.core.errors import ConfigError, WeightsError
from polymodal.train import add_lora, load_peft, merge_lora, save_peft
from polymodal.train.lora import LoraLinear, put_adapter


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 6, bias=False)
        self.o_proj = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.o_proj(torch.tanh(self.v_proj(torch.tanh(self.q_proj(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(Layer(), Layer())
        self.text = Layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.text(self.vision(x))


@pytest.fixture
def net() -> Net:
    return Net().eval()


def trained(model: nn.Module) -> nn.Module:
    """As if a training had moved every adapter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def test_a_new_adapter_changes_nothing_and_alone_gets_a_gradient(net: Net) -> None:
    before = net(X)
    names = set(net.state_dict())
    assert add_lora(net, rank=4) is net
    assert torch.equal(net(X), before)
    assert names <= set(net.state_dict())  # the base keeps its names
    net(X).sum().backward()
    with_gradient = {name for name, p in net.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name in net.state_dict() if "lora_" in name}
    assert len(with_gradient) == 3 * 2 * 2


def test_initial_values_and_scale(net: Net) -> None:
    add_lora(net, ["q_proj"], rank=2, alpha=6.0)
    layer = net.text.q_proj
    assert isinstance(layer, LoraLinear)
    assert layer.scale == 3.0
    assert not layer.lora_B.weight.any()
    bound = (1 / 8) ** 0.5  # kaiming-uniform with a = sqrt(5) over 8 inputs
    assert 0.5 * bound < layer.lora_A.weight.abs().max() <= bound
    trained(net)
    expected = nn.functional.linear(X, layer.weight, layer.bias)
    expected = expected + 3.0 * (X @ layer.lora_A.weight.T @ layer.lora_B.weight.T)
    torch.testing.assert_close(layer(X), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merging_is_exact(net: Net, dtype: torch.dtype) -> None:
    net = trained(add_lora(net.to(dtype), rank=3)).to(dtype)
    adapted = net(X.to(dtype))
    merged = merge_lora(net)
    torch.testing.assert_close(merged(X.to(dtype)), adapted, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-6)
    assert set(merged.state_dict()) == set(Net().state_dict())
    assert type(merged.text.q_proj) is nn.Linear
    assert not merged.training


def test_half_precision_keeps_an_fp32_adapter_and_rounds_once(net: Net) -> None:
    net = trained(add_lora(net.bfloat16(), ["q_proj"], rank=3))
    layer = net.text.q_proj
    assert layer.lora_A.weight.dtype == torch.float32
    assert net(X.bfloat16()).dtype == torch.bfloat16
    exact = layer.weight.float() + layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    assert torch.equal(merge_lora(net).text.q_proj.weight, exact.bfloat16())


def test_merging_leaves_a_tied_weight_alone() -> None:
    net = nn.ModuleDict({"embedding": nn.Embedding(6, 8), "head": nn.Linear(8, 6, bias=False)})
    net["head"].weight = net["embedding"].weight
    before = net["embedding"].weight.detach().clone()
    merge_lora(trained(add_lora(net, ["head"])))
    assert torch.equal(net["embedding"].weight, before)
    assert not torch.equal(net["head"].weight, before)


def test_dropout_acts_on_the_adapter_in_training_only(net: Net) -> None:
    trained(add_lora(net, rank=4, dropout=0.5))
    assert torch.equal(net(X), net(X))
    net.train()
    assert not torch.equal(net(X), net(X))


def test_names_choose_layers(net: Net) -> None:
    add_lora(net, ["vision.1.q_proj", "o_proj"])
    adapted = {name for name, m in net.named_modules() if isinstance(m, LoraLinear)}
    assert adapted == {"vision.1.q_proj", "vision.0.o_proj", "vision.1.o_proj", "text.o_proj"}


def test_wrong_targets_and_numbers_are_refused(net: Net) -> None:
    before = {name: p.requires_grad for name, p in net.named_parameters()}
    with pytest.raises(ConfigError, match="called 'qproj'; these would match: o_proj, q_proj, v_proj"):
        add_lora(net, ["q_proj", "qproj"])
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(ConfigError, match="LoRA needs rank >= 1"):
            add_lora(net, **wrong)
    assert {name: p.requires_grad for name, p in net.named_parameters()} == before
    add_lora(net)
    with pytest.raises(ConfigError, match="has LoRA adapters already"):
        add_lora(net)


def test_layers_that_never_call_their_linear_are_no_targets() -> None:
    """torch's attention reads the weight of its out_proj itself: an adapter there would never run."""
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    with pytest.raises(ConfigError, match="these would match: fc"):
        add_lora(attention, ["out_proj"])


# ---- PEFT ----


def peft_of(net: Net, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=12, **{"target_modules": ["q_proj", "v_proj"], **options})
    return trained(peft.get_peft_model(copy.deepcopy(net), config)).eval()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["vision.1.q_proj"], r"vision\.\d\..*(q|o)_proj"])
def test_what_peft_saved_is_read(net: Net, targets: Any, tmp_path: Path) -> None:
    theirs = peft_of(net, target_modules=targets)
    theirs.save_pretrained(tmp_path)
    before = net(X)
    load_peft(net, tmp_path)
    torch.testing.assert_close(net(X), theirs(X), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(net(X), before)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["vision.0.q_proj", "text.o_proj"]])
def test_peft_reads_what_was_saved(net: Net, targets: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(net)
    trained(add_lora(net, targets, rank=4, alpha=12.0, dropout=0.1))
    save_peft(net, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(theirs(X), net(X), rtol=1e-6, atol=1e-6)
    adapted = {name for name, module in net.named_modules() if isinstance(module, LoraLinear)}
    assert {n for n, _ in theirs.base_model.model.named_modules() if n.endswith("lora_A")} == {
        f"{name}.lora_A" for name in adapted
    }


def test_merging_agrees_with_peft(net: Net, tmp_path: Path) -> None:
    theirs = peft_of(net)
    theirs.save_pretrained(tmp_path)
    ours = merge_lora(load_peft(net, tmp_path)).state_dict()
    torch.testing.assert_close(ours, theirs.merge_and_unload().state_dict(), rtol=1e-6, atol=1e-6)


def test_gradients_agree_with_peft(net: Net, tmp_path: Path) -> None:
    theirs = peft_of(net)
    theirs.save_pretrained(tmp_path)
    load_peft(net, tmp_path)
    net(X).square().sum().backward()
    theirs(X).square().sum().backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"bias": "all"},
        {"modules_to_save": ["text.o_proj"]},
        {"rank_pattern": {"text.q_proj": 2}},
        {"alpha_pattern": {"text.q_proj": 2}},
    ],
)
def test_what_is_no_plain_lora_is_refused(net: Net, options: dict[str, Any], tmp_path: Path) -> None:
    peft_of(net, **options).save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ConfigError, match=f"no plain LoRA adapter, it asks for .*{next(iter(options))}"):
        load_peft(net, tmp_path)
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return damage


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return damage


KEY = "base_model.model.text.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_config(lambda c: c.pop("r")), ConfigError, "malformed: r is None"),
        (_config(lambda c: c.update(r="4")), ConfigError, "malformed: r is '4'"),
        (_config(lambda c: c.update(r=8)), WeightsError, r"has shape \(4, 8\), the model needs \(8, 8\)"),
        (_config(lambda c: c.update(target_modules=["q_proj"])), WeightsError, "fits no layer"),
        (_config(lambda c: c.update(peft_type="IA3")), ConfigError, "IA3"),
        (_config(lambda c: c.update(init_lora_weights="pissa")), ConfigError, "pissa"),
        (_config(lambda c: c.update(a_field_of_next_year=3)), ConfigError, "a_field_of_next_year"),
        (_tensors(lambda t: t.pop(KEY)), WeightsError, f"{KEY} is missing"),
        (_tensors(lambda t: t.update(more=torch.zeros(1))), WeightsError, "more fits no layer"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 40), WeightsError, "cannot be read"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), WeightsError, "cannot be read"),
        (lambda f: (f / "adapter_config.json").unlink(), ConfigError, "does not exist"),
        (lambda f: (f / "adapter_config.json").write_text("[1]"), ConfigError, "should hold an object"),
    ],
)
def test_damaged_adapters_are_refused_whole(
    net: Net, damage: Callable[[Path], Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    save_peft(trained(add_lora(copy.deepcopy(net), rank=4)), tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        load_peft(net, tmp_path)
    assert not any(isinstance(module, LoraLinear) for module in net.modules())


def test_saving_without_adapters_is_refused(net: Net, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no LoRA adapters to save"):
        save_peft(net, tmp_path)


@pytest.mark.parametrize("other", [{"rank": 3, "alpha": 4.0}, {"rank": 2, "alpha": 8.0}])
def test_adapters_that_differ_are_not_written_as_if_they_were_alike(
    net: Net, other: dict[str, Any], tmp_path: Path
) -> None:
    """Shared files, which `load_lora` reads, have an alpha for each layer; PEFT's config has one."""
    put_adapter(net, "text.q_proj", net.text.q_proj, rank=2, alpha=4.0)
    put_adapter(net, "text.o_proj", net.text.o_proj, **other)
    with pytest.raises(ConfigError, match="merge_lora"):
        save_peft(net, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_round_trip(net: Net, tmp_path: Path) -> None:
    base = copy.deepcopy(net)
    trained(add_lora(net, ["o_proj"], rank=3, alpha=5.0, dropout=0.2))
    save_peft(net, tmp_path)
    again = load_peft(base, tmp_path)
    torch.testing.assert_close(again.state_dict(), net.state_dict(), rtol=0, atol=0)
    layer = again.text.o_proj
    assert isinstance(layer, LoraLinear)
    assert (layer.rank, layer.alpha, layer.lora_dropout.p) == (3, 5.0, 0.2)
