# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The flow of a structured guide, and the Gaussians that it starts at."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...conditioners import ParentsMLP, default_activation
from ...flows import hinged_marginals, iaf, spline_marginals
from ...graphs.markov_graph import Elimination
from ...transforms import (
    AutoregressiveTransform,
    ComposedTransform,
    ConditionedUnivariate,
    FlowModule,
    LocationScale,
    PartitionTransform,
)
from ...univariate import Standardizing

# the networks of the root block: as AutoIAF's of many latents, whose width ends here
_ROOT_LAYERS, _MOST_WIDTH = 3, 800


class StructuredFlow(ComposedTransform):
    r"""A flow with the conditional independences of a factorization.

    Its layers, from the standard Normal on:

    1. :func:`~pyro_artransform.hinged_marginals`, for skewness and tails of each coordinate.
    2. For the root block an inverse autoregressive flow with a triangular location and scale; for each
       other coordinate a location and a scale of its own.
    3. For all coordinates but the root block ``num_transforms`` layers

       .. math::

           z_i = m_i(z_{\mathrm{pa}(i)}) + \exp(b(r_i(z_{\mathrm{pa}(i)}))) \, v_i

       of which m and r are a linear function and a small network, and b bounds r to 3.

    Each is the identity at first.

    :param elimination: who is drawn given whom.
    :param hidden_dim: the number of hidden units of each coordinate.
    :param num_transforms: the number of layers of the last kind.
    """

    def __init__(self, elimination: Elimination, hidden_dim: int, num_transforms: int) -> None:
        dim, root = elimination.input_dim, list(elimination.root)
        members = set(root)
        rest = [i for i in range(dim) if i not in members]
        like = nn.Linear(1, 1).weight.detach()  # PyTorch knows where new parameters go
        parts: list[tuple[Sequence[int], FlowModule]] = []
        if root:
            root_scale = LocationScale(like.new_zeros(len(root)), 1.0, full_rank=True)
            parts.append((root, ComposedTransform(_root_flow(len(root), not rest), root_scale)))
        if rest:
            parts.append((rest, LocationScale(like.new_zeros(len(rest)), 1.0, full_rank=False)))
        layers = []
        if any(elimination.parents):
            for _ in range(num_transforms):
                network = ParentsMLP(elimination.parents, 2, hidden_dim, bias=False)
                meta = ConditionedUnivariate(network, Standardizing())
                layers.append(AutoregressiveTransform(meta).inv)
        super().__init__(hinged_marginals(dim), PartitionTransform(parts), *layers)
        self._rest, self._root = rest, root

    @property
    def networks(self) -> list[ParentsMLP]:
        """The networks of the last layers."""
        return [part for part in self.modules() if isinstance(part, ParentsMLP)]

    @property
    def root_scale(self) -> Any:
        """The location and scale of the root block, if there is one."""
        return self.transforms[1].transforms[0].transforms[-1] if self._root else None

    @property
    def scale(self) -> Any:
        """The locations and scales of all other coordinates, given their parents, if there are any."""
        return self.transforms[1].transforms[-1] if self._rest else None

    def start_at(
        self, sd: Tensor, coefficients: Sequence[Tensor], scale: Tensor, root_tril: Tensor
    ) -> None:
        """Becomes a Gaussian with mean zero, in units of sds; the networks are those of a new flow.

        :param sd: the units, shape ``(D,)``; ``scale`` has the conditional sds.
        :param coefficients: for each coordinate those of its parents.
        :param root_tril: the lower-triangular scale of the root block, shape ``(R, R)``.
        """
        with torch.no_grad():
            if self.root_scale is not None:
                unit = sd[self._root]
                self.root_scale.set_(torch.zeros_like(unit), root_tril / unit[:, None])
            if self.scale is not None:
                self.scale.loc.zero_()
                self.scale.log_scale.copy_((scale / sd)[self._rest].log())
            for network in self.networks[-1:]:
                relative = []
                for i, own in enumerate(network.parents):
                    relative.append(coefficients[i] * sd[list(own)] / sd[i])
                network.set_linear(0, relative)

    def conditional_scale(self) -> Tensor:
        """The sd of each coordinate given its parents (or those before it in the root block), in units."""
        dim = len(self._root) + len(self._rest)
        log_scale = self.transforms[0].meta.conditioner.params.new_zeros(dim)
        for rows, part in ((self._root, self.root_scale), (self._rest, self.scale)):
            if part is not None:
                log_scale[rows] = part.log_scale.detach()
        return log_scale.exp()

    def step_scales(self) -> dict[nn.Parameter, Tensor]:
        """The steps of what moves a coordinate are a share of its conditional sd."""
        size = self.conditional_scale()
        found = {} if self.scale is None else {self.scale.loc: size[self._rest]}
        if self.root_scale is not None:
            found[self.root_scale.loc] = size[self._root]
        sizes = torch.stack([size, torch.ones_like(size)], -1)
        for network in self.networks:
            found.update(network.step_scales(sizes))
        return found


def _root_flow(dim: int, is_whole: bool) -> FlowModule:
    """The flow of the root block, without its location and scale."""
    width = max(128, min(4 * dim, 256), min(3 * dim, _MOST_WIDTH))
    if dim > 1:
        return iaf(dim, _ROOT_LAYERS, width, nonlinearity=default_activation(dim))
    # affine layers of one coordinate are a Gaussian together
    return ComposedTransform(*[spline_marginals(1) for _ in range(_ROOT_LAYERS if is_whole else 1)])
