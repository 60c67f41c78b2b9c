# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""The derivative of a masked multilayer perceptron by its input, as products of its weights.

Between two layers the derivative is a product of masked weights and the slopes of the activations, so
that a triangular system in the Jacobian of a flow is solved by substitution, from the last level of the
graph to the first. Sorted as for an inverse by blocks, all blocks together touch each weight about once,
and only the small squares of the blocks are formed: never a matrix of the size of the Jacobian, where
that is large.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.linalg import solve_triangular

from .block_evaluation import BlockLayout, Weights
from .tilted_silu import TiltedSiLU

# coordinates in a block: forming its square costs as many products as it has coordinates, opening it
# a dozen calls. As fast as 10, 12 and 20 from 10 to 200 dimensions, 8 is slower (benchmarks/steps.md)
_SIZE = 16


class MLPEvaluation:
    """The :class:`~.base.Evaluation` of one network at one batch.

    :param params: the parameters, with their graph, shape ``(B, D, P)``.
    :param layout: where each level begins.
    :param order: the coordinates sorted by level, or None if they are in that order already.
    :param weights: masked, in the coordinates' own order.
    :param slopes: the derivatives of the activations of each hidden layer, of shape ``(B, H)``.
    """

    def __init__(
        self,
        params: Tensor,
        layout: BlockLayout,
        order: Tensor | None,
        weights: Weights,
        slopes: list[Tensor],
    ) -> None:
        self.params = params
        self._layout, self._order = layout, order
        self._weights, self._slopes = weights, slopes
        self._sorted_weights = weights.sorted_by(order)

    def pull_back(self, weights: Tensor) -> Tensor:
        """See :class:`~.base.Evaluation`."""
        network, rows = self._weights, weights.mT.flatten(1)
        pulled = self._through_layers(network, rows @ network.last.flatten(0, 1), slice(None), 0)
        if network.skip is not None:
            pulled = pulled + rows @ network.skip.flatten(0, 1)
        return pulled

    def solve_adjoint(self, slopes: Tensor, gradient: Tensor) -> Tensor:
        """See :class:`~.base.Evaluation`."""
        slopes, rest = self._sorted(slopes.mT), self._sorted(gradient)
        weights, done = self._sorted_weights, list[Tensor]()
        carried: Tensor | None = None  # what later blocks are by the last hidden units
        for start, stop in self._blocks():
            own = slice(self._layout.levels[start], self._layout.levels[stop])
            known = rest[:, own]
            if carried is not None:
                known = known + self._through_layers(weights, carried, own, start)
            v = self._substitute(slopes[..., own], known, start, stop)
            done.append(v)
            if start == 0:
                break
            weighted = (slopes[..., own] * v[:, None]).flatten(1)
            added = weighted @ weights.last[:, own].flatten(0, 1)
            carried = added if carried is None else carried + added
            if weights.skip is not None:
                rest = rest + weighted @ weights.skip[:, own].flatten(0, 1)
        return self._unsorted(torch.cat(done[::-1], -1))

    def _substitute(self, slopes: Tensor, gradient: Tensor, start: int, stop: int) -> Tensor:
        """The solution within the levels from ``start`` to ``stop - 1``, shape ``(B, n)``."""
        if stop == start + 1:
            return gradient
        square, options = self._square(-slopes, start, stop), {"left": False, "unitriangular": True}
        # the routine takes the diagonal as ones, whatever is there
        return solve_triangular(square, gradient[:, None], upper=False, **options)[:, 0]

    def _square(self, slopes: Tensor, start: int, stop: int) -> Tensor:
        """The derivative of some levels by themselves, shape ``(B, n, n)``, strictly lower triangular."""
        weights, layout = self._sorted_weights, self._layout
        own = slice(layout.levels[start], layout.levels[stop])
        # the units that read the block and are read by it
        units = [slice(places[start], places[stop - 1]) for places in layout.units]
        last = weights.last[:, own, units[-1]]
        skip = None if weights.skip is None else weights.skip[:, own, own]
        if len(weights.inner) == 1:
            # the products of weights first: they have no rows, and are few
            first, slope = weights.inner[0][units[0], own], self._slopes[0][:, units[0]]
            products = last[:, :, None] * first.T
            flat = products.flatten(0, 2).T
            rows = slope @ flat if skip is None else torch.addmm(skip.flatten(), slope, flat)
            return (slopes[..., None] * rows.view(-1, *products.shape[:3])).sum(1)
        rows = slopes.permute(2, 0, 1) @ last.transpose(0, 1)  # (n, B, units)
        readers = [own, *units[:-1]]
        for weight, slope, unit, reader in [*zip(weights.inner, self._slopes, units, readers)][
            ::-1
        ]:
            rows = (rows * slope[:, unit]) @ weight[unit, reader]
        if skip is not None:
            rows = rows + slopes.permute(2, 0, 1) @ skip.transpose(0, 1)
        return rows.transpose(0, 1).contiguous()

    def _through_layers(self, network: Weights, by_units: Tensor, own: slice, start: int) -> Tensor:
        """What derivatives by the last hidden units, ``(B, H)``, are by inputs from a level on."""
        # the units that read them, if only through others
        readers = [slice(places[start], None) for places in self._layout.units]
        pulled = by_units[:, readers[-1]]
        layers = zip(network.inner, self._slopes, readers, [own, *readers[:-1]])
        for weight, slope, units, inputs in [*layers][::-1]:
            pulled = (pulled * slope[:, units]) @ weight[units, inputs]
        return pulled

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of levels of about so many coordinates, from the last to the first."""
        levels = self._layout.levels
        stop = len(levels) - 1
        while stop > 0:
            start = stop - 1
            while start > 0 and levels[stop] - levels[start - 1] <= _SIZE:
                start -= 1
            yield start, stop
            stop = start

    def _sorted(self, rows: Tensor) -> Tensor:
        return rows if self._order is None else rows[..., self._order]

    def _unsorted(self, rows: Tensor) -> Tensor:
        if self._order is None:
            return rows
        return torch.empty_like(rows).index_copy_(-1, self._order, rows)


def slope(nonlinearity: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative of an elementwise function at x, of the shape of x, without a graph."""
    x = x.detach()
    if type(nonlinearity) in (nn.SiLU, TiltedSiLU):  # those of the presets, in a few operations
        found = torch.ops.aten.silu_backward(torch.ones_like(x), x)
        if isinstance(nonlinearity, TiltedSiLU):
            found = found.mul_(2.0).add_(nonlinearity.slope - 1.0)
        return found
    with torch.enable_grad():
        point = x.requires_grad_()
        value = nonlinearity(point)
        return torch.autograd.grad(value, point, torch.ones_like(value))[0]
