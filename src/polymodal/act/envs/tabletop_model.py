"""The body of the table-top: a gripper on slides, things of one kind in several slots, plates, lights, cameras."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np

from polymodal.act.envs.render import mujoco
from polymodal.act.envs.tabletop_words import COLOURS
from polymodal.core.errors import ConfigError

HALF_HEIGHT: Final = {"cube": 0.025, "cup": 0.03, "ball": 0.027}  # metres, of things as they lie

_SHAPES: Final = {
    "cube": '<geom type="box" size="0.025 0.025 0.025" class="thing"/>',
    # A box is felt and not seen: round sides spin on flat ones.
    "cup": """<geom type="box" size="0.022 0.022 0.03" class="thing" group="3"/>
      <geom type="cylinder" size="0.025 0.03" class="look"/>
      <geom name="dark{slot}" type="cylinder" size="0.018 0.001" pos="0 0 0.03" rgba="0.08 0.08 0.08 1" class="look"/>
      <geom type="box" size="0.005 0.011 0.014" pos="0 -0.034 0.002" class="look"/>""",
    "ball": '<geom type="sphere" size="0.027" class="thing" condim="6" friction="1 0.02 0.005"/>',
}

_MODEL: Final = """
<mujoco>
  <option timestep="0.01" integrator="implicitfast" cone="elliptic" impratio="5"/>
  <statistic center="0 0 0" extent="1"/>
  <visual>
    <headlight ambient="0.45 0.45 0.45" diffuse="0.35 0.35 0.35" specular="0 0 0"/>
    <map znear="0.01" zfar="5"/>
  </visual>
  <asset>
    <texture name="checker" type="2d" builtin="checker" rgb1="1 1 1" rgb2="0.75 0.75 0.75" width="64" height="64"/>
    <texture name="clouds" type="2d" builtin="gradient" rgb1="1 1 1" rgb2="0.6 0.6 0.6" width="64" height="64"/>
    <material name="plain"/>
    <material name="checker" texture="checker" texrepeat="6 6"/>
    <material name="clouds" texture="clouds" texrepeat="5 5"/>
  </asset>
  <default>
    <default class="thing"><geom mass="0.05" condim="4" friction="1 0.02 0.001"/></default>
    <default class="look"><geom contype="0" conaffinity="0" mass="0"/></default>
    <default class="finger">
      <geom type="box" size="0.006 0.015 0.032" pos="0 0 0.022" mass="0.05" condim="4" friction="1.5 0.05 0.001"
        rgba="0.9 0.9 0.92 1"/>
    </default>
  </default>
  <worldbody>
    <light directional="true" pos="0 0 2" dir="0.2 0.3 -1" diffuse="0.45 0.45 0.45" specular="0.1 0.1 0.1"/>
    <body name="focus" mocap="true" pos="0 0.02 0.025"/>
    <body name="plate0" mocap="true" pos="0 0 -0.3">{plate}</body>
    <body name="plate1" mocap="true" pos="0 0 -0.3">{plate}</body>
    <camera name="front" mode="targetbody" target="focus" pos="0 -0.50 0.62" fovy="35"/>
    <geom name="table" type="box" size="0.6 0.6 0.02" pos="0 0 -0.02" rgba="0.36 0.34 0.33 1" material="plain"/>
    <body name="hand" gravcomp="1">
      <joint name="x" type="slide" axis="1 0 0"/>
      <joint name="y" type="slide" axis="0 1 0"/>
      <joint name="z" type="slide" axis="0 0 1"/>
      <geom type="box" size="0.052 0.016 0.010" pos="0 0 0.064" rgba="0.12 0.12 0.14 1" mass="0.8"/>
      <geom type="cylinder" size="0.014 0.02" pos="0 0 0.094" rgba="0.12 0.12 0.14 1" class="look"/>
      <camera name="wrist" pos="0 -0.085 0.115" xyaxes="1 0 0 0 0.87 0.5" fovy="70"/>
      <body gravcomp="1" pos="-0.006 0 0">
        <joint name="left" type="slide" axis="-1 0 0" range="0 0.04" limited="true"/><geom class="finger"/>
      </body>
      <body gravcomp="1" pos="0.006 0 0">
        <joint name="right" type="slide" axis="1 0 0" range="0 0.04" limited="true"/><geom class="finger"/>
      </body>
    </body>
    {things}
  </worldbody>
  <contact><exclude body1="world" body2="hand"/></contact>
  <actuator>
    <position joint="x" kp="1500" kv="75"/>
    <position joint="y" kp="1500" kv="75"/>
    <position joint="z" kp="1500" kv="75"/>
    <position joint="left" kp="500" kv="12" forcerange="-12 12"/>
    <position joint="right" kp="500" kv="12" forcerange="-12 12"/>
  </actuator>
