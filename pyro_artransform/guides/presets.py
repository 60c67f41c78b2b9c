# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Flow guides with preset flows."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn

from .._base.arguments import check_callable, check_flag, check_hidden_dims, check_integer
from ..flows.builders import hinged_marginals, iaf, maf, spline_marginals
from ..flows.conditioners import default_activation
from ..flows.transforms import CompressedTails, FlowModule, chain
from ..flows.univariate import Affine
from ..model.coordinates.centering import CoordinatesArgument
from .autoregressive import AutoAutoregressive

Arguments = dict[str, Any]


def _network(
    num_transforms: int,
    hidden_dims: int | Sequence[int] | None,
    nonlinearity: Callable[[Tensor], Tensor] | None,
    skip_connections: bool,
) -> Arguments:
    """The arguments of the layers that were given, checked."""
    given: Arguments = {
        "num_transforms": check_integer("num_transforms", num_transforms),
        "skip_connections": check_flag("skip_connections", skip_connections),
    }
    if hidden_dims is not None:
        given["hidden_dims"] = check_hidden_dims(hidden_dims)
    if nonlinearity is not None:
        wanted = "a function or a module such as torch.nn.ELU()"
        given["nonlinearity"] = check_callable("nonlinearity", nonlinearity, wanted)
    return given


def _flow(make: Callable[..., FlowModule], network: Arguments, latent_dim: int) -> nn.Module:
    """Affine layers, of ``make``, between hinges for an IAF and compressed tails."""
    count = network.pop("num_transforms")
    if latent_dim == 1:
        # affine layers of one coordinate compose to a Gaussian
        splines = [spline_marginals(1) for _ in range(count)]
        return chain([hinged_marginals(1), *splines, CompressedTails()])
    # at 1, draws of plain SVI in float32 (Adam, 1e-2, one particle) overflow models in 1 of 20 runs, at 0.3
    # and 0.1 in none of 16
    univariate = partial(Affine, multiplier=0.1)
    layers = make(latent_dim, count, univariate=univariate, **network)
    # in a MAF hinges would add noise to gradients that are already expensive
    hinges = [hinged_marginals(latent_dim)] if make is iaf else []
    # scales of three layers multiply, so that draws without bound overflow models in float32
    return chain([*hinges, layers, CompressedTails()])


def _iaf_flow(given: Arguments, latent_dim: int) -> nn.Module:
    # benchmarks/flows.md compares widths
    width = max(128, min(8 * latent_dim, 256), 3 * latent_dim)
    usual = {"hidden_dims": [width], "nonlinearity": default_activation(latent_dim)}
    return _flow(iaf, usual | given, latent_dim)


def _maf_flow(given: Arguments, latent_dim: int) -> nn.Module:
    usual = {"hidden_dims": [max(64, 2 * latent_dim)] * 2, "nonlinearity": nn.ELU()}
    return _flow(maf, usual | given, latent_dim)


class AutoIAF(AutoAutoregressive):
    """A guide with an inverse autoregressive flow: draws with densities are cheap.

    The layers, from the standard Normal to the unconstrained space of all latents, are:

    1. :func:`~pyro_artransform.hinged_marginals`: hinges of each coordinate, for skewness and tails.
    2. ``num_transforms`` affine autoregressive layers, as in :func:`~pyro_artransform.iaf`, in the order of
       the latents and in reverse order by turns.
    3. :class:`~pyro_artransform.flows.transforms.CompressedTails`: beyond 40 units of the scale below, draws
       grow only logarithmically, so that models do not overflow.
    4. The location and the scale of :class:`AutoAutoregressive`.

    In one dimension, where affine layers compose to a Gaussian, ``num_transforms`` splines replace them, and
    there are no networks. The density at given values (:meth:`~AutoAutoregressive.log_prob`) needs several
    evaluations of each network.

    :param model: see :class:`AutoAutoregressive`, also for ``full_rank``, ``init_loc_fn``, ``init_scale`` and
        ``coordinates``.
    :param num_transforms: the number of autoregressive layers.
    :param hidden_dims: the width or widths of the hidden layers of each network; by default one
        layer of ``max(128, min(8 * latent_dim, 256), 3 * latent_dim)``.
    :param nonlinearity: the activation, by default ``torch.nn.SiLU()`` up to 64 latents, which has a
        second-order term near zero, like the skewness of a posterior, and
        :class:`~pyro_artransform.flows.conditioners.TiltedSiLU` beyond.
    :param skip_connections: whether each network has a linear layer from inputs to outputs, too; by default
        not. A regression on many columns is fitted better with ``nonlinearity=TiltedSiLU(0.0),
        skip_connections=True``, a funnel worse.
    :raises TypeError: as for :class:`AutoAutoregressive`.
    :raises ValueError: as for :class:`AutoAutoregressive`, and for a size that is not positive.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_artransform import AutoIAF
        >>> model = lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> guide = AutoIAF(model)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        >>> losses = [svi.step() for _ in range(10)]
        >>> guide.sample_posterior(5)["z"].shape
        torch.Size([5, 2])

    **References**

    1. Improved Variational Inference with Inverse Autoregressive Flow (Kingma, Salimans,
       Jozefowicz, Chen, Sutskever, Welling, 2016), https://arxiv.org/abs/1606.04934
    """

    def __init__(
        self,
        model: Callable[..., object],
        *,
        num_transforms: int = 3,
        hidden_dims: int | Sequence[int] | None = None,
        nonlinearity: Callable[[Tensor], Tensor] | None = None,
        skip_connections: bool = False,
        full_rank: bool | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        coordinates: CoordinatesArgument = "prior",
    ) -> None:
        given = _network(num_transforms, hidden_dims, nonlinearity, skip_connections)
        super().__init__(
            model,
            flow=partial(_iaf_flow, given),
            full_rank=full_rank,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
            coordinates=coordinates,
        )


class AutoMAF(AutoAutoregressive):
    """A guide with a masked autoregressive flow: the density at any values is cheap.

    The flow has ``num_transforms`` affine autoregressive layers in alternating order, as in
    :func:`~pyro_artransform.maf`, then compressed tails, location and scale, as in :class:`AutoIAF`; in one
    dimension it equals that of :class:`AutoIAF`. Draws need several evaluations of each network, so that a
    step of SVI is more expensive than for :class:`AutoIAF`.

    Arguments and errors are as for :class:`AutoIAF`, with other defaults: two layers of ``max(64, 2 *
    latent_dim)`` for ``hidden_dims``, ``torch.nn.ELU()`` for ``nonlinearity``.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_artransform import AutoMAF
        >>> guide = AutoMAF(lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)))
        >>> guide.log_prob(guide.sample_posterior(5)).shape
        torch.Size([5])

    **References**

    1. Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou, Murray, 2017),
       https://arxiv.org/abs/1705.07057
    """

    def __init__(
        self,
        model: Callable[..., object],
        *,
        num_transforms: int = 3,
        hidden_dims: int | Sequence[int] | None = None,
        nonlinearity: Callable[[Tensor], Tensor] | None = None,
        skip_connections: bool = False,
        **options: Any,
    ) -> None:
        given = _network(num_transforms, hidden_dims, nonlinearity, skip_connections)
        super().__init__(model, flow=partial(_maf_flow, given), **options)
