"""How diffusers writes the way in which a diffusion is sampled: the schedulers' configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from polymodal.nn.noise import Prediction, Schedule
from polymodal.samplers.diffusion import DDIM, DDPM, PLMS, Diffusion, DPMSolver, Euler, Heun, Solver, Spacing
from polymodal.weights.fields import Fields
from polymodal.weights.pipeline import CLASS, diffusers_part, part

PREDICTIONS: Final[dict[str, Prediction]] = {"epsilon": "noise", "sample": "sample", "v_prediction": "velocity"}
_CURVES: Final = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "squared_cosine"}
_SPACINGS: Final[dict[str, Spacing]] = {name: name for name in ("leading", "trailing", "linspace")}
_SOLVERS: Final[dict[str, Solver]] = {
    "DDIMScheduler": DDIM(), "PNDMScheduler": PLMS(), "EulerDiscreteScheduler": Euler(),
    "HeunDiscreteScheduler": Heun(), "DPMSolverMultistepScheduler": DPMSolver(), "DDPMScheduler": DDPM(),
}  # fmt: skip
_SPACED: Final = {"DPMSolverMultistepScheduler": "linspace", "EulerDiscreteScheduler": "linspace"} | {
    "HeunDiscreteScheduler": "linspace"
}
# Those that heed clip_sample, and its default.
_CLIPS: Final = {"DDIMScheduler": True, "DDPMScheduler": True, "HeunDiscreteScheduler": False}
_ENDS: Final = {"DDIMScheduler": True, "PNDMScheduler": False}  # those that heed set_alpha_to_one, and its default
_NEVER_ZERO: Final = ("PNDMScheduler", "HeunDiscreteScheduler")  # those that know no rescale_betas_zero_snr
_FIXED: Final[dict[str, tuple[Any, ...]]] = {
    "trained_betas": (None,), "thresholding": (False,), "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None), "use_beta_sigmas": (False, None), "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None), "interpolation_type": ("linear",), "sigma_min": (None,), "sigma_max": (None,),
    "timestep_type": ("discrete",), "final_sigmas_type": ("zero",), "solver_order": (2,), "solver_type": ("midpoint",),
    "algorithm_type": ("dpmsolver++",), "lower_order_final": (True,), "euler_at_final": (False,),
    "skip_prk_steps": (True,), "use_dynamic_shifting": (False, None),
}  # fmt: skip
_IGNORED: Final = (
    "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type", "lambda_min_clipped",
)  # fmt: skip


def read_scheduler(f: Fields, raw: Mapping[str, Any]) -> Diffusion:
    """What the scheduler in the whole config of a pipeline says."""
    child, entry = part(f, "scheduler", *_SOLVERS), raw.get("scheduler")
    return read_diffusion(child, str(entry.get(CLASS)) if isinstance(entry, Mapping) else "")


def write_scheduler(d: Diffusion) -> dict[str, Any]:
    """The entry that `read_scheduler` reads."""
    return diffusers_part(*write_diffusion(d))


def read_diffusion(f: Fields, name: str) -> Diffusion:
    """What a scheduler's config says; ``name`` is the class that it is of."""
    solver = _SOLVERS.get(name, DDIM())
    for field, values in _FIXED.items():
        f.require(field, *values)
    f.ignore("of an option that is off", *_IGNORED)
    total = f.take("num_train_timesteps", int, 1000, least=2, most=100_000)
    first, last = f.take("beta_start", float, 0.0001), f.take("beta_end", float, 0.02)
    curve = f.choose("beta_schedule", _CURVES, "linear")
    prediction = f.choose("prediction_type", PREDICTIONS, "epsilon")
    spacing = f.choose("timestep_spacing", _SPACINGS, _SPACED.get(name, "leading"))
    offset = f.take("steps_offset", int, 0, least=0, most=total - 1)
    if name in _NEVER_ZERO:
        f.require("rescale_betas_zero_snr", False)
    zero_snr = f.take("rescale_betas_zero_snr", bool, False) and name not in _NEVER_ZERO
    clip, limit = f.take("clip_sample", bool, _CLIPS.get(name, False)), f.take("clip_sample_range", float, 1.0)
    end = f.take("set_alpha_to_one", bool, _ENDS.get(name, True))
    variance = f.take("variance_type", str, "fixed_small") if f.has("variance_type") else "fixed_small"
    f.require("variance_type", None, "fixed_small", "fixed_large", "learned_range")
    if isinstance(solver, DDPM) and variance == "fixed_large":
        solver = DDPM(variance="large")
    if not 0 < first <= last < 1:
        f.problems.append(f"scheduler: noise grows from beta_start {first} to beta_end {last}, which it cannot")
        first, last = 0.0001, 0.02
    if zero_snr and prediction == "noise":
        f.problems.append("scheduler: rescale_betas_zero_snr needs another prediction_type than epsilon")
        zero_snr = False
    return Diffusion(
        schedule=Schedule(curve=curve, first=first, last=last, steps=total, zero_snr=zero_snr),  # type: ignore[arg-type]
        prediction=prediction, solver=solver, spacing=spacing, offset=offset,
        clip=limit if clip and name in _CLIPS else None, clean=end if name in _ENDS else True,
    )  # fmt: skip