</mujoco>
"""


def model_of(kinds: Sequence[str]) -> mujoco.MjModel:
    """The model with two slots of each kind, or four of the only one.

    ``qpos[:5]`` and ``ctrl[:5]`` are the finger tips' x, y, z and the fingers' distances from the middle. Plates are
    mocap bodies 1 and 2, out of sight below the table; things float far away. Mocap body 0 is what the first camera
    aims at.
    """
    slots = 2 if len(kinds) > 1 else 4
    # Thin and not felt: things stand on the table through them.
    plate = (
        '<geom type="cylinder" size="0.06 0.003" mass="0.1" rgba="0.93 0.93 0.93 1" class="look"/>'
        '<geom type="cylinder" size="0.042 0.004" rgba="0.78 0.78 0.8 1" class="look"/>'
    )
    names = [f"{kind}{n}" for kind in kinds for n in range(slots)]
    things = "".join(
        f'<body name="{name}" pos="{5 + i} 5 5" gravcomp="1"><freejoint/>{_SHAPES[name[:-1]].format(slot=i)}</body>'
        for i, name in enumerate(names)
    )
    return mujoco.MjModel.from_xml_string(_MODEL.format(plate=plate, things=things))


@dataclass(frozen=True, kw_only=True)
class Randomisation:
    """How much scenes differ from each other beyond where things are: 0 is not at all, 1 is much."""

    light: float | int = 0.0  # brightness and direction
    texture: float | int = 0.0  # pattern and colour of the table
    camera: float | int = 0.0  # place, aim and opening
    mass: float | int = 0.0
    friction: float | int = 0.0
    delay: int = 0  # an action takes effect up to so many steps late

    def __post_init__(self) -> None:
        if not all(0 <= getattr(self, f.name) <= (10 if f.name == "delay" else 1) for f in fields(self)):
            raise ConfigError(f"randomisation is from 0 to 1, the delay from 0 to 10 steps: {self}")


MUCH: Final = Randomisation(light=1.0, texture=1.0, camera=1.0, mass=1.0, friction=1.0, delay=2)


class Look:
    """A model that looks and weighs differently in each episode.

    Args:
        model: what it is when nothing is randomised.
        amount: how much it differs.
    """

    def __init__(self, model: mujoco.MjModel, amount: Randomisation) -> None:
        self._model, self._amount = model, amount
        light = model.vis.headlight
        self._varied = {name: getattr(model, name) for name in _VARIED} | {"ambient": light.ambient}
        self._usual = {name: value.copy() for name, value in self._varied.items()}

    def draw(self, things: Mapping[tuple[str, str], int], data: mujoco.MjData, rng: np.random.Generator) -> int:
        """A new look for the bodies of the things by their colour and kind; how many steps late actions are."""
        for name, value in self._usual.items():
            self._varied[name][:] = value
        model, r = self._model, self._amount
        u = rng.uniform(-1, 1, 48)  # always as many: what is randomised does not move what is put where
        model.vis.headlight.ambient[:] *= math.exp(0.5 * r.light * u[0])
        model.light_diffuse[0] *= math.exp(0.5 * r.light * u[1])
        model.light_dir[0, :2] += 0.6 * r.light * u[2:4]
        table = model.geom("table").id
        if r.texture:
            model.geom_matid[table] = model.material(_PATTERNS[int(1.5 * (u[4] + 1))]).id
            tint = model.geom_rgba[table, :3] + r.texture * (0.15 * u[5] + 0.06 * u[6:9])
            model.geom_rgba[table, :3] = np.clip(tint, 0, 1)
        model.cam_pos[:] += 0.04 * r.camera * u[9:15].reshape(2, 3) * [[1], [0.1]]
        model.cam_fovy[:] *= 1 + 0.06 * r.camera * u[15:17]
        data.mocap_pos[0] += 0.02 * r.camera * u[17:20]
        for n, ((colour, _), body) in enumerate(things.items()):
            geoms = model.body_geomadr[body] + np.arange(model.body_geomnum[body])
            model.geom_rgba[[g for g in geoms if not model.geom(g).name.startswith("dark")], :3] = COLOURS[colour]
            model.geom_friction[geoms, 0] *= 1.5 ** (r.friction * u[20 + n])
            factor = 2 ** (r.mass * u[24 + n])
            model.body_mass[body] *= factor
            model.body_inertia[body] *= factor
            model.body_gravcomp[body] = 0
        return round((u[28] + 1) / 2 * r.delay)


_PATTERNS: Final = ("plain", "checker", "clouds")
_VARIED: Final = (
    "light_diffuse", "light_dir", "geom_matid", "geom_rgba", "geom_friction", "cam_pos", "cam_fovy",
    "body_mass", "body_inertia", "body_gravcomp",
)  # fmt: skip
