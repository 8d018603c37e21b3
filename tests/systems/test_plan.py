"""What `plan` says is what a real run counts: operations by torch's counter, bytes by torch's allocator."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import polymodal
from polymodal.backbones.decoder import AttentionConfig, Gated
from polymodal.checklist import QUESTIONS, recommend
from polymodal.connectors.grid import Pooling
from polymodal.connectors.resampler import ResamplerConfig
from polymodal.core.batch import Batch
from polymodal.core.drawing import Drawing
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Image, Sample
from polymodal.core.verbs import Generates
from polymodal.heads.lm import IGNORE
from polymodal.machine import Machine
from polymodal.nn.dryrun import DryRun, Work
from polymodal.nn.packed import can_pack
from polymodal.nn.precision import cast
from polymodal.nn.quantise import quantise_int8
from polymodal.plan import Input, Plan, parameters, price, prompt
from polymodal.systems import TABLE
from polymodal.systems.acting import Policy
from polymodal.systems.base import DualEncoder, Embedder, System
from polymodal.systems.behaviour import BehaviourCloning
from polymodal.systems.generator import Generator
from polymodal.systems.painting import Painter
from polymodal.systems.token_head import TokenActions, Tokens
from tests.nano import DECODER, NANO, every_system, nano, nano_batch
from tests.systems.test_every_painter import painter

# Stage 1 of BLIP-2 reads pairs; the others hear, or write codes.
UNPRICED = {"blip2_qformer", "clap", "encodec", "dac", "wav2vec2", "whisper", "musicgen", "valle"}
UNPRICED |= {"vqgan", "cosmos_tokenizer", "parti"}  # they read pixels, or codes
UNPRICED |= {"sora", "stable_video"}  # they make films
UNPRICED |= {"diamond", "iris"}  # they foresee films
NANO_INPUT = Input(images=((56, 56),), text=5, new=4, steps=2, batch=2)


@functools.cache
def planned(name: str) -> Plan:
    words, paints = "image" not in TABLE[name].modalities, issubclass(TABLE[name].resolve(), Painter)
    images = None if paints else () if words else NANO_INPUT.images
    return price(NANO[name], replace(NANO_INPUT, images=images), train=True)


def counted(work: Callable[[], object]) -> int:
    """Operations of a real run by torch's own counter, which knows attention as products of matrices only."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def held(work: Callable[[], object]) -> int:
    """The most bytes that a real run takes from torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def lesson(model: Generator, given: Input) -> Batch:
    batch = prompt(model, replace(given, text=given.text + given.new), {})
    labels = batch["ids"].clone()
    labels[:, : -given.new] = IGNORE
    return Batch(batch | {"labels": labels})


def runs(model: System, given: Input) -> dict[str, Callable[[], object]]:
    """The phases of a plan, for real; ``step`` is the one in the middle of an odd number of them."""
    if isinstance(model, Generates):
        batch = prompt(model, given, {})
        memory: Any = model.new_memory(given.batch, batch["ids"].shape[1] + given.new)

        def prefill() -> None:
            nonlocal memory
            memory = model.new_memory(given.batch, batch["ids"].shape[1] + given.new)
            model.prefill(batch, memory)

        def step() -> None:
            model.step(torch.zeros(given.batch, dtype=torch.int64), memory)

        return {"prefill": prefill, "step": step}
    if isinstance(model, Embedder):
        assert given.images is not None
        picture = Sample((Image(PILImage.new("RGB", given.images[0])),))
        pictures = model.prepare_images([picture] * given.batch)
        out: dict[str, Callable[[], object]] = {"pictures": lambda: model.encode(pictures)}
        if isinstance(model, DualEncoder):
            length = model.config.text.context if model.padding == "max" else given.text
            ids = replace(model.inputs_spec()["ids"], shape=(length,)).random(
                given.batch, torch.Generator().manual_seed(0)
            )
            out["texts"] = lambda: model.encode(Batch(ids=ids))
        return out
    if isinstance(model, Painter):
        drawing = Drawing(steps=given.steps, seed=0)
        control = torch.rand(1, 3, *model.size[::-1]) if "control" in model.inputs_spec() else None
        return {"drawing": lambda: model.draw(["a"] * given.batch, drawing, control=control)}
    if isinstance(model, Policy):
        specs = {name: spec for name, spec in model.inputs_spec().items() if not name.startswith("actions")}
        seen = Batch({n: spec.random(given.batch, torch.Generator().manual_seed(0)) for n, spec in specs.items()})
        return {"chunk": lambda: model.chunk(seen)}
    ids = torch.zeros(given.batch, given.text, dtype=torch.int64)
    return {"forward": lambda: model(Batch(ids=ids, valid=torch.ones_like(ids, dtype=torch.bool)))}


@every_system("plan: parameters are exact, operations are those that a real run counts")
def test_operations(name: str) -> None:
    if name in UNPRICED:
        with pytest.raises(UnsupportedError, match="no price yet"):
            planned(name)
        return
    model = painter(name) if issubclass(TABLE[name].resolve(), Painter) else nano(name).eval()
    plan = planned(name)
    assert sum(plan.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert plan.parameters == parameters(model)
    given = plan.input
    model.requires_grad_(False)  # torch's counter fails on parameters without a graph
    real = {phase: counted(work) for phase, work in runs(model, given).items()}
    assert real, "nothing was run"
    for phase, flops in real.items():
        assert plan.phases[phase].flops == pytest.approx(flops, rel=0.02)


@every_system("plan: operations of a training step are those that a real run counts")
def test_training(name: str) -> None:
    if name in UNPRICED:
        pytest.skip("reads what is not priced")
    model: Any = nano(name)
    plan = planned(name)
    if isinstance(model, Generator):
        batch = lesson(model, plan.input)
    else:
        generator = torch.Generator().manual_seed(0)
        lengths = {"ids": 5, "valid": 5, "labels": 4} if isinstance(model, Generates) else {}
        batch = Batch(
            {
                name: replace(spec, shape=(lengths[name],) if lengths else spec.shape).random(2, generator)
                for name, spec in model.inputs_spec().items()
            }
        )
    flops = counted(lambda: model.loss(batch).mean.backward())
    assert plan.phases["train"].flops == pytest.approx(flops, rel=0.02)


SMALL = replace(
    NANO["llava"],
    vision=replace(NANO["llava"].vision, dim=192, hidden_dim=768, image_size=96, patch_size=8, num_layers=3),
    backbone=replace(
        DECODER, dim=256, context=512, num_layers=3, vocab_size=2000, mlp=Gated(hidden_dim=704),
        attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=32),
    ),
)  # fmt: skip
SMALL_INPUT = Input(images=((300, 200),), text=40, new=30, batch=2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_memory_of_inference(dtype: Any) -> None:
    """Exact where it is data, and within a tenth of what torch's allocator gave where it is not."""
    plan = price(SMALL, SMALL_INPUT, dtype=dtype)
    model: Any = cast(polymodal.build(SMALL).eval(), "bf16" if dtype == "bf16" else "fp32")
    if dtype == "int8":
        quantise_int8(model)
    else:
        assert plan.weights == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    batch = prompt(model, SMALL_INPUT, {})
    assert plan.inputs == sum(t.nbytes for t in batch.values())
    memory = model.new_memory(2, batch["ids"].shape[1] + SMALL_INPUT.new)
    assert plan.cache == memory.nbytes
    assert plan.cache == 2 * plan.cache_per_token * memory.capacity
    model.prefill(batch, model.new_memory(2, memory.capacity))  # kernels are prepared once
    prefill = held(lambda: model.prefill(batch, memory))
    memory.lengths = [memory.capacity - 1] * 2
    step = held(lambda: model.step(torch.zeros(2, dtype=torch.int64), memory))
    assert plan.phases["prefill"].activations == pytest.approx(prefill, rel=0.1)
    assert plan.peak == pytest.approx(plan.weights + plan.inputs + plan.cache + max(prefill, step), rel=0.1)


