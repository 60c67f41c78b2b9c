# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""An autoguide whose flow is an inverse autoregressive flow."""

import torch
from pyro.infer.autoguide import AutoContinuous, init_to_median
from torch.distributions import biject_to

from pyro_artransform._base.arguments import check_integer
from pyro_artransform.flows import AutoregressiveTransform, FlowDistribution
from pyro_artransform.flows.conditioners import MaskedMLP, default_activation
from pyro_artransform.flows.transforms import (
    ComposedTransform,
    CompressedTails,
    ConditionedUnivariate,
    LocationScale,
)
from pyro_artransform.flows.transforms.flow_distribution import standard_normal
from pyro_artransform.flows.univariate import Affine


class AutoIAF(AutoContinuous):
    """
    A guide whose posterior is an inverse autoregressive flow on the unconstrained space of
    all latents. A draw and its density take one evaluation of each network.

    A new guide is ``Normal(init_loc, init_scale)``. Tails beyond 40 scales are compressed
    (:class:`~pyro_artransform.flows.transforms.CompressedTails`), so that models do not overflow.

    :param callable model: A Pyro model.
    :param int num_transforms: The number of autoregressive layers, whose order alternates.
    :param hidden_dims: The width or widths of the hidden layers of each network.
    :param callable nonlinearity: Their activation, by default ``torch.nn.SiLU()`` up to 64 latents.
    :param bool full_rank: Whether the scale after the flow is triangular, or diagonal; by
        default it is triangular up to 200 latents.
    :param callable init_loc_fn: A per-site initialization function.
    :param float init_scale: The standard deviation to start with.

    Example::

        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> model = lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
        >>> guide = AutoIAF(model)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        >>> losses = [svi.step() for _ in range(10)]

    **References**

    1. Improved Variational Inference with Inverse Autoregressive Flow (Kingma, Salimans,
       Jozefowicz, Chen, Sutskever, Welling, 2016), https://arxiv.org/abs/1606.04934
    """

    def __init__(
        self,
        model,
        *,
        num_transforms=3,
        hidden_dims=None,
        nonlinearity=None,
        full_rank=None,
        init_loc_fn=init_to_median,
        init_scale=0.1,
    ):
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.num_transforms = check_integer("num_transforms", num_transforms)
        self.hidden_dims = hidden_dims
        self.nonlinearity = nonlinearity
        self.full_rank = full_rank
        self.init_scale = init_scale

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        loc, dim = self._init_loc(), self.latent_dim
        hidden_dims = self.hidden_dims or max(128, min(8 * dim, 256), 3 * dim)
        layers = []
        for k in range(self.num_transforms):
            network = MaskedMLP(
                dim,
                2,
                hidden_dims,
                nonlinearity=self.nonlinearity or default_activation(dim),
                order=range(dim - 1, -1, -1) if k % 2 else None,
            )
            affine = Affine(multiplier=0.1)  # networks that move slowly in plain SVI
            meta = ConditionedUnivariate(network, affine)
            layers.append(AutoregressiveTransform(meta).to(loc))
        full_rank = dim <= 200 if self.full_rank is None else self.full_rank
        scale = LocationScale(loc, self.init_scale, full_rank=full_rank)
        self.transform = ComposedTransform(*layers, CompressedTails(), scale)

    def get_base_dist(self):
        return standard_normal(torch.zeros_like(self._init_loc()))

    def get_transform(self, *args, **kwargs):
        return self.transform

    def get_posterior(self, *args, **kwargs):
        return FlowDistribution(self.get_base_dist(), self.get_transform(), validate_args=False)

    @torch.no_grad()
    def quantiles(self, quantiles, *args, num_samples=10000, **kwargs):
        """
        Returns quantiles of each coordinate of each site, from draws.

        :param quantiles: A list of quantiles between 0 and 1.
        :param int num_samples: The number of draws.
        :return: A dict mapping sample site name to a tensor of quantile values.
        :rtype: dict
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        draws = self.get_posterior().sample((num_samples,)).sort(0).values
        levels = [int(q * (num_samples - 1)) for q in quantiles]
        found = {}
        for latent in draws[levels]:
            for site, value in self._unpack_latent(latent):
                value = biject_to(site["fn"].support)(value)
                found.setdefault(site["name"], []).append(value)
        return {name: torch.stack(values) for name, values in found.items()}

    def median(self, *args, **kwargs):
        """
        Returns the posterior median of each coordinate of each site.

        :return: A dict mapping sample site name to median tensor.
        :rtype: dict
        """
        found = self.quantiles([0.5], *args, **kwargs)
        return {name: value[0] for name, value in found.items()}
