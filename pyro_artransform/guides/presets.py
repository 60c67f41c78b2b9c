# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Flow guides that need no choice of a flow."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn

from ..arguments import (
    check_callable,
    check_flag,
    check_hidden_dims,
    check_integer,
    names_the_class,
)
from ..conditioners import default_activation
from ..flows import hinged_marginals, iaf, maf, spline_marginals
from ..transforms import CompressedTails, FlowModule, chain
from ..univariate import Affine
from .autoregressive import AutoAutoregressive
from .persistence.spec import Arguments, GuideSpec
from .persistence.state_check import LeastState

Nonlinearity = Callable[[Tensor], Tensor]

# of the outputs of networks: at 1, plain SVI in float32 (Adam, 1e-2, one particle) sends draws so far
# out in some runs that models overflow, never at 0.3 and 0.1 (benchmarks/float32.md)
_MULTIPLIER = 0.1


class PresetGuide(AutoAutoregressive):
    """A guide whose flow is a stack of layers of one kind, which a file can describe."""

    #: makes the layers in more than one dimension
    _layers: ClassVar[Callable[..., FlowModule]]
    #: whether each coordinate has hinges before them
    _has_hinges: ClassVar[bool]

    @names_the_class
    def __init__(
        self,
        model: Callable[..., object],
        *,
        num_transforms: int = 3,
        hidden_dims: int | Sequence[int] | None = None,
        nonlinearity: Nonlinearity | None = None,
        skip_connections: bool = False,
        full_rank: bool | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        if nonlinearity is not None:
            wanted = "a function or a module such as torch.nn.ELU()"
            check_callable("nonlinearity", nonlinearity, wanted)
        arguments = {
            "num_transforms": check_integer("num_transforms", num_transforms),
            "hidden_dims": None if hidden_dims is None else check_hidden_dims(hidden_dims),
            "nonlinearity": nonlinearity,
            "skip_connections": check_flag("skip_connections", skip_connections),
        }
        super().__init__(
            model,
            flow=partial(self._preset_flow, arguments),
            full_rank=full_rank,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
        )
        self._arguments.update(arguments)

    @classmethod
    def _network(cls, latent_dim: int) -> Arguments:
        """The networks of these layers, by default: their widths and activation."""
        raise NotImplementedError

    @classmethod
    def _with_defaults(cls, arguments: Arguments, latent_dim: int) -> Arguments:
        """Arguments, with the networks for a latent dimension where they are not given."""
        given = {name: value for name, value in arguments.items() if value is not None}
        return {**cls._network(latent_dim), **given}

    def _resolved_arguments(self, latent_dim: int) -> Arguments:
        # a version with other defaults reads the same flow from a file
        return self._with_defaults(super()._resolved_arguments(latent_dim), latent_dim)

    @classmethod
    def _preset_flow(cls, arguments: Arguments, latent_dim: int) -> nn.Module:
        network = cls._with_defaults(arguments, latent_dim)
        count = network.pop("num_transforms")
        if latent_dim == 1:
            # affine layers of one coordinate are a Gaussian together
            splines = [spline_marginals(1) for _ in range(count)]
            return chain([hinged_marginals(1), *splines, CompressedTails()])
        univariate = partial(Affine, multiplier=_MULTIPLIER)
        layers = cls._layers(latent_dim, count, univariate=univariate, **network)
        hinges = [hinged_marginals(latent_dim)] if cls._has_hinges else []
        # benchmarks/float32.md: three layers multiply their scales, and without a bound single draws go
        # so far that models overflow
        return chain([*hinges, layers, CompressedTails()])

    def _least_state(self, spec: GuideSpec) -> LeastState:
        least, count = super()._least_state(spec), spec.arguments["num_transforms"]
        dim = spec.latents.latent_dim
        if dim == 1:  # there are no networks
            return least._replace(tensors=count)
        widths = [dim, *spec.arguments["hidden_dims"], dim]
        # of each network the graph and the weights
        size = dim * dim + sum(one * other for one, other in pairwise(widths))
        numbers = max(least.numbers, count * size)
        return least._replace(numbers=numbers, tensors=count * len(widths))


class AutoIAF(PresetGuide):
    """A guide whose flow is an inverse autoregressive flow: a draw and its density are cheap.

    Its layers, from the standard Normal to the unconstrained space of all latents:

    1. :func:`~pyro_artransform.hinged_marginals`: each coordinate has smooth hinges of its own, which
       skew the base and give it other tails.
    2. ``num_transforms`` affine autoregressive layers, as :func:`~pyro_artransform.iaf` makes them.
       The first has the order of the latents, the next the reverse order, and so on in turn.
    3. :class:`~pyro_artransform.transforms.CompressedTails`: beyond 40 units of the scale below, a
       draw goes only logarithmically far, so that models do not overflow.
    4. A location and a scale, a lower-triangular matrix where ``full_rank``, else a diagonal.

    In one dimension, where affine layers are a Gaussian together, ``num_transforms`` splines stand in
    their place, and there are no networks. Each layer but the last starts as the identity.
    ``print(guide)`` shows the layers.

    The density at given values (:meth:`~AutoAutoregressive.log_prob`) needs the inverse of the flow,
    which costs several evaluations of its networks.

    :param model: a Pyro model.
    :param num_transforms: the number of autoregressive layers; their order alternates.
    :param hidden_dims: the width or widths of the hidden layers of each network; by default one
        layer of ``max(128, min(8 * latent_dim, 256), 3 * latent_dim)``.
    :param nonlinearity: their activation, by default ``torch.nn.SiLU()`` up to 64 latents, which is of
        second order near zero, as the skewness of a posterior is, and
        :class:`~pyro_artransform.conditioners.TiltedSiLU` beyond. A guide with one of these, an activation
        of ``torch.nn`` or a function of ``torch`` can be saved by :meth:`~AutoAutoregressive.save`.
    :param skip_connections: whether each network has a linear layer from its inputs to its outputs
        too; by default it has none. A regression on many columns ends nearer with
        ``nonlinearity=TiltedSiLU(0.0), skip_connections=True``, a funnel further off.
    :param full_rank: as for :class:`AutoAutoregressive`.
    :param init_loc_fn: as for :class:`AutoAutoregressive`.
    :param init_scale: as for :class:`AutoAutoregressive`.
    :raises TypeError: as for :class:`AutoAutoregressive`.
    :raises ValueError: as for :class:`AutoAutoregressive`, and for a size that is not positive.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_artransform import AutoIAF
        >>> def model():
        ...     with pyro.plate("coordinates", 2):
        ...         pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> guide = AutoIAF(model)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        >>> losses = [svi.step() for _ in range(10)]
        >>> guide.sample_posterior(5)["z"].shape
        torch.Size([5, 2])

    **References**

    1. Improved Variational Inference with Inverse Autoregressive Flow (Kingma, Salimans,
       Jozefowicz, Chen, Sutskever, Welling, 2016), https://arxiv.org/abs/1606.04934
    """

    _layers, _has_hinges = staticmethod(iaf), True

    @classmethod
    def _network(cls, latent_dim: int) -> Arguments:
        # widths are compared in benchmarks/flows.md
        width = max(128, min(8 * latent_dim, 256), 3 * latent_dim)
        return {"hidden_dims": [width], "nonlinearity": default_activation(latent_dim)}


class AutoMAF(PresetGuide):
    """A guide whose flow is a masked autoregressive flow: the density at any values is cheap.

    Its layers are ``num_transforms`` affine autoregressive ones in alternating order, as
    :func:`~pyro_artransform.maf` makes them, then compressed tails, location and scale, as those of
    :class:`AutoIAF`; in one dimension all are. Draws need the inverse of each layer, which costs several
    evaluations of its networks, so that a step of SVI is more expensive than :class:`AutoIAF`'s.

    :param model: a Pyro model.
    :param num_transforms: the number of autoregressive layers; their order alternates.
    :param hidden_dims: the width or widths of the hidden layers of each network, by default two of
        ``max(64, 2 * latent_dim)``.
    :param nonlinearity: their activation, by default ``torch.nn.ELU()``.
    :param skip_connections: as for :class:`AutoIAF`.
    :param full_rank: as for :class:`AutoAutoregressive`.
    :param init_loc_fn: as for :class:`AutoAutoregressive`.
    :param init_scale: as for :class:`AutoAutoregressive`.
    :raises TypeError: as for :class:`AutoIAF`.
    :raises ValueError: as for :class:`AutoIAF`.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_artransform import AutoMAF
        >>> def model():
        ...     with pyro.plate("coordinates", 2):
        ...         pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> guide = AutoMAF(model)
        >>> draws = guide.sample_posterior(5)
        >>> guide.log_prob(draws).shape
        torch.Size([5])

    **References**

    1. Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou, Murray, 2017),
       https://arxiv.org/abs/1705.07057
    """

    # hinges would add noise to gradients that are expensive already
    _layers, _has_hinges = staticmethod(maf), False

    @classmethod
    def _network(cls, latent_dim: int) -> Arguments:
        width = max(64, 2 * latent_dim)
        return {"hidden_dims": [width] * 2, "nonlinearity": nn.ELU()}
