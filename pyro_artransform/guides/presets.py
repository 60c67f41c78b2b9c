# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Flow guides that need no choice of a flow."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn

from ..arguments import check_callable
from ..flows import hinged_marginals, iaf, maf, spline_autoregressive
from ..transforms import chain
from .autoregressive import AutoAutoregressive
from .flow_factory import check_count
from .persistence import serialization as saving

Nonlinearity = Callable[[Tensor], Tensor]
_Network = tuple[int | list[int], Nonlinearity]


class PresetGuide(AutoAutoregressive):
    """A guide whose flow is a stack of one kind, and can be built again from plain data."""

    @staticmethod
    def _stack(latent_dim: int, *shape: Any, **options: Any) -> nn.Module:
        """The flow in more than one dimension, of so many layers with such networks."""
        raise NotImplementedError

    @staticmethod
    def _default_network(latent_dim: int) -> _Network:
        """The hidden layers and the activation where none are given."""
        raise NotImplementedError

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_transforms: int = 3,
        hidden_dims: int | Sequence[int] | None = None,
        nonlinearity: Nonlinearity | None = None,
        full_rank: bool | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        shape = (check_count("num_transforms", num_transforms), _check_hidden_dims(hidden_dims))
        if nonlinearity is not None:
            check_callable(
                "nonlinearity", nonlinearity, "a function or a module such as torch.nn.ELU()"
            )
        super().__init__(
            model,
            flow=partial(self._preset_flow, *shape, nonlinearity),
            full_rank=full_rank,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
        )
        self._arguments.update(
            num_transforms=shape[0], hidden_dims=shape[1], nonlinearity=nonlinearity
        )

    @classmethod
    def _network(
        cls,
        latent_dim: int,
        hidden_dims: int | list[int] | None,
        nonlinearity: Nonlinearity | None,
    ) -> _Network:
        """What was given, and for the rest the defaults."""
        default_dims, default_nonlinearity = cls._default_network(latent_dim)
        return (
            default_dims if hidden_dims is None else hidden_dims,
            default_nonlinearity if nonlinearity is None else nonlinearity,
        )

    @classmethod
    def _preset_flow(
        cls,
        num_transforms: int,
        hidden_dims: int | list[int] | None,
        nonlinearity: Nonlinearity | None,
        latent_dim: int,
    ) -> nn.Module:
        hidden_dims, nonlinearity = cls._network(latent_dim, hidden_dims, nonlinearity)
        # affine layers keep the tails of Gaussian noise, and in one dimension are a Gaussian together
        if latent_dim > 1:
            return cls._stack(latent_dim, num_transforms, hidden_dims, nonlinearity=nonlinearity)
        count = range(num_transforms)
        splines = [spline_autoregressive(1, hidden_dims, nonlinearity=nonlinearity) for _ in count]
        return chain([hinged_marginals(1), *splines])

    def _arguments_to_plain(self) -> dict[str, Any]:
        # with the defaults, so that a version that has others reads the same flow
        given = self._arguments["hidden_dims"], self._arguments["nonlinearity"]
        hidden_dims, nonlinearity = self._network(self.latent_dim, *given)
        plain = saving.nonlinearity_to_plain(nonlinearity)
        return {**self._arguments, "hidden_dims": hidden_dims, "nonlinearity": plain}

    @classmethod
    def _arguments_from_plain(cls, plain: dict[str, Any]) -> dict[str, Any]:
        nonlinearity = saving.nonlinearity_from_plain(plain["nonlinearity"])
        return {**plain, "nonlinearity": nonlinearity}


class AutoIAF(PresetGuide):
    """A guide whose flow is an inverse autoregressive flow: a draw and its density are cheap.

    That is what variational inference asks of a guide. The density at values from elsewhere
    (:meth:`log_prob`) needs the inverse of the flow, which costs several evaluations of its
    networks.

    :param model: a Pyro model.
    :param num_transforms: the number of autoregressive layers; their order alternates.
    :param hidden_dims: the width or widths of the hidden layers of each network; by default one
        layer of ``max(128, 4 * latent_dim)``.
    :param nonlinearity: their activation, by default ``torch.nn.SiLU()``, which is of second order
        near zero, as the skewness of a posterior is. A guide with a module of ``torch.nn`` or a
        function of ``torch`` can be saved by :meth:`save`.
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

    @staticmethod
    def _stack(latent_dim: int, *shape: Any, **options: Any) -> nn.Module:
        layers = iaf(latent_dim, *shape, **options)
        return chain([hinged_marginals(latent_dim), layers])

    @staticmethod
    def _default_network(latent_dim: int) -> _Network:
        return max(128, 4 * latent_dim), nn.SiLU()


class AutoMAF(PresetGuide):
    """A guide whose flow is a masked autoregressive flow: the density at any values is cheap.

    Draws need the inverse of each layer, which costs several evaluations of its networks, so that
    each step of SVI costs more than :class:`AutoIAF`'s. Its arguments are the same, with other networks
    by default.

    :param model: a Pyro model.
    :param num_transforms: the number of autoregressive layers; their order alternates.
    :param hidden_dims: the width or widths of the hidden layers of each network, by default two of
        ``max(64, 2 * latent_dim)``.
    :param nonlinearity: their activation, by default ``torch.nn.ELU()``. A guide with a module of
        ``torch.nn`` or a function of ``torch`` can be saved by :meth:`save`.
    :param full_rank: as for :class:`AutoAutoregressive`.
    :param init_loc_fn: as for :class:`AutoAutoregressive`.
    :param init_scale: as for :class:`AutoAutoregressive`.
    :raises TypeError: as for :class:`AutoAutoregressive`.
    :raises ValueError: as for :class:`AutoAutoregressive`, and for a size that is not positive.

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

    @staticmethod
    def _stack(latent_dim: int, *shape: Any, **options: Any) -> nn.Module:
        # noise of hinges in front of layers that are dear to draw from would slow plain SVI down
        return maf(latent_dim, *shape, **options)

    @staticmethod
    def _default_network(latent_dim: int) -> _Network:
        return [max(64, 2 * latent_dim)] * 2, nn.ELU()


def _check_hidden_dims(hidden_dims: int | Sequence[int] | None) -> int | list[int] | None:
    if hidden_dims is None:
        return None
    widths = [hidden_dims] if isinstance(hidden_dims, int) else list(hidden_dims)
    if not widths or not all(isinstance(width, int) and width > 0 for width in widths):
        raise ValueError(f"hidden_dims: expected positive integers, got {hidden_dims!r}")
    return widths
