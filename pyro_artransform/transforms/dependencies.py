# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Whether a meta is autoregressive, found by differentiation.

A network without masks gives a wrong log-determinant and a wrong inverse, and no other sign of it.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..arguments import values_can_be_read
from .meta import Meta, check_returned

_DRAWS = 2


def dependencies(meta: Meta, x: Tensor) -> Tensor:
    r"""Which coordinates the univariate transform of each coordinate depends on.

    The map :math:`u \mapsto \mathrm{meta}(u)^{-1}(y)` at fixed y is the one that the inverse iterates; the
    transform is autoregressive, up to an order of the coordinates, if its Jacobian has no cycle. It
    is differentiated at a random point with the parameters as they are and with re-drawn ones, since
    a last layer of zeros hides every dependence.

    :param x: shape ``(*, D)``; its shape, dtype and device are used.
    :return: boolean, shape ``(D, D)``: ``[i, j]`` says that the transform of coordinate i depends on x_j.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1,) * (x.dim() - 1) + x.shape[-1:]
    depends = torch.zeros(x.shape[-1:] * 2, dtype=torch.bool, device=x.device)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for candidate in _candidates(meta, generator):
            point = _normal(shape, x, generator)
            depends = depends | _dependencies(candidate, point)
    return depends


class StructureCheck:
    """Looks once whether a meta is autoregressive; conditioned copies of a transform share one.

    If nothing depends on x yet, as with a last layer of zeros that cannot be re-drawn, it looks again at
    the 2nd, 4th, 8th, ... call.
    """

    done = False
    _calls = 0

    def faults_if_due(self, meta: Meta, x: Tensor) -> list[int]:
        """As :meth:`faults`, where it is time to look and values can be read; else nothing."""
        self._calls += 1
        due = self._calls & (self._calls - 1) == 0
        if not due or not values_can_be_read(x) or torch.is_inference_mode_enabled():
            return []
        return self.faults(meta, x)

    def faults(self, meta: Meta, x: Tensor) -> list[int]:
        """The coordinates at fault, none if the meta is autoregressive."""
        depends = dependencies(meta, x)
        self.done = isinstance(meta, nn.Module) or bool(depends.any())
        return _on_a_cycle(depends)


def describe(faults: list[int]) -> str:
    """What is wrong and what to do, in words."""
    return (
        f"the meta is not autoregressive: the parameters of the coordinates {faults} depend on these "
        "coordinates themselves, so the log-determinant and the inverse are wrong. Use "
        "pyro_artransform.conditioners.MaskedMLP, or wrap the network in MaskedInput(net), which makes "
        "any network autoregressive"
    )


def _candidates(meta: Meta, generator: torch.Generator) -> Iterator[Meta]:
    """The meta as it is, and with re-drawn parameters where they can be seen."""
    if not isinstance(meta, nn.Module):
        yield meta
        return
    # a copy, since layers such as batch normalization change when they are used in training
    copied = copy.deepcopy(meta).eval()
    yield copied
    for _ in range(_DRAWS):
        yield _redrawn(copied, generator)


def _redrawn(meta: nn.Module, generator: torch.Generator) -> Meta:
    """The module with other parameters; its own stay as they are."""
    parameters = {
        name: _normal(p.shape, p, generator) / max(p[0].numel() if p.dim() > 1 else 4, 1) ** 0.5
        for name, p in meta.named_parameters()
        if p.is_floating_point()
    }
    return lambda x: functional_call(meta, parameters, (x,))


def _normal(
    shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator
) -> Tensor:
    # drawn on the CPU, where a generator works for every device
    draw = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return draw.to(dtype=like.dtype, device=like.device)


def _dependencies(meta: Meta, point: Tensor) -> Tensor:
    """The matrix of :func:`dependencies`, seen at one point."""
    point = point.detach().requires_grad_()
    transform = check_returned(meta(point))
    if transform.event_dim == 0:
        out = transform(point.detach())
    else:
        out = transform.inv(meta(point.detach())(point.detach()).detach())
    rows = [_gradient(out[..., i].sum(), point) for i in range(point.shape[-1])]
    size = torch.stack(rows).abs()
    return size > 1e3 * torch.finfo(size.dtype).eps * size.nan_to_num().max()


def _gradient(out: Tensor, point: Tensor) -> Tensor:
    """The gradient summed over the batch; zero where the output does not depend on the point."""
    gradient = None
    if out.requires_grad:
        (gradient,) = torch.autograd.grad(out, point, retain_graph=True, allow_unused=True)
    gradient = torch.zeros_like(point) if gradient is None else gradient
    return gradient.reshape(-1, point.shape[-1]).sum(0)


def _on_a_cycle(depends: Tensor) -> list[int]:
    """The nodes that reach themselves."""
    reach = depends.float()
    for _ in range(len(depends).bit_length()):
        reach = ((reach + reach @ reach) > 0).float()
    return reach.diagonal().nonzero().flatten().tolist()
