"""scheduler_config.json, from and to diffusers: every field is read, required or ignored for a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest

from polymodal.core.errors import ConfigError
from polymodal.samplers.diffusion import DDIM, DDPM, PLMS, Diffusion, DPMSolver, Euler, Heun
from polymodal.samplers.flow import Flow, Sampling
from polymodal.systems.flow_files import FLOW, read_flow, write_flow
from polymodal.systems.scheduler_files import read_diffusion, read_scheduler, write_diffusion
from polymodal.weights.fields import Fields

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers, with numpy 2
CLASSES = {
    "DDIMScheduler": DDIM, "DDPMScheduler": DDPM, "EulerDiscreteScheduler": Euler, "HeunDiscreteScheduler": Heun,
    "DPMSolverMultistepScheduler": DPMSolver, "PNDMScheduler": PLMS,
}  # fmt: skip
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in CLASSES if name != "PNDMScheduler"),
    ("PNDMScheduler", {**LATENT, "skip_prk_steps": True, "set_alpha_to_one": False}),  # Stable Diffusion 1
    ("EulerDiscreteScheduler", {**LATENT, "timestep_spacing": "leading"}),  # SDXL
    ("DDIMScheduler", {**LATENT, "clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"}),
    ("DDIMScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "sample"}),
    ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_large"}),
    ("HeunDiscreteScheduler", {"clip_sample": True, "clip_sample_range": 2.0}),
    ("DPMSolverMultistepScheduler", {**LATENT, "timestep_spacing": "trailing"}),
    (FLOW, {}), (FLOW, {"shift": 3.0}),
    (FLOW, {"use_dynamic_shifting": True, "shift": 3.0, "max_shift": 0.9, "base_image_seq_len": 64}),
]  # fmt: skip


def read(raw: dict[str, Any], name: str) -> Sampling:
    f = Fields(raw, "scheduler")
    f.require("_class_name", name)
    f.ignore("bookkeeping of diffusers", "_diffusers_version", "_use_default_values")
    sampling = read_flow(f, "trained") if name == FLOW else read_diffusion(f, name)
    f.done()
    return sampling


def write(sampling: Sampling) -> dict[str, Any]:
    if isinstance(sampling, Flow):
        return {k: v for k, v in write_flow(sampling).items() if not k.startswith("_")}
    return write_diffusion(sampling)[1]


def grid(scheduler: Any) -> list[float]:
    scheduler.set_timesteps(7, **({"mu": 0.8} if scheduler.config.get("use_dynamic_shifting") else {}))
    steps = scheduler.timesteps.tolist()
    doubled = isinstance(scheduler, diffusers.HeunDiscreteScheduler | diffusers.PNDMScheduler)
    return list(dict.fromkeys(steps)) if doubled else steps


@pytest.mark.parametrize(("name", "more"), CASES)
def test_what_diffusers_writes_is_read_and_what_we_write_is_read_there(
    name: str, more: dict[str, Any], tmp_path: Path
) -> None:
    scheduler = getattr(diffusers, name)(**more)
    scheduler.save_config(tmp_path)
    raw = json.loads((tmp_path / "scheduler_config.json").read_text())
    sampling = read(raw, name)
    again = getattr(diffusers, name).from_config(write(sampling))
    changed = {k: (v, scheduler.config.get(k)) for k, v in again.config.items() if v != scheduler.config.get(k)}
    assert set(changed) <= {"shift", "_use_default_values"}, changed  # a dynamic shift has no other
    assert grid(again) == pytest.approx(grid(scheduler))
    assert read(dict(again.config), name) == sampling
    if not raw.get("use_dynamic_shifting"):
        unit = 1000 if isinstance(sampling, Flow) else 1
        assert [p.when * unit for p in sampling.points(7, 0)[:-1]] == pytest.approx(grid(scheduler), rel=1e-5)


def test_each_class_has_its_solver() -> None:
    for name, solver in CLASSES.items():
        found = read({"skip_prk_steps": True} if name == "PNDMScheduler" else {}, name)
        assert isinstance(found, Diffusion)
        assert type(found.solver) is solver


def test_unknown_classes_are_refused() -> None:
    raw = {"scheduler": {"_library": "diffusers", "_class_name": "UniPCMultistepScheduler", "solver_order": 2}}
    f = Fields(raw, "model_index.json")
    read_scheduler(f, raw)
    with pytest.raises(ConfigError, match=r"UniPCMultistepScheduler.*only 'DDIMScheduler' or"):
        f.done()


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("DDIMScheduler", {"thresholding": True}, "thresholding"), ("DDIMScheduler", {"unheard_of": 1}, "unheard_of"),
        ("DDIMScheduler", {"trained_betas": [0.1]}, "trained_betas"),
        ("DDIMScheduler", {"beta_start": "x"}, "beta_start"),
        ("DDIMScheduler", {"beta_schedule": "sigmoid"}, "sigmoid"), ("DDIMScheduler", {"beta_end": 2.0}, "beta_end"),
        ("DDIMScheduler", {"prediction_type": "flow"}, "flow"), ("DDIMScheduler", {"num_train_timesteps": 0}, "0"),
        ("DDIMScheduler", {"num_train_timesteps": 10**12}, "num_train"), ("DDIMScheduler", {"steps_offset": -1}, "-1"),
        ("DDIMScheduler", {"beta_start": 0.5, "beta_end": 0.1}, "cannot"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, "sigma_min"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "continuous"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "solver_order"),
        ("PNDMScheduler", {"skip_prk_steps": False}, "skip_prk_steps"),
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type"),
        ("EulerDiscreteScheduler", {"_class_name": "X"}, "X"),
        (FLOW, {"shift": 0.0}, "shift"), (FLOW, {"shift_terminal": 0.02}, "shift_terminal"),
        ("DDIMScheduler", {"beta_end": 0.9}, "some of the signal left"), (FLOW, {"max_shift": 1e6}, "max_shift"),
        (FLOW, {"base_shift": 1e6}, "base_shift"), (FLOW, {"shift": 1e-17}, "shift"),
        (FLOW, {"invert_sigmas": True}, "invert_sigmas"), (FLOW, {"base_image_seq_len": 5000}, "5000"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused(name: str, raw: dict[str, Any], words: str) -> None:
    raw = {"skip_prk_steps": True, **raw} if name == "PNDMScheduler" else raw
    with pytest.raises(ConfigError, match=words):
        read(raw, name)


def test_the_published_files_are_read() -> None:
    """As they lie on the Hub: those of one family carry fields of each other."""
    v1_5 = {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
    }  # fmt: skip
    assert read(v1_5, "PNDMScheduler") == Diffusion(solver=PLMS(), offset=1, clean=False)
    v2_1 = v1_5 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    assert read(v2_1, "DDIMScheduler") == Diffusion(prediction="velocity", offset=1, clean=False)
    sdxl = v1_5 | {
        "_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "prediction_type": "epsilon",
        "sample_max_value": 1.0, "timestep_spacing": "leading", "use_karras_sigmas": False,
    }  # fmt: skip
    assert read(sdxl, "EulerDiscreteScheduler") == Diffusion(solver=Euler(), offset=1)
    schnell = {
        "_class_name": FLOW, "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15,
        "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False,
    }  # fmt: skip
    assert read(schnell, FLOW) == Flow()
