# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Checks that a meta is autoregressive, by differentiation, and treats each row independently.

A network without masks, or with dropout, gives a wrong log-determinant and a wrong inverse, without any
other symptom.
"""

import copy
import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch
from pyro.distributions import is_validation_enabled
from torch import Tensor, nn
from torch.func import functional_call

from ..._base.arguments import values_can_be_read, warn_user
from .conditioned import AutoregressiveMeta, Meta, check_returned

_RANDOM = (
    "the meta is random: it gives a different transform each time for the same x, so log-determinants and "
    "inverses are wrong. Use deterministic layers and nonlinearities, or call .eval() if they are random "
    "only in training, like dropout"
)
_MIXES_ROWS = (
    "the meta mixes the rows of a batch: the transform of a row depends on other rows, so densities are "
    "wrong. Use layers and nonlinearities that act on each row alone, or call .eval() if they mix rows only "
    "in training, like batch normalization"
)


class StructureCheck:
    """Checks a transform and its conditioned copies at the first call.

    If nothing depends on x yet (zeros that cannot be redrawn), it repeats at the 2nd, 4th, 8th, ... call.
    """

    done = False
    _calls = 0

    def fault_if_due(self, meta: Meta, x: Tensor) -> str:
        """:meth:`fault` if a check is due and values can be read; else empty."""
        self._calls += 1
        due = self._calls & (self._calls - 1) == 0
        if not due or not values_can_be_read(x) or torch.is_inference_mode_enabled():
            return ""
        return self.fault(meta, x)

    def fault(self, meta: Meta, x: Tensor) -> str:
        """Describes a fault and its remedy; empty if there is none."""
        depends = dependencies(meta, x)
        self.done = isinstance(meta, nn.Module) or bool(depends.any())
        reach = depends.float()
        for _ in range(len(depends).bit_length()):
            reach = ((reach + reach @ reach) > 0).float()
        nodes = reach.diagonal().nonzero().flatten().tolist()  # coordinates on a cycle
        if not nodes:
            return fault_of_rows(meta, x)
        return (
            f"the meta is not autoregressive: the parameters of the coordinates {nodes} depend on these "
            "coordinates themselves, so the log-determinant and the inverse are wrong. Use "
            "pyro_artransform.flows.conditioners.MaskedMLP, or wrap the network in MaskedInput(net), which "
            "makes any network autoregressive"
        )


def dependencies(meta: Meta, x: Tensor) -> Tensor:
    r"""The coordinates that the univariate transform of each coordinate depends on.

    The inverse iterates :math:`u \mapsto \mathrm{meta}(u)^{-1}(y)` at fixed y; the transform is
    autoregressive, for some order of the coordinates, if the graph of this map's Jacobian has no cycle. It is
    differentiated at random points, with the current and with redrawn parameters, since a last layer of
    zeros hides all dependencies.

    :param x: shape ``(*, D)``; its values are not used.
    :return: boolean, shape ``(D, D)``: ``[i, j]`` is whether the transform of coordinate i depends on x_j.
    """
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size((1,) * (x.dim() - 1) + x.shape[-1:])
    depends = torch.zeros(x.shape[-1:] * 2, dtype=torch.bool, device=x.device)
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        # a copy, since layers such as batch normalization change in training
        still = copy.deepcopy(meta).eval() if isinstance(meta, nn.Module) else meta
        for candidate in _candidates(still, generator):
            point = _normal(shape, x, generator)

            def image(u: Tensor, meta: Meta = candidate, point: Tensor = point) -> Tensor:
                transform = check_returned(meta(u))
                out = transform.inv(meta(point)(point)) if transform.event_dim else transform(point)
                return out.reshape(-1, out.shape[-1]).sum(0)

            size = torch.autograd.functional.jacobian(image, point).reshape(depends.shape).abs()
            depends |= size > 1e3 * torch.finfo(size.dtype).eps * size.nan_to_num().max()
    return depends


@torch.no_grad()
def fault_of_rows(meta: Meta, x: Tensor) -> str:
    """Describes whether the transform of a row is random or depends on other rows; empty if neither."""
    generator = torch.Generator().manual_seed(0)
    batch = meta.batch_shape if isinstance(meta, AutoregressiveMeta) else ()
    rows = [2 if size == 1 else size for size in batch] or [2] * max(x.dim() - 1, 1)
    shape = torch.Size((*rows, x.shape[-1]))
    near = 1e2 * torch.finfo(x.dtype).eps
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        as_it_is = copy.deepcopy(meta) if isinstance(meta, nn.Module) else meta
        for candidate in _candidates(as_it_is, generator):
            point, other = _normal(shape, x, generator), _normal(shape, x, generator)
            other.view(-1, shape[-1])[:1] = point.view(-1, shape[-1])[:1]
            values = [check_returned(candidate(u))(u) for u in (point, point, other)]
            first, again, mixed = (value.reshape(-1, value.shape[-1]) for value in values)
            if not torch.equal(first.nan_to_num(), again.nan_to_num()):
                return _RANDOM
            if not torch.allclose(first[:1], mixed[:1], rtol=near, atol=near, equal_nan=True):
                return _MIXES_ROWS
    return ""


def warn_of_hidden_parameters(meta: object) -> None:
    """Warns, with Pyro's validation on, of a function that uses a module to train, unless it is ``self``."""
    used: Iterable[object] = ()
    if isinstance(meta, functools.partial):
        used = (*meta.args, *meta.keywords.values())
    elif inspect.isfunction(meta):
        with suppress(ValueError):  # a variable may be bound later
            found = inspect.getclosurevars(meta)
            used = {**found.globals, **found.nonlocals, "self": None}.values()
    modules = nn.ModuleList(part for part in used if isinstance(part, nn.Module))
    if is_validation_enabled() and any(p.requires_grad for p in modules.parameters()):
        why = "a function hides its module from the transform: pass an nn.Module"
        warn_user(f"meta: {why} as meta, so that its parameters are trained", UserWarning)


def _candidates(meta: Meta, generator: torch.Generator) -> Iterator[Meta]:
    """Yields the meta with its current parameters, and, for a module, with redrawn ones."""
    yield meta
    if isinstance(meta, nn.Module):
        for _ in range(2):
            drawn = {}
            for name, p in meta.named_parameters():
                if p.is_floating_point():
                    fan_in = max(p[0].numel(), 1) if p.dim() > 1 else 4
                    drawn[name] = _normal(p.shape, p, generator) / fan_in**0.5
            yield functools.partial(functional_call, meta, drawn)


def _normal(shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    # drawn on the CPU, since a CPU generator works for all devices
    draw = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return draw.to(dtype=like.dtype, device=like.device)
