# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The guide for posteriors with several modes: a mixture of flows."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .._base.arguments import check_integer
from ..flows.transforms import ComposedTransform
from ..model import LogJoint
from ..model.protocols import FlowGuide
from ..model.sites import Latents
from .distributions import (
    LatentDistribution,
    ToUnconstrained,
    density_through,
    draws_through,
    with_path_gradient,
)
from .presets import AutoIAF


class MixtureGuide(AutoIAF):
    r"""A guide with one flow for each mode of a posterior.

    .. math::

        k \sim \mathrm{Categorical}(w), \quad x \sim \mathrm{Normal}(0, I), \quad z = T_k(x)

    Each :math:`T_k` is the flow of :class:`~pyro_artransform.AutoIAF`, and ``log_prob`` is the density of the
    mixture. Reverse KL divergences pull a flow into one mode, so that each component learns the mode in which
    it starts: :func:`~pyro_artransform.fit` starts them at the draws of each mode. New components are all the
    same. The weights are a buffer and not trained: :meth:`weigh` sets them to the posterior mass of each
    component, by importance sampling. Pyro's param store does not hold them; ``save`` does.

    :param model: see :class:`~pyro_artransform.AutoIAF`, also for ``options``.
    :param num_components: the number of components.
    :raises ValueError: as for that class, and if ``num_components`` is not a positive integer.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_artransform.guides import MixtureGuide
        >>> def model(y):
        ...     a = pyro.sample("a", dist.Normal(0.5, 1.0))
        ...     pyro.sample("y", dist.Normal(a**2, 0.3), obs=y)
        >>> guide = MixtureGuide(model, num_components=2)
        >>> guide.sample_posterior(5, torch.tensor(2.0))["a"].shape
        torch.Size([5])
        >>> guide.weights
        tensor([0.5000, 0.5000])

    **References**

    1. Variational Boosting: Iteratively Refining Posterior Approximations (Miller, Foti, Adams, 2017),
       https://arxiv.org/abs/1611.06585
    """

    def __init__(
        self, model: Callable[..., object], *, num_components: int = 2, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self._num_components = check_integer("num_components", num_components)

    def _build(self, latents: Latents, start: Tensor) -> nn.Module:
        made = nn.ModuleList()
        for _ in range(count := self._num_components):
            made.append(super()._build(latents, start))
        made.register_buffer(
            "log_weights", torch.full_like(start[:1], -math.log(count)).expand(count).clone()
        )
        return made

    @property
    def _flows(self) -> Any:
        self._known_coordinates()
        return self._modules["transform"]

    @property
    def weights(self) -> Tensor:
        """The weight of each component, shape ``(num_components,)``."""
        weights: Tensor = self._flows.log_weights.exp()
        return weights

    @property
    def components(self) -> Sequence[FlowGuide]:
        """The components, as guides that a fit can initialize."""
        return [MixtureComponent(self, flow) for flow in self._flows]

    def _draw(self, n: int, path: bool) -> tuple[Tensor, Tensor]:
        flows, drawn = self._flows, list[tuple[Tensor, Tensor]]()
        component = torch.multinomial(flows.log_weights.exp(), n, replacement=True)
        order, counts = component.argsort(), component.bincount(minlength=len(flows))
        for k, x in enumerate(self._standard_normal(n).split(counts.tolist())):
            z, log_q = draws_through(flows[k], x, False)
            drawn.append((z, self._by_component(z, k, log_q).logsumexp(0)))
        z, log_q = (torch.cat(each)[order.argsort()] for each in zip(*drawn))
        return (z, with_path_gradient(log_q, z, self._score(z.detach()))) if path else (z, log_q)

    @torch.enable_grad()
    def _score(self, z: Tensor) -> Tensor:
        z = z.requires_grad_()
        return torch.autograd.grad(self.log_density(z).sum(), z)[0]

    def log_density(self, z: Tensor) -> Tensor:
        return self._by_component(z).logsumexp(0)

    def _by_component(
        self, z: Tensor, known: int | None = None, log_q: Tensor | None = None
    ) -> Tensor:
        """The log density of each component times its weight, ``(num_components,) + batch``.

        :param known: a component of which ``log_q`` is the log density.
        """
        flows, found = self._flows, list[Tensor]()
        for k, (flow, log_weight) in enumerate(zip(flows, flows.log_weights)):
            density = log_q if k == known and log_q is not None else density_through(flow, z)
            # far from a component the inverse of its tails may overflow
            found.append(log_weight + density.nan_to_num(-math.inf, math.inf, -math.inf))
        return torch.stack(found)

    def get_transform(self, *args: object, **kwargs: object) -> ComposedTransform:
        """A mixture has no transform.

        :raises NotImplementedError: always.
        """
        raise NotImplementedError(
            "MixtureGuide: a mixture of flows is no transform of one distribution"
        )

    def get_posterior(self, *args: object, **kwargs: object) -> dist.TorchDistribution:
        """The distribution of all latents on the unconstrained space."""
        self._registered_transform()
        found = LatentDistribution(self)
        if self.coordinates.is_identity:
            return found
        to_unconstrained = ToUnconstrained(self.mapped_density(args, kwargs))
        return dist.TransformedDistribution(found, to_unconstrained, validate_args=False)

    @torch.no_grad()
    def weigh(self, log_joint: LogJoint, n: int) -> tuple[Tensor, Tensor]:
        """Sets the weights to the posterior mass of each component, by importance sampling.

        The proposal is the mixture of all components with equal weights, with as many draws from each.

        :param log_joint: the log joint density, in the guide's coordinates.
        :param n: the number of draws.
        :return: the weights and their standard errors, ``(num_components,)``.

        **References**

        1. Safe and Effective Importance Sampling (Owen, Zhou, 2000), https://doi.org/10.2307/2669533
        """
        flows, count = self._flows, self._num_components
        x = [self._standard_normal(max(n // count, 2)) for _ in flows]
        z = torch.cat([draws_through(flow, own, False)[0] for flow, own in zip(flows, x)])
        flows.log_weights.fill_(-math.log(count))
        by_component = self._by_component(z)
        log_q = by_component.logsumexp(0)
        ratios = (log_joint(z) - log_q).nan_to_num(-math.inf, -math.inf, -math.inf).softmax(0)
        share = (by_component - log_q).exp()
        weights = (share @ ratios).nan_to_num(1 / count)  # without a finite density, equal ones
        flows.log_weights.copy_(weights.clamp_min(torch.finfo(weights.dtype).tiny).log())
        by_stratum = (ratios * (share - weights[:, None])).unflatten(1, (count, -1))
        se = (by_stratum.shape[-1] * by_stratum.var(-1)).sum(1).sqrt()
        return weights, se.clamp_min(torch.finfo(se.dtype).eps ** 0.5)

    # Starts of a fit

    def start_at(self, loc: object, scale_tril: object = None) -> None:
        """Makes all components the same Gaussian, see :class:`~pyro_artransform.AutoAutoregressive`."""
        for component in self.components:
            component.start_at(loc, scale_tril)

    def step_scales(self) -> dict[nn.Parameter, Tensor]:
        return {a.loc: a.log_scale.detach().exp() for a in (f.transforms[1] for f in self._flows)}


class MixtureComponent(FlowGuide):
    """One component of a mixture, which a fit initializes like a guide."""

    def __init__(self, guide: MixtureGuide, flow: Any) -> None:
        self._guide, self._flow = guide, flow

    def rsample_and_log_prob(self, n: int, path: bool = False) -> tuple[Tensor, Tensor]:
        """Draws ``(n, latent_dim)`` of the component, and their log densities ``(n,)``."""
        return draws_through(self._flow, self._guide._standard_normal(n), path)

    def start_at(self, loc: object, scale_tril: object = None) -> None:
        """Makes the component a Gaussian in the guide's coordinates, with the flow of a new guide."""
        self._guide._start_at(self._flow.transforms, loc, scale_tril)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the component."""
        return cast(nn.Module, self._flow).parameters()
