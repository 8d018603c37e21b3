"""Shared LoRA files in the layouts that are about, on the U-Net of Stable Diffusion, against diffusers with PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polymodal
from polymodal.core.errors import ConfigError, WeightsError
from polymodal.systems.sdxl import SDXL
from polymodal.systems.stable_diffusion import StableDiffusion
from polymodal.train.lora import PREFIX, LoraLinear, add_lora, load_peft, merge_lora, save_peft
from polymodal.train.lora_files import load_lora
from tests.nano import nano
from tests.parity.harness import randomise
from tests.parity.test_stable_diffusion import pipeline

pytest.importorskip("peft")
# diffusers hands PEFT alphas under names that it does not find, and the commonest counts for all: compared are files
# with one alpha; several are looked at below.
pytestmark = pytest.mark.filterwarnings("ignore:The following alpha_pattern:RuntimeWarning")

ENDS = (".to_q", ".to_out.0", ".proj_in", ".ff.net.0.proj")
LAYOUTS = {
    "peft": ("lora_A", "lora_B"), "diffusers": ("lora.down", "lora.up"), "kohya": ("lora_down", "lora_up"),
    "official": ("lora_down", "lora_up"),
}  # fmt: skip


def adapters(pipe: Any, scale: float = 1.0, ranks: tuple[int, int] = (2, 3)) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Matrices for some layers of every block, with ranks in turn, and alpha so many times the rank."""
    torch.manual_seed(2)
    made: dict[str, tuple[Tensor, Tensor, float]] = {}
    for name, module in pipe.unet.named_modules():
        if not name.endswith(ENDS) or "attentions" not in name:
            continue
        rank = ranks[len(made) % 2]
        wide, narrow, *kernel = module.weight.shape
        ones = [1] * len(kernel)
        made[name] = torch.randn(rank, narrow, *ones) * 0.3, torch.randn(wide, rank, *ones) * 0.3, scale * rank
    return made


def official(name: str, blocks: int = 1) -> str:
    """The name of a block's layer in the official code, with underscores."""
    way, _, rest = name.partition(".")
    if way == "mid_block":
        return "middle_block_1_" + rest.removeprefix("attentions.0.").replace(".", "_")
    level, _, place, layer = rest.split(".", 3)
    number = int(level) * (blocks + 1) + int(place)
    side = f"input_blocks_{number + 1}" if way == "down_blocks" else f"output_blocks_{number}"
    return f"{side}_1_{layer.replace('.', '_')}"


def written(layout: str, made: dict[str, tuple[Tensor, Tensor, float]], file: Path) -> dict[str, Tensor]:
    first, second = LAYOUTS[layout]
    tensors = {}
    for name, (down, up, alpha) in made.items():
        called = f"unet.{name}" if layout in ("peft", "diffusers") else f"lora_unet_{name.replace('.', '_')}"
        called = f"lora_unet_{official(name)}" if layout == "official" else called
        tensors |= {f"{called}.{first}.weight": down, f"{called}.{second}.weight": up}
        if called.startswith("lora_unet"):
            tensors[f"{called}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    return tensors


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        pytest.param(*case, marks=pytest.mark.proves(system, f"LoRA files of others: {case[1]} (diffusers)"))
        for system, case in [
            ("stable_diffusion", ("sd1", "peft")), ("stable_diffusion", ("sd1", "kohya")),
            ("stable_diffusion", ("sd2", "diffusers")), ("sdxl", ("sdxl", "official")),
        ]
    ],
)  # fmt: skip
def test_adapters_of_others(kind: str, layout: str, tmp_path: Path) -> None:
    pipe = pipeline(kind, tmp_path)
    made = adapters(pipe, 1.5, (2, 2)) if "lora_down" in LAYOUTS[layout] else adapters(pipe)
    written(layout, made, tmp_path / "lora.safetensors")
    system = polymodal.load(tmp_path / "theirs")
    assert isinstance(system, StableDiffusion | SDXL)
    x, when = torch.randn(2, 4, 8, 8), torch.tensor([3, 981])
    condition = system.text_condition(["a cup", "two cats"])
    before = system.denoise(x, when.float(), condition)
    load_lora(system, tmp_path / "lora.safetensors", names=system.hub_layers())
    trained = {name.rpartition(".lora_")[0] for name, p in system.named_parameters() if p.requires_grad}
    assert len(trained) == len(made)
    mine = system.denoise(x, when.float(), condition)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    added = {}
    if isinstance(system, SDXL):
        added = {"added_cond_kwargs": {"text_embeds": condition["pooled"], "time_ids": system.numbers(x)}}
    theirs = pipe.unet(x, when, condition["context"], **added).sample
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert float((mine - before).detach().abs().max()) > 1e-2
    torch.testing.assert_close(merge_lora(system).denoise(x, when.float(), condition), mine, rtol=0, atol=1e-5)


