"""Rotations: matrices, 6-D, quaternions, Euler angles and axis-angle vectors, any to any.

6-D are the first two columns of the matrix, one after the other (arXiv 1812.07035). Euler angles are roll, pitch and
yaw in radians about the fixed x, y and z axes, in this order. Quaternions have the scalar first (MuJoCo) or, as
``quaternion_xyzw``, last (ROS, SciPy, robosuite); the scalar is never negative. Flat matrices go row by row.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Rotation: TypeAlias = Literal["matrix", "6d", "quaternion", "quaternion_xyzw", "euler", "axis_angle"]
WIDTHS: Final = {"matrix": 9, "6d": 6, "quaternion": 4, "quaternion_xyzw": 4, "euler": 3, "axis_angle": 3}


def convert(x: Float[Tensor, "*batch width"], source: Rotation, target: Rotation) -> Float[Tensor, "*batch other"]:
    """Rotations in another notation; those of a network (6-D, quaternions) need not be of unit length."""
    return from_matrix(to_matrix(x, source), target)


def to_matrix(x: Float[Tensor, "*batch width"], source: Rotation) -> Float[Tensor, "*batch 3 3"]:
    """Rotations as matrices; see `convert`."""
    assert x.shape[-1] == WIDTHS[source], f"{source} has {WIDTHS[source]} numbers, not {x.shape[-1]}"
    if source == "matrix":
        return x.unflatten(-1, (3, 3))
    if source == "6d":
        first = F.normalize(x[..., :3], dim=-1)
        second = F.normalize(x[..., 3:] - (first * x[..., 3:]).sum(-1, keepdim=True) * first, dim=-1)
        return torch.stack((first, second, torch.linalg.cross(first, second)), -1)
    if source == "euler":
        (cr, cp, cy), (sr, sp, sy) = x.cos().unbind(-1), x.sin().unbind(-1)
        x_axis = (cy * cp, sy * cp, -sp)
        y_axis = (cy * sp * sr - sy * cr, sy * sp * sr + cy * cr, cp * sr)
        z_axis = (cy * sp * cr + sy * sr, sy * sp * cr - cy * sr, cp * cr)
        return torch.stack((*x_axis, *y_axis, *z_axis), -1).unflatten(-1, (3, 3)).mT
    if source == "axis_angle":
        angle = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        # sinc is smooth at 0, where the axis has no direction.
        x = torch.cat(((angle / 2).cos(), x / 2 * torch.sinc(angle / (2 * torch.pi))), -1)
    w, i, j, k = F.normalize(x.roll(1, -1) if source == "quaternion_xyzw" else x, dim=-1).unbind(-1)
    x_axis = (1 - 2 * (j * j + k * k), 2 * (i * j + k * w), 2 * (i * k - j * w))
    y_axis = (2 * (i * j - k * w), 1 - 2 * (i * i + k * k), 2 * (j * k + i * w))
    z_axis = (2 * (i * k + j * w), 2 * (j * k - i * w), 1 - 2 * (i * i + j * j))
    return torch.stack((*x_axis, *y_axis, *z_axis), -1).unflatten(-1, (3, 3)).mT


def from_matrix(matrix: Float[Tensor, "*batch 3 3"], target: Rotation) -> Float[Tensor, "*batch width"]:
    """Matrices in another notation; the inverse of `to_matrix`."""
    if target == "matrix":
        return matrix.flatten(-2)
    if target == "6d":
        return matrix[..., :2].mT.flatten(-2)
    if target == "euler":
        flat = torch.hypot(matrix[..., 2, 1], matrix[..., 2, 2])
        locked = flat < 1e-6  # pitch of 90 degrees: only roll minus or plus yaw is known; roll is called 0
        roll = torch.where(locked, 0, torch.atan2(matrix[..., 2, 1], matrix[..., 2, 2]))
        free = torch.atan2(matrix[..., 1, 0], matrix[..., 0, 0])
        yaw = torch.where(locked, torch.atan2(-matrix[..., 0, 1], matrix[..., 1, 1]), free)
        return torch.stack((roll, torch.atan2(-matrix[..., 2, 0], flat), yaw), -1)
    q = _quaternion(matrix)
    if target == "axis_angle":
        length = torch.linalg.vector_norm(q[..., 1:], dim=-1, keepdim=True)
        half = torch.atan2(length, q[..., :1])
        return q[..., 1:] * torch.where(length < 1e-6, 2.0, 2 * half / length.clamp_min(1e-12))
    return q.roll(-1, -1) if target == "quaternion_xyzw" else q


def _quaternion(m: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 4"]:
    """Scalar first, from whichever of its four numbers is largest: the others are divided by it."""
    xx, yy, zz = m.diagonal(dim1=-2, dim2=-1).unbind(-1)
    w2, x2, y2, z2 = 1 + xx + yy + zz, 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz
    a, b, c = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    d, e, f = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    # Row n is the quaternion times four times its own n-th number.
    rows = torch.stack((w2, a, b, c, a, x2, d, e, b, d, y2, f, c, e, f, z2), -1).unflatten(-1, (4, 4))
    largest = torch.stack((w2, x2, y2, z2), -1).argmax(-1)[..., None, None].expand(*m.shape[:-2], 1, 4)
    q = F.normalize(rows.gather(-2, largest)[..., 0, :], dim=-1)
    return torch.where(q[..., :1] < 0, -q, q)