def test_memory_of_training() -> None:
    plan = price(SMALL, SMALL_INPUT, train=True)
    model = polymodal.build(SMALL)
    assert isinstance(model, Generator)
    batch = lesson(model, SMALL_INPUT)
    trains = [p for p in model.parameters() if p.requires_grad]
    assert plan.optimizer == 8 * sum(p.numel() for p in trains)

    def step() -> None:
        model.loss(batch).mean.backward()

    step()
    model.zero_grad(set_to_none=True)
    real = held(step)
    assert plan.phases["train"].activations == pytest.approx(real, rel=0.1)


def test_an_answer_is_its_prefill_and_all_its_steps() -> None:
    """The steps grow with the cache; the sum from their ends is that of all of them, run one by one."""
    given = Input(text=5, new=6)
    plan, model = price(NANO["llava"], given), nano("llava").eval()
    assert isinstance(model, Generator)
    batch = prompt(model, given, {})
    memory = model.new_memory(1, batch["ids"].shape[1] + given.new)

    def answer() -> None:
        model.prefill(batch, memory)
        for _ in range(given.new - 1):
            model.step(torch.zeros(1, dtype=torch.int64), memory)

    with torch.no_grad():
        assert plan.phases["answer"].flops == pytest.approx(counted(answer), rel=0.02)


