# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""An amortised posterior on the unconstrained space: globals, then each group of locals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .factors import GlobalFactor, LocalFactor, base_of
from .layout import Group, Layout

Latents = dict[str, Tensor]


class Hierarchy(nn.Module):
    r"""The factors of an amortised posterior, and the encoder.

    .. math::

        q(g) \prod_k \prod_i q(z^k_i \mid g, z^{\mathrm{parents\ of\ } k}_i, h^k_i)

    :param globals_: the factor of the globals, if there are some.
    :param locals_: those of the groups of locals, in their order.
    :param encoder: the encoder, if it is a module.
    """

    def __init__(
        self,
        globals_: GlobalFactor | None,
        locals_: Sequence[LocalFactor],
        encoder: nn.Module | None,
    ) -> None:
        super().__init__()
        self.globals = globals_
        self.locals = nn.ModuleList(locals_)
        self.encoder = encoder

    @property
    def factors(self) -> list[LocalFactor]:
        """The factors of the groups."""
        return list(self.locals)  # type: ignore[arg-type]

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and the device of the latents."""
        return self.factors[0].loc if self.globals is None else self.globals.loc

    def rest(
        self, layout: Layout, group: Group, latent: Tensor | None, drawn: Latents
    ) -> list[Tensor]:
        """What the locals of a group depend on besides the features of each element.

        All elements together know the globals better than one of them does, by the square root of
        their number: in units of what one knows, the globals move an element by a number of order
        one. In larger units a first, random dependence on them would cost as much as all elements
        together, and the globals would hide from it by becoming too narrow.

        :param layout: the layout of the latents.
        :param group: the group.
        :param latent: the globals, shape ``(*, D)``.
        :param drawn: the locals of the parents.
        :return: tensors of shape ``(*, C)``, whose batch shapes broadcast.
        """
        seen = []
        if self.globals is not None and latent is not None:
            seen.append(self.globals.as_context(latent) / math.sqrt(group.num_elements))
        factors = {group.name: factor for group, factor in zip(layout.groups, self.factors)}
        return seen + [drawn[name] - factors[name].loc for name in group.parents]

    def forward(
        self,
        layout: Layout,
        k: int | None,
        row: Tensor | None,
        latent: Tensor | None,
        drawn: Latents,
        pair: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The log-density of one factor where both sides of its transform are known.

        :param layout: the layout of the latents.
        :param k: the number of the group, None for the globals.
        :param row: the features or embeddings of its elements.
        :param latent: the globals.
        :param drawn: the locals of the parents.
        :param pair: the argument and the value of the transform, shape ``(*, D)`` each.
        :return: shape ``(*,)``.
        """
        transform: Any = None if self.globals is None else self.globals.transform
        if k is not None:
            rest = self.rest(layout, layout.groups[k], latent, drawn)
            transform = self.factors[k].transform(row, rest)  # type: ignore[arg-type]
        x, ladj = transform.inverse_at(*pair)
        return _normal(x) + ladj

    def at_fixed_parameters(self, *args: Any) -> Tensor:
        """:meth:`forward` with a gradient by the latents only.

        :param args: its arguments.
        """
        fixed = {name: parameter.detach() for name, parameter in self.named_parameters()}
        log_density: Tensor = functional_call(self, fixed, args)
        return log_density

    def draw(
        self, layout: Layout, rows: Mapping[str, Tensor], n: int
    ) -> tuple[Tensor | None, Latents]:
        """Draws of all latents.

        :param layout: the layout of the latents.
        :param rows: the features or embeddings of the elements of each group.
        :param n: how many draws.
        :return: the globals, and the locals of each group; the dimension of the draws is to the left
            of those of all plates.
        """
        lead = (n,) + (1,) * layout.batch_dims
        latent, drawn = None, Latents()
        if self.globals is not None:
            x = base_of(self.like, lead, len(self.globals.loc)).sample()
            latent = self.globals.transform.call_and_ladj(x)[0]
        for group, factor in zip(layout.groups, self.factors):
            row = rows[group.name]
            transform = factor.transform(row, self.rest(layout, group, latent, drawn))
            batch = torch.broadcast_shapes(lead, row.shape[:-1])
            x = base_of(self.like, batch, factor.latent_dim).sample()
            drawn[group.name] = transform.call_and_ladj(x)[0]
        return latent, drawn

    def start_near(
        self, layout: Layout, latent: Tensor | None, drawn: Latents, share: float
    ) -> None:
        """Sets locations and scales, and the linear dependence on the globals, by draws.

        :param layout: the layout of the latents.
        :param latent: draws of the globals, shape ``(n, 1, ..., D)``.
        :param drawn: those of the locals, shape ``(n, 1, ...) + batch shape + (D,)``.
        :param share: by what to multiply the covariance of the globals.
        """
        if self.globals is None or latent is None:
            return
        flat = latent.reshape(len(latent), -1)
        self.globals.start_near(flat, share)
        context = self.globals.as_context(flat)
        for group, factor in zip(layout.groups, self.factors):
            elements = drawn[group.name].reshape(len(flat), -1, factor.latent_dim)
            factor.start_near(context / math.sqrt(group.num_elements), elements)

    def log_prob(
        self, layout: Layout, rows: Mapping[str, Tensor], latent: Tensor | None, drawn: Latents
    ) -> Tensor:
        """The log-density of all latents, of the elements that have rows.

        :param layout: the layout of the latents.
        :param rows: the features or embeddings of the elements of each group.
        :param latent: the globals, as of :meth:`draw`.
        :param drawn: the locals, likewise.
        :return: shape ``(n,)``.
        """
        parts = []
        if self.globals is not None and latent is not None:
            x, ladj = self.globals.transform.inverse_and_ladj(latent)
            parts.append(_normal(x) + ladj)
        for group, factor in zip(layout.groups, self.factors):
            rest = self.rest(layout, group, latent, drawn)
            x, ladj = factor.transform(rows[group.name], rest).inverse_and_ladj(drawn[group.name])
            parts.append(_normal(x) + ladj)
        return torch.stack([part.flatten(1).sum(-1) for part in parts]).sum(0)


def _normal(x: Tensor) -> Tensor:
    log_density: Tensor = base_of(x, x.shape[:-1], x.shape[-1]).log_prob(x)
    return log_density
