# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Adaptation of the step size and the trajectory length, pooled over all chains.

**References**

1. MCMC Using Hamiltonian Dynamics (Neal, 2011), https://arxiv.org/abs/1206.1901
2. An Adaptive-MCMC Scheme for Setting Trajectory Lengths in Hamiltonian Monte Carlo (Hoffman, Radul,
   Sountsov, 2021), https://proceedings.mlr.press/v130/hoffman21a.html
"""

import math
from statistics import geometric_mean

import torch
from torch import Tensor

from .preconditioning import Preconditioner
from .trajectories import TrajectoryInfo

# target acceptance rate (Neal 2011, section 5.4.4, recommends 0.65 to 0.8)
_ACCEPTANCE = 0.8
# learning rate of Adam on the log length, and decay of its second moment (both from reference 2)
_RATE, _DECAY = 0.025, 0.95
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class StepSize:
    """Adapts the step size to a target acceptance rate.

    Inverts, after each trajectory, the acceptance rate 2 Phi(-s / 2), where s grows with the square of the
    step size (reference 1, section 5.4.4).
    """

    def __init__(self, dim: int) -> None:
        # the error of the energy grows as h^2 sqrt(D)
        self.value = min(2 * dim**-0.25, 0.9)
        self._recent: list[float] = []

    def update(self, info: TrajectoryInfo) -> None:
        """Updates the step size after one trajectory of every chain."""
        # the edge of a support makes trajectories diverge at any step size: count the others, unless few are
        # left
        inside = info.acceptance[~info.is_divergent]
        counted = inside if 4 * len(inside) > len(info.acceptance) else info.acceptance
        rates = [_ACCEPTANCE, min(max(float(counted.mean()), 0.02), 0.999)]
        tails = torch.tensor(rates, dtype=torch.float64, device="cpu") / 2
        sought, actual = (-2 * torch.special.ndtri(tails)).tolist()
        self.value *= min(max(math.sqrt(sought / actual), 1 / 3), 1.5)
        self._recent.append(self.value)

    def limit(self, most: float) -> None:
        """Caps the step size."""
        self.value = min(self.value, most)
        self._recent[-1:] = [self.value]

    def settle(self) -> None:
        """Sets the geometric mean of the last half of the step sizes since the previous call."""
        if half := self._recent[len(self._recent) // 2 :]:
            self.value = geometric_mean(half)
        self._recent = []


class TrajectoryLength:
    """Adapts the integration time by ChEES (reference 2): ascent on the change in squared distance."""

    def __init__(self) -> None:
        #: the mean integration time: at first a quarter period of a standard normal
        self.value = math.pi / 2
        self._second, self._count = 0.0, 0

    def next(self, count: int) -> float:
        """The next integration time, jittered: a constant one may be a whole period."""
        return 2 * self.value * (0.075 + 0.85 * (count * _GOLDEN_RATIO % 1))

    def update(self, start: Tensor, info: TrajectoryInfo, preconditioner: Preconditioner) -> None:
        """Updates the mean time after one trajectory of every chain, from points ``start`` ``(C, D)``."""
        rates, scale = info.acceptance, preconditioner.scale
        total = rates.sum().clamp_min(torch.finfo(rates.dtype).tiny)
        before, after = start / scale, info.proposal.base / scale
        before = before - before.mean(0)
        after = after - (rates[:, None] * after).sum(0) / total
        velocity = preconditioner(info.momentum) / scale
        change = after.square().sum(-1) - before.square().sum(-1)
        slope = info.duration * change * (after * velocity).sum(-1)
        slope = torch.where(rates > 0, slope, 0.0).nan_to_num(0.0, 0.0, 0.0)
        gradient = float((rates * slope).sum() / total)
        self._count += 1
        self._second = _DECAY * self._second + (1 - _DECAY) * gradient**2
        size = math.sqrt(self._second / (1 - _DECAY**self._count))
        if size > 0:
            longer = self.value * math.exp(_RATE * gradient / size)
            self.value = min(max(longer, 0.3), 60.0)