@pytest.mark.parametrize("size", [(1, 1), (640, 480), (31, 1000), (2000, 700)])
def test_tokens_are_those_of_the_prompt(size: tuple[int, int]) -> None:
    model: Any = nano("llava_next")
    plan = price(NANO["llava_next"], Input(images=(size,), text=5, new=4))
    (spelled,), _ = model.see([PILImage.new("RGB", size)])
    assert plan.tokens[f"picture 1, {size[0]} x {size[1]}"] == len(spelled)
    assert plan.tokens["total"] == len(spelled) + 9


def test_frames_are_pictures_where_there_are_no_clips() -> None:
    plan = price(NANO["llava"], Input(frames=3, text=5, new=4))
    assert plan.tokens["total"] == 3 * NANO["llava"].num_features + 9


@pytest.mark.parametrize(
    "connector",
    [Pooling(frames=4, steps=2), ResamplerConfig(num_latents=3, num_layers=1, num_heads=2, head_dim=8, num_frames=4)],
    ids=["pooling", "resampler"],
)
def test_a_composition_of_clips_is_priced_as_it_reads_them(connector: Any) -> None:
    config = replace(NANO["composed"], connector=connector, video_id=40)
    given = Input(images=((30, 20),), frames=9, text=5, new=4, batch=2)
    plan, model = price(config, given, train=True), polymodal.build(config).eval()
    assert isinstance(model, Generator)
    assert plan.tokens["clip of 9 frames of 30 x 20"] == config.clip_features
    assert plan.tokens["total"] == config.clip_features + 9
    batch = prompt(model, given, {})
    assert len(batch["pixels"]) == 2 * 4, "the frames that are read, not all there are"
    assert plan.inputs == sum(t.nbytes for t in batch.values())
    train = counted(lambda: model.loss(lesson(model, given)).mean.backward())
    model.requires_grad_(False)
    real = {phase: counted(work) for phase, work in runs(model, given).items()} | {"train": train}
    for phase, flops in real.items():
        assert plan.phases[phase].flops == pytest.approx(flops, rel=0.02)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_policy_that_writes_its_actions_is_its_trunk_and_their_tokens(dtype: Any) -> None:
    config = replace(NANO["behaviour_cloning"], head=Tokens(vocab_size=400, hidden_dim=32, num_layers=1))
    plan, model = price(config, Input(new=4, batch=2), dtype=dtype), polymodal.build(config).eval()
    assert isinstance(model, BehaviourCloning)
    head, batch = model.head, nano_batch(model, 2)
    assert isinstance(head, TokenActions)
    ids = torch.zeros(2, 1, dtype=torch.int64)
    model.requires_grad_(False)
    asked = Batch(ids=ids, condition=model(batch))
    assert plan.phases["trunk"].flops == pytest.approx(counted(lambda: model(batch)), rel=0.02)
    memory = head.new_memory(2, 5)
    assert plan.phases["prefill"].flops == pytest.approx(counted(lambda: head.prefill(asked, memory)), rel=0.02)
    assert plan.phases["answer"].flops > plan.phases["prefill"].flops + 3 * plan.phases["step"].flops * 0.9