def test_alpha_is_read_where_the_file_says_it_beside_the_tensors(tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe = pipeline("sd1", tmp_path)
    made = adapters(pipe, ranks=(2, 2))
    halves = {f"{n}.lora_A.weight": down for n, (down, _, _) in made.items()}
    halves |= {f"{n}.lora_B.weight": up for n, (_, up, _) in made.items()}
    ends = [end.removeprefix(".") for end in ENDS]
    settings = LoraConfig(r=2, lora_alpha=8, target_modules=ends, init_lora_weights="gaussian").to_dict()
    pipe.save_lora_weights(tmp_path, halves, weight_name="lora.safetensors", unet_lora_adapter_metadata=settings)
    system, x, when = polymodal.load(tmp_path / "theirs"), torch.randn(2, 4, 8, 8), torch.tensor([3, 981])
    assert isinstance(system, StableDiffusion)
    condition = system.text_condition(["a cup", "two cats"])
    load_lora(system, tmp_path / "lora.safetensors", names=system.hub_layers())
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    theirs = pipe.unet(x, when, condition["context"]).sample
    torch.testing.assert_close(system.denoise(x, when.float(), condition), theirs, rtol=0, atol=1e-4)


def test_alpha_of_peft_is_read_beside_the_file(tmp_path: Path) -> None:
    names, file = nano("dit").hub_layers(), tmp_path / "adapter_model.safetensors"
    save_peft(add_lora(nano("dit"), ["q_proj"], rank=2, alpha=8.0), tmp_path, names=names)
    loaded = load_lora(nano("dit"), file, names=names)
    assert {m.scale for m in loaded.modules() if isinstance(m, LoraLinear)} == {4.0}
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"adapter_config\.json how much it counts: put that beside it"):
        load_lora(nano("dit"), file, names=names)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('{"transformer.use_rslora": true, "transformer.lora_alpha": 4}', "use_rslora is True"),
        ('{"transformer.alpha_pattern": {"to_v": 1}}', "alpha_pattern is"),
        ('{"transformer.lora_alpha": "4"}', "lora_alpha is '4'"), ("[1]", "broken"), ("{", "broken"),
    ],
)  # fmt: skip
def test_metadata_that_ask_for_more_are_refused(said: str, message: str, tmp_path: Path) -> None:
    model, file = nano("dit"), tmp_path / "lora.safetensors"
    called = next(iter(model.hub_layers().values()))
    halves = {f"{called}.lora_A.weight": torch.ones(1, 32), f"{called}.lora_B.weight": torch.ones(32, 1)}
    save_file(halves, file, metadata={"lora_adapter_metadata": said})
    with pytest.raises(ConfigError, match=message):
        load_lora(model, file, names=model.hub_layers())
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_files_that_do_not_fit_are_refused_whole(tmp_path: Path) -> None:
    pipe = pipeline("sd1", tmp_path)
    made = adapters(pipe, 0.75)
    file = tmp_path / "lora.safetensors"
    good = written("kohya", made, file)
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    good |= {f"{text}.lora_down.weight": torch.ones(1, 12), f"{text}.lora_up.weight": torch.ones(12, 1)}
    save_file(good, file)
    system = polymodal.load(tmp_path / "theirs")
    names = system.hub_layers()
    first = next(iter(good)).removesuffix(".lora_down.weight")
    wrong = [
        ({f"{first}.lora_up.weight": None}, "one of its two matrices"),
        ({f"{first}.lora_up.weight": torch.ones(3, 2)}, "the layer goes from"),
        ({f"{first}.alpha": torch.ones(2)}, "alpha has shape"),
        ({f"{first}.alpha": torch.tensor(torch.nan)}, "NaN or infinite"),
        ({f"{first}.alpha": torch.tensor(torch.inf)}, "NaN or infinite"),
        ({f"{first}.lora_up.weight": good[f"{first}.lora_up.weight"] * torch.nan}, "NaN or infinite"),
        ({f"{first}.hada_w1_a": torch.ones(2)}, "none of the tensors that an adapter has"),
        ({"lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3)}, "conv_in.lora_down.weight has shape"),
        ({f"{text}x.lora_down.weight": torch.ones(1, 12), f"{text}x.lora_up.weight": torch.ones(12, 1)}, "no linear"),
    ]  # fmt: skip
    for changes, message in wrong:
        save_file({n: t for n, t in (good | changes).items() if t is not None}, file)
        with pytest.raises(WeightsError, match=message):
            load_lora(system, file, names=names)
        assert not any("lora_" in name for name, _ in system.named_parameters())
    file.write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_lora(system, file, names=names)
    save_file(good, file)
    for scale in (0.0, torch.inf, torch.nan):
        with pytest.raises(ConfigError, match="positive number"):
            load_lora(system, file, names=names, scale=scale)
    load_lora(system, file, names=names, scale=0.5)
    adapter = system.get_submodule("text.tower.blocks.0.attn.q_proj")
    assert adapter.scale == 0.5
    theirs = {there: ours for ours, there in names.items()}
    assert all(system.get_submodule(theirs[f"unet.{name}"]).scale == 0.75 * 0.5 for name in made)
    name, (down, up, _) = next(iter(made.items()))
    plain = system.get_submodule(theirs[f"unet.{name}"])
    torch.testing.assert_close(plain.merged().weight - plain.weight, 0.375 * up.flatten(1) @ down.flatten(1))
    with pytest.raises(ConfigError, match="adapters already"):
        load_lora(system, file, names=names)


@pytest.mark.proves("stable_diffusion", "LoRA in PEFT's files: 1x1 convolutions are such there (diffusers)")
def test_an_adapter_of_ours_in_the_files_of_peft(tmp_path: Path) -> None:
    pipe = pipeline("sd1", tmp_path)
    ours = polymodal.load(tmp_path / "theirs")
    assert isinstance(ours, StableDiffusion)
    names, convolutions = ours.hub_layers(), ours.hub_convolutions()
    x, when, condition = torch.randn(2, 4, 8, 8), torch.tensor([3, 981]), ours.text_condition(["a cup", "two cats"])
    add_lora(ours, ["in_proj", "q_proj"], rank=2, alpha=2.0)
    randomise(ours.backbone, 0.2)
    pipe.unet.load_state_dict(
        {n.removeprefix("unet."): t for n, t in ours.to_hub(below(ours)).items() if n.startswith("unet.")}
    )
    save_peft(ours, tmp_path / "ours", names=names, convolutions=convolutions)
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    shapes = {
        name.rpartition(".lora_A")[0].rpartition(".")[2]: t.shape[2:] for name, t in tensors.items() if "A." in name
    }
    assert shapes == {"proj_in": (1, 1), "to_q": (), "q_proj": ()}
    again = polymodal.load(tmp_path / "theirs")
    load_peft(again, tmp_path / "ours", names=names)
    mine = dict(ours.named_parameters())
    assert all(torch.equal(p, mine[name]) for name, p in again.named_parameters() if "lora_" in name)
    plain = pipe.unet(x, when, condition["context"]).sample
    pipe.load_lora_weights({n.removeprefix(PREFIX): t for n, t in tensors.items() if "unet" in n})
    theirs = pipe.unet(x, when, condition["context"]).sample
    torch.testing.assert_close(ours.denoise(x, when.float(), condition), theirs, rtol=0, atol=1e-5)
    assert float((plain - theirs).detach().abs().max()) > 1e-2


def below(model: StableDiffusion) -> dict[str, Tensor]:
    """The weights below the adapters."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}


def test_layers_in_another_order_are_refused(tmp_path: Path) -> None:
    system, file = nano("flux"), tmp_path / "lora.safetensors"
    names = system.hub_layers()
    block = "transformer.transformer_blocks.0.attn"
    halves = {"lora_A": torch.ones(1, 32), "lora_B": torch.ones(32, 1)}
    save_file({f"{block}.to_q.{half}.weight": tensor for half, tensor in halves.items()}, file)
    with pytest.raises(WeightsError, match=r"to_q .* or one that it holds otherwise than its files do"):
        load_lora(system, file, names=names)
    save_file({f"{block}.to_v.{half}.weight": tensor for half, tensor in halves.items()}, file)
    load_lora(system, file, names=names)