def write_diffusion(d: Diffusion) -> tuple[str, dict[str, Any]]:
    """The class and the fields that `read_diffusion` reads."""
    s = d.schedule
    name = next(cls for cls, solver in _SOLVERS.items() if type(solver) is type(d.solver))
    curves, predictions = ({ours: theirs for theirs, ours in table.items()} for table in (_CURVES, PREDICTIONS))
    raw: dict[str, Any] = {
        "num_train_timesteps": s.steps, "beta_start": s.first, "beta_end": s.last, "beta_schedule": curves[s.curve],
        "prediction_type": predictions[d.prediction], "timestep_spacing": d.spacing, "steps_offset": d.offset,
        "rescale_betas_zero_snr": s.zero_snr,
    }  # fmt: skip
    if name in _CLIPS:
        raw |= {"clip_sample": d.clip is not None, "clip_sample_range": 1.0 if d.clip is None else d.clip}
    if name in _ENDS:
        raw["set_alpha_to_one"] = d.clean
    if name == "PNDMScheduler":
        raw["skip_prk_steps"] = True
    if name in _NEVER_ZERO:
        del raw["rescale_betas_zero_snr"]
    if isinstance(d.solver, DDPM):
        raw["variance_type"] = f"fixed_{d.solver.variance}"
    return name, raw


def read_karras(f: Fields) -> tuple[float, float]:
    """The largest and the smallest deviation of noise that a scheduler takes in Karras et al.'s way, with continuous
    times and the velocity as the prediction."""
    f.require("use_karras_sigmas", True)
    f.require("timestep_type", "continuous")
    f.require("prediction_type", "v_prediction")
    for name in ("use_karras_sigmas", "timestep_type", "prediction_type"):
        if name not in f:
            f.problems.append(f"scheduler: {name} is missing, and its default is not supported")
    for name in ("use_exponential_sigmas", "use_beta_sigmas", "rescale_betas_zero_snr"):
        f.require(name, False, None)
    f.require("final_sigmas_type", "zero")
    f.ignore(
        "of schedules that go by steps", "beta_start", "beta_end", "beta_schedule", "num_train_timesteps",
        "trained_betas", "steps_offset", "timestep_spacing", "interpolation_type", "clip_sample", "set_alpha_to_one",
        "skip_prk_steps",
    )  # fmt: skip
    most, least = f.take("sigma_max", float), f.take("sigma_min", float)
    if not 0 < least < most:
        f.problems.append(f"scheduler: deviations from sigma_max {most} to sigma_min {least}")
        return 2.0, 1.0
    return most, least


def write_karras(most: float, least: float) -> dict[str, Any]:
    """The entry that `read_karras` reads."""
    raw = {
        "sigma_max": most, "sigma_min": least, "use_karras_sigmas": True, "timestep_type": "continuous",
        "prediction_type": "v_prediction", "timestep_spacing": "leading", "steps_offset": 1, "beta_start": 0.00085,
        "beta_end": 0.012, "beta_schedule": "scaled_linear",
    }  # fmt: skip
    return diffusers_part("EulerDiscreteScheduler", raw)