def test_a_drawing_is_its_condition_its_steps_and_its_decoding() -> None:
    """Four times the places are four times the tokens; the text costs the same."""
    config = NANO["stable_diffusion"]
    plan = price(config, Input(steps=3))
    once, step, decode = (plan.phases[name].flops for name in ("condition", "step", "decode"))
    assert plan.phases["drawing"].flops == once + 3 * step + decode
    assert plan.phases["drawing"].activations == max(
        plan.phases[n].activations for n in ("condition", "step", "decode")
    )
    width, height = painter("stable_diffusion").size
    large = price(config, Input(images=((2 * width, 2 * height),), steps=3))
    (name, *_), (places, *_) = zip(*[(n, k) for n, k in large.tokens.items() if n.startswith("picture")], strict=True)
    assert name == f"picture, {2 * width} x {2 * height}"
    assert places == 4 * plan.tokens[f"picture, {width} x {height}"]
    assert large.phases["decode"].flops >= 4 * decode
    assert large.phases["condition"].flops == once
    with pytest.raises(ConfigError, match="multiples of"):
        price(config, Input(images=((width + 1, height),)))
    with pytest.raises(UnsupportedError, match="one picture"):
        price(config, Input(frames=2))
    with pytest.raises(ConfigError, match="steps is 0"):
        Input(steps=0)


@pytest.mark.slow
def test_a_large_preset_takes_no_memory() -> None:
    """Seven billion parameters: the published count, and the tokens of 336 pixels in patches of 14."""
    plan = price("llava-hf/llava-1.5-7b-hf", Input(images=((800, 600),), text=10, new=10), dtype="bf16")
    assert plan.tokens["picture 1, 800 x 600"] == 576
    assert sum(plan.parameters.values()) == 7_063_427_072
    assert plan.cache == 2 * 32 * 4096 * 2 * 596
    linear = 2 * 6_738_939_904 * 586
    assert 0.9 * linear < plan.phases["prefill"].flops < 1.2 * linear
    assert json.loads(json.dumps(plan.to_json()))["peak"] == plan.peak
    assert "576" in plan.text()


def test_a_folder_is_priced_as_its_config() -> None:
    plan = price("polymodal/nano-clip", Input(images=((32, 48),), text=7))
    model = polymodal.load("polymodal/nano-clip")
    assert sum(plan.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert set(plan.phases) == {"pictures", "texts"}


@pytest.mark.parametrize(
    ("what", "given", "error", "message"),
    [
        ("llava-hf/llava-1.5-7b", {}, ConfigError, "Did you mean"),
        ("llava", {}, ConfigError, "say which: .*llava-hf/"),
        ("no-such-thing", {}, ConfigError, "is called so"),
        (NANO["llava"], {"images": ((0, 0),)}, MediaError, "0 x 0"),
        (NANO["llava"], {"images": ((20_000, 20_000),)}, MediaError, "resize it first"),
        (NANO["llava"], {"images": ((-5, 5),)}, MediaError, "no pixels"),
        (NANO["llava"], {"text": 100}, MediaError, "reads at most 96"),
        (NANO["llava"], {"new": 0}, ConfigError, "new is 0"),
        (NANO["llava"], {"batch": -1}, ConfigError, "batch is -1"),
        (NANO["llava"], {"frames": 2, "fps": 0.0}, ConfigError, r"fps is 0\.0"),
        (NANO["language"], {"images": ((5, 5),)}, UnsupportedError, "reads no pictures"),
        (NANO["clip"], {"text": 9}, MediaError, "reads at most 8"),
        (3, {}, ConfigError, "not the config of a system"),
    ],
)
def test_bad_input(what: Any, given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        price(what, Input(**given))


# ---- time


def rates(**changes: Any) -> Machine:
    flat = ((1, 1e9), (100, 1e9))
    sets = ((1000, flat), (10**6, ((1, 1e8), (100, 1e9))))
    kinds = ("float32", "bfloat16", "packed float32", "packed bfloat16", "int8")
    made = Machine(
        name="here", cpu="a", threads=1, torch="b", date="c", call=1e-6, moves=flat, curves=((1, 1e8),),
        products=dict.fromkeys(kinds, sets), attention={"float32": flat},
        convolution={"float32": 1e9},
    )  # fmt: skip
    return replace(made, **changes)


def test_time_is_the_sum_of_what_each_operation_takes() -> None:
    def work(kind: Any, rows: int = 0, flops: int = 0, size: int = 0) -> Work:
        return Work(kind, rows, flops, size, "float32")

    machine = rates()
    assert machine.seconds({work("view", size=10**9): 3}, 0) == pytest.approx(3e-6)
    assert machine.seconds({work("plain", size=10**9): 2}, 0) == pytest.approx(2 + 2e-6)
    assert machine.seconds({work("curve", size=10**9): 1}, 0) == pytest.approx(10 + 1e-6)
    assert machine.seconds({work("linear", 100, 10**9): 1}, 10**6) == pytest.approx(1 + 1e-6)
    one = {work("linear", 1, 10**9): 1}
    times = [machine.seconds(one, held) for held in (1, 1000, 30_000, 10**6, 10**9)]
    assert times == sorted(times)
    assert times[0] == pytest.approx(1 + 1e-6)
    assert times[-1] == pytest.approx(10 + 1e-6)


def test_layers_are_packed_as_commands_pack_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path))
    slow = rates()
    fast = {name: ((1, ((1, 1e12),)),) for name in slow.products if name.startswith("packed")}
    given = Input(text=5, new=2)

    def seconds(machine: Machine, **options: Any) -> dict[str, float | None]:
        with monkeypatch.context() as patch:
            patch.setattr(Machine, "read", lambda: machine)
            return {name: phase.seconds for name, phase in price(NANO["language"], given, **options).phases.items()}

    packed = replace(slow, products={**slow.products, **fast})
    for dtype in ("fp32", "bf16") if can_pack(torch.bfloat16) else ("fp32",):
        before, after = seconds(slow, dtype=dtype), seconds(packed, dtype=dtype)
        assert all((after[name] or 0) < (before[name] or 0) for name in before)
    assert seconds(slow, dtype="int8") == seconds(packed, dtype="int8")
    assert seconds(slow, train=True)["train"] == seconds(packed, train=True)["train"]


