# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The flow of a structured guide, and its Gaussian starts."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ...flows.builders import hinged_marginals, iaf, spline_marginals
from ...flows.conditioners import MaskedLinear, default_activation
from ...flows.transforms import (
    AutoregressiveTransform,
    ComposedTransform,
    ConditionedUnivariate,
    FlowModule,
    LocationScale,
    PartitionTransform,
)
from ...flows.univariate import Standardizing
from ...model.graphs.element_precision import RANK
from ...model.graphs.markov_graph import Elimination
from ...model.graphs.sparse_matrix import SparseMatrix
from .linear_layers import LinearLinks, LowRankUpdate
from .networks import share_of_inputs
from .parents_mlp import ParentsMLP


class StructuredFlow(ComposedTransform):
    r"""A flow with the conditional independences of a factorization, initially the identity.

    Hinges of each coordinate are followed, in the root block, by an inverse autoregressive flow, a location
    and a triangular scale; for all other coordinates by a location and a scale, and ``num_transforms`` layers

    .. math:: z_i = m_i(z_{\mathrm{pa}(i)}) + \exp(b(r_i(z_{\mathrm{pa}(i)}))) \, v_i

    where m is linear, r a small network, and b bounds r to 3. Parents that are only linear are added last;
    groups whose elements depend on each other given their parents have a low-rank update of their noise.
    """

    def __init__(self, elimination: Elimination, hidden_dim: int, num_transforms: int) -> None:
        dim, root, parents = len(elimination.parents), list(elimination.root), elimination.others
        members = set(root)
        rest = [i for i in range(dim) if i not in members]
        like = nn.Linear(1, 1).weight.detach()  # has PyTorch's default dtype and device
        scales: dict[str, tuple[list[int], LocationScale]] = {}
        parts: list[tuple[Sequence[int], FlowModule]] = []
        if root:
            affine = LocationScale(like.new_zeros(len(root)), 1.0, full_rank=True)
            scales["root"] = root, affine
            parts.append((root, ComposedTransform(_root_flow(len(root), not rest), affine)))
        if rest:
            affine = LocationScale(like.new_zeros(len(rest)), 1.0, full_rank=False)
            scales["rest"] = rest, affine
            parts.append((rest, affine))
        networks, layers = [], []
        if any(parents):
            for _ in range(num_transforms):
                network = ParentsMLP(parents, 2, hidden_dim, bias=False)
                networks.append(network)
                meta = ConditionedUnivariate(network, Standardizing())
                layers.append(AutoregressiveTransform(meta).inv)
        updates = [LowRankUpdate(own, RANK) for own in elimination.updated]
        has_links = any(elimination.linear)
        links = [LinearLinks(elimination.linear, elimination.level)] if has_links else []
        partition = PartitionTransform(parts)
        super().__init__(hinged_marginals(dim), *updates, partition, *layers, *links)
        # references to parts of the layers, where they are registered
        self._scales, self._networks, self._partition = scales, networks, [partition]
        self.updates, self._links = updates, links

    @property
    def num_values(self) -> int:
        """How many numbers the largest layer holds for each draw."""
        return max(
            [
                len(self._partition[0].inverse_order),
                *(network.num_values for network in self._networks),
            ]
        )

    def start_at(
        self, sd: Tensor, coefficients: Sequence[Tensor], scale: Tensor, root_tril: Tensor
    ) -> None:
        """Becomes a zero-mean Gaussian in units of sds; the networks must be those of a new flow.

        :param sd: the units, shape ``(D,)``; ``scale`` holds the conditional sds.
        :param coefficients: regression coefficients of each coordinate on its parents.
        :param root_tril: the scale of the root block, shape ``(R, R)``.
        """
        with torch.no_grad():
            for name, (rows, affine) in self._scales.items():
                unit = sd[rows]
                own_scale = root_tril / unit[:, None] if name == "root" else scale[rows] / unit
                affine.set_(torch.zeros_like(unit), own_scale)
            for network in self._networks[-1:]:
                relative = []
                for i, own in enumerate(network.parents):
                    relative.append(coefficients[i] * sd[list(own)] / sd[i])
                network.set_linear(0, relative)

    def conditional_scale(self) -> Tensor:
        """Conditional sds given parents, or given earlier coordinates in the root block, in units."""
        log_scale = torch.cat([affine.log_scale.detach() for _, affine in self._scales.values()])
        return log_scale[self._partition[0].inverse_order].exp()

    def step_scales(self) -> dict[nn.Parameter, Tensor]:
        """Optimizer step sizes: parameters that move a coordinate step in units of its conditional sd.

        Steps of the weights of many inputs are smaller.
        """
        size = self.conditional_scale()
        found = {affine.loc: size[rows] for rows, affine in self._scales.values()}
        for layer in self._partition[0].modules():
            if isinstance(layer, LocationScale) and isinstance(layer.lower, nn.Parameter):
                num_inputs = torch.arange(len(layer.lower), device=size.device)
                found[layer.lower] = share_of_inputs(num_inputs.to(size))[:, None]
            elif isinstance(layer, MaskedLinear):
                share = share_of_inputs(layer.mask.sum(-1, keepdim=True))
                found[cast(nn.Parameter, layer.weight)] = share
        sizes = torch.stack([size, torch.ones_like(size)], -1)
        for network in self._networks:
            found.update(network.step_scales(sizes))
        for update in self.updates:
            own = torch.full_like(update.outer.detach(), len(update.outer) ** -0.5)
            found.update({update.outer: own, update.inner: own})
        return found

    @torch.no_grad()
    def set_links(self, sd: Tensor, slopes: SparseMatrix) -> None:
        """Sets the slopes of coordinates in their linear parents, a matrix ``(D, D)``.

        :param sd: the units, shape ``(D,)``.
        """
        for links in self._links:
            child, parent = links.pairs()
            keys = slopes.row * len(sd) + slopes.column
            place = torch.searchsorted(keys, child * len(sd) + parent)
            links.set_(slopes.weight[place] * sd[parent] / sd[child])


def _root_flow(dim: int, is_whole: bool) -> FlowModule:
    """The flow of the root block, without its location and scale."""
    # as in AutoIAF for many latents, with a maximum width
    width = max(128, min(4 * dim, 256), min(3 * dim, 800))
    if dim > 1:
        return iaf(dim, 3, width, nonlinearity=default_activation(dim))
    # affine layers of one coordinate compose to a Gaussian
    return ComposedTransform(*[spline_marginals(1) for _ in range(3 if is_whole else 1)])
