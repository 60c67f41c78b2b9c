# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Exact inverses of increasing functions that have none in closed form."""

import torch
from torch import Tensor

from ..arguments import values_can_be_read
from .base import ElementwiseTransform


class MonotoneTransform(ElementwiseTransform):
    """An increasing elementwise transform without a closed-form inverse.

    A subclass implements :meth:`call_and_ladj` and :meth:`bracket`. The inverse is found by Newton steps
    that a bracket guards, and is exact to round-off for every ``y``. Its gradients come from the implicit
    function theorem, so they cost the same however many steps the search took.
    """

    #: The largest number of steps of the search.
    max_steps = 200
    #: The number of steps where convergence cannot be tested: ``torch.jit, torch.compile, torch.func``.
    fixed_steps = 32

    def bracket(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Finite bounds ``low`` and ``high`` of the inverse of ``y``, of the shape of the result.

        :param y: finite, shape ``(*, D)``.
        """
        raise NotImplementedError

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        finite = y.isfinite()
        target = torch.where(finite, y, 0.0)
        # a trace does not record no_grad, and forward-mode differentiation ignores it: so detach as well
        with torch.no_grad():
            low, high = self.bracket(target.detach())
            x = self._solve(target.detach().expand_as(low), low, high).detach()
        # Newton's method converges quadratically: the derivative of a Newton step with respect to
        # its starting point is zero at the root. So one step from a detached root has the exact
        # first derivatives (those of the implicit function theorem), and a step from there, whose
        # starting point is right to first order, the exact second derivatives. The two also take
        # the root from the square root of the precision to the precision.
        for _ in range(2):
            value, ladj = self.call_and_ladj(x)
            x = x + (target - value) * torch.exp(-ladj)
        ladj = -self.call_and_ladj(x)[1]
        return torch.where(finite, x, y), ladj

    def _solve(self, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Solves for the root between two bounds, to about the square root of the precision.

        A Newton step is taken where it stays in the bracket and is at most half as long as the step before
        it, and a bisection elsewhere. So either the step or the bracket halves each time.
        """
        can_stop = values_can_be_read(y)
        tolerance = torch.finfo(y.dtype).eps ** 0.5
        # a root at the very end of the bracket would seem to be outside by round-off
        low = low - tolerance * (1 + low.abs())
        high = high + tolerance * (1 + high.abs())
        x, last = 0.5 * (low + high), high - low
        settled = torch.zeros_like(y, dtype=torch.bool)
        for _ in range(self.max_steps if can_stop else self.fixed_steps):
            value, ladj = self.call_and_ladj(x)
            residual = value - y
            low = torch.where(residual < 0, x, low)
            high = torch.where(residual > 0, x, high)
            step = -residual * torch.exp(-ladj)
            newton, length = x + step, step.abs()
            inside = (newton >= low) & (newton <= high)
            found = length <= tolerance * (1 + x.abs())
            good = found | (inside & (2 * length <= last))
            proposal = torch.where(good, newton, 0.5 * (low + high))
            # a root that was found stays, so that it does not depend on how long others are sought
            proposal = torch.where(settled, x, proposal)
            settled = settled | found
            last = (proposal - x).abs()
            x = proposal
            # asked in this way, an element that is NaN does not keep the others waiting
            if can_stop and not (last > tolerance * (1 + x.abs())).any():
                break
        return x