def test_without_rates_of_this_machine_the_plan_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path))
    plan = price(NANO["clip"], Input(text=5))
    assert plan.machine is None
    assert "never measured" in plan.note
    assert all(phase.seconds is None for phase in plan.phases.values())
    file = rates().save()
    with pytest.raises(ConfigError, match=r"no longer holds.*--calibrate"):
        Machine.read()
    file.write_text("[]")
    with pytest.raises(ConfigError, match="another version"):
        Machine.read()
    file.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        Machine.read()


def test_kept_rates_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path))
    monkeypatch.setattr("polymodal.machine._cpu", lambda: "a")
    kept = rates(torch=torch.__version__, threads=torch.get_num_threads())
    kept.save()
    assert Machine.read() == kept
    plan = price(NANO["llava"], NANO_INPUT)
    assert plan.machine == "here"
    assert all(phase.seconds and phase.seconds > 0 for phase in plan.phases.values())
    assert "time on here" in plan.text()


# ---- a run without numbers


def test_integers_are_real_and_numbers_are_not() -> None:
    dry = DryRun()
    x = dry.empty((4, 3))
    with dry.counted() as (work, held):
        mask = torch.arange(4) > 1
        y = x[mask] @ dry.empty((3, 5))
        assert int(mask.sum()) == 2
    assert y.shape == (2, 5)
    assert sum(item.flops for item in work) == 2 * 2 * 3 * 5
    assert held.peak >= 4 * (2 * 3 + 2 * 5)


# ---- the checklist


def test_the_checklist_recommends_what_fits() -> None:
    found = recommend({"output": "vectors", "input": "photos", "goal": "speed"}, memory=4)
    assert found.plan.peak < 4 * 2**30
    assert [step for step, _ in found.steps] == [
        "output", "encoder", "fusion", "resolution and tokens", "action", "evaluation",
    ]  # fmt: skip
    assert found.preset in found.text()
    json.dumps(found.to_json())


@pytest.mark.parametrize(
    ("answers", "memory", "error"),
    [
        ({"output": "vector"}, 8, ConfigError),
        ({"colour": "red"}, 8, ConfigError),
        ({"output": "vectors"}, 0.001, ConfigError),
        ({"output": "actions"}, 8, UnsupportedError),
        ({"output": "vectors", "input": "words"}, 8, UnsupportedError),
    ],
)
def test_the_checklist_refuses(answers: dict[str, str], memory: float, error: type[Exception]) -> None:
    with pytest.raises(error):
        recommend(answers, memory)


def test_every_path_of_the_checklist_ends() -> None:
    for output in QUESTIONS[0].options:
        for kind in QUESTIONS[1].options:
            with pytest.raises((ConfigError, UnsupportedError), match=r"fits|no system"):
                recommend({"output": output, "input": kind}, memory=1e-9)
