# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Monotone transforms whose inverse is found numerically, and a monotone network."""

import torch
from torch import Tensor

from ..._base.arguments import check_broadcast, check_integer, is_tracing, values_can_be_read
from .affine import soft_bound
from .base import ElementwiseTransform, Univariate, split_params


class MonotoneTransform(ElementwiseTransform):
    """An increasing elementwise transform without a closed-form inverse.

    A subclass implements :meth:`~ElementwiseTransform.call_and_ladj` and :meth:`bracket`. The inverse is
    found by Newton steps safeguarded by a bracket, and is exact to round-off for every ``y``. Its gradients
    come from the implicit function theorem, so their cost does not depend on the number of steps.
    """

    #: The maximum number of steps.
    max_steps = 200
    #: The number of steps if convergence cannot be tested: ``torch.jit, torch.compile, torch.func``.
    fixed_steps = 32

    def bracket(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Finite bounds ``low`` and ``high`` on the inverse of a finite ``y``, in the result's shape."""
        raise NotImplementedError

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        finite = y.isfinite()
        target = torch.where(finite, y, 0.0)
        # detach as well, since traces do not record no_grad and forward-mode differentiation ignores it
        with torch.no_grad():
            low, high = self.bracket(target.detach())
            x = self._solve(target.detach().expand_as(low), low, high).detach()
        # The derivative of a Newton step in its starting point is zero at the root. So one step from a
        # detached root has exact first derivatives (those of the implicit function theorem), and a second
        # step has exact second derivatives. The two steps also improve the accuracy of the root from the
        # square root of the precision to the precision.
        for _ in range(2):
            value, ladj = self.call_and_ladj(x)
            x = x + (target - value) * torch.exp(-ladj)
        ladj = -self.call_and_ladj(x)[1]
        return torch.where(finite, x, y), ladj

    def _solve(self, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Solves for the root between two bounds, to about the square root of the precision.

        It bisects if a Newton step would leave the bracket, or is longer than half of the last step.
        """
        can_stop = values_can_be_read(y)
        tolerance = torch.finfo(y.dtype).eps ** 0.5
        # by round-off, a root at the end of the bracket could appear to be outside
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
            # converged roots stay fixed, so that they do not depend on the steps that others need
            proposal = torch.where(settled, x, proposal)
            settled = settled | found
            last = (proposal - x).abs()
            x = proposal
            # in this form, NaN elements count as converged
            if can_stop and not (last > tolerance * (1 + x.abs())).any():
                break
        return x


class MonotoneNeuralTransform(MonotoneTransform):
    r"""A smooth curve whose slope changes from :math:`v_0` through :math:`v_1, \ldots` to :math:`v_K`.

    .. math::
        y = \text{shift} + \frac{v_0 + v_K}{2} x
        + \frac{\tau}{2} \sum_{j=1}^K (v_j - v_{j-1}) \sqrt{1 + (x - k_j)^2 / \tau^2}

    It is a monotone network with one hidden layer of K units, whose slope is a convex combination of the
    positive numbers :math:`v_j`. So it maps onto the whole real line, the tails have separate slopes, and
    gradients do not vanish exponentially.

    :math:`\log v_j` is the bounded ``slopes``; :math:`k_j` is the j-th of K evenly spaced points in
    (-3, 3) plus ``knots``, bounded to preserve their order; :math:`\tau` is their spacing times the
    exponential of the bounded ``softness``. Zero parameters give exactly the identity.

    :param shift: shape ``(*, D)``.
    :param slopes: unconstrained, shape ``(*, D, K + 1)``.
    :param knots: unconstrained, shape ``(*, D, K)``.
    :param softness: unconstrained, shape ``(*, D)``.
    :raises ValueError: if the shapes do not match.
    """

    def __init__(self, shift: Tensor, slopes: Tensor, knots: Tensor, softness: Tensor) -> None:
        super().__init__()
        if not is_tracing():  # sizes are tensors during tracing, and cannot be compared
            units = knots.shape[-1] if knots.dim() else 0
            if units < 1 or slopes.shape[-1:] != (units + 1,):
                got = f"{tuple(slopes.shape)} and {tuple(knots.shape)}"
                raise ValueError(
                    "expected slopes of shape (*, D, K + 1) and knots of shape (*, D, K) with K >= 1, "
                    f"got {got}"
                )
            shapes = shift.shape, slopes.shape[:-1], knots.shape[:-1], softness.shape
            check_broadcast("batch shapes of shift, slopes, knots and softness", *shapes)
        count = knots.shape[-1]
        spacing = 6.0 / count  # three standard deviations on both sides
        self.shift, self.speeds = shift, torch.exp(soft_bound(slopes, 2.5))
        centers = torch.arange(count, dtype=knots.dtype, device=knots.device) - 0.5 * (count - 1)
        self.left, self.right = self.speeds[..., 0], self.speeds[..., -1]
        self.jumps = 0.5 * self.speeds.diff()
        self.knots = centers * spacing + soft_bound(knots, 0.5 * spacing)
        softness = spacing * torch.exp(soft_bound(softness, 1.5))
        self.softness = softness.square().unsqueeze(-1)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # further out the square could overflow, and the curve is linear up to round-off: 100 in float16
        far = max(torch.finfo(x.dtype).max ** 0.5 * 1e-6, 100.0)
        near = x.clamp(-far, far)
        # All terms grow with x, and cancel except for the line of the tail, at a loss of digits in float32.
        # So that line is subtracted first, with a = sqrt(1 + x^2) as a smooth |x|; the remaining differences
        # of roots are quotients of differences of squares. The sign is never 0, so that derivatives at 0,
        # too, are those of a smooth piece.
        a = torch.sqrt(1 + near * near)
        sign = torch.where(near >= 0, 1.0, -1.0).to(x.dtype)
        line = torch.where(near >= 0, self.right, self.left) * near
        corner = 0.5 * (self.right - self.left) / (a + sign * near)
        step = near.unsqueeze(-1) - self.knots
        root = torch.sqrt(step * step + self.softness)
        excess = self.knots * (self.knots - 2 * near.unsqueeze(-1)) + (self.softness - 1)
        bend = (self.jumps * excess / (root + a.unsqueeze(-1))).sum(-1)
        slope = 0.5 * (self.left + self.right) + (self.jumps * step / root).sum(-1)
        y = self.shift + line + corner + bend + slope * (x - near)
        return y, torch.log(slope).expand_as(y)

    def bracket(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds from lines through the value at zero with the smallest and the largest slope."""
        rise = y - self.call_and_ladj(torch.zeros_like(y))[0]
        steep, flat = rise / self.speeds.amax(-1), rise / self.speeds.amin(-1)
        return torch.minimum(steep, flat), torch.maximum(steep, flat)


class MonotoneNeural(Univariate):
    """The family of :class:`MonotoneNeuralTransform`: a shift, K + 1 slopes, K knots and a softness.

    The inverse is found by Newton's method, with exact gradients.

    :param count_units: the number K of hidden units, at least 1.
    :raises ValueError: if ``count_units`` is out of range.

    **References**

    1. Neural Autoregressive Flows (Huang, Krueger, Lacoste, Courville, 2018),
       https://arxiv.org/abs/1804.00779
    """

    def __init__(self, *, count_units: int = 8) -> None:
        super().__init__()
        self.count_units = check_integer("count_units", count_units)
        self.num_params = 2 * self.count_units + 3

    def extra_repr(self) -> str:
        return f"count_units={self.count_units}"

    def forward(self, params: Tensor) -> MonotoneNeuralTransform:
        count = self.count_units
        shift, slopes, knots, softness = split_params(params, (1, count + 1, count, 1))
        return MonotoneNeuralTransform(shift[..., 0], slopes, knots, softness[..., 0])
