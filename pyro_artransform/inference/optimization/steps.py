# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Steps of parameters along clipped gradients, without those that are not finite."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .optimizers import Optimizer

Gradients = Sequence[Tensor | None]

# steps whose median norm clips gradients
_CLIP_WINDOW = 100
# steps in a row that are not finite before a fit gives up, and skipped steps whose sites are named
_MAX_SKIPS, _MAX_NAMED = 100, 20


class FitError(RuntimeError):
    """A fit that cannot go on."""


class Steps:
    """Steps of parameters by an optimizer, with what is needed to clip and to count them.

    :param clip_factor: gradients are clipped to this multiple of the median norm of the last steps.
    """

    optimizer: Optimizer

    def __init__(self, parameters: Iterable[Tensor], clip_factor: float) -> None:
        self.trained, self._clip_factor = list(parameters), clip_factor
        #: the loss of each step, NaN where the step was skipped
        self.losses: list[float] = []
        #: the sites because of which steps were skipped, with the number of times
        self.culprits: Counter[str] = Counter()
        self._norms: list[float] = []

    @property
    def num_steps(self) -> int:
        """The steps taken so far, the skipped ones included."""
        return len(self.losses)

    @property
    def num_skipped(self) -> int:
        return sum(map(math.isnan, self.losses))

    def last_are_skipped(self, count: int) -> bool:
        """Whether so many steps in a row were skipped just now."""
        return sum(map(math.isnan, self.losses[-count:])) == count

    def value_and_gradients(self, loss: Tensor) -> tuple[float, Gradients | None]:
        """A loss, and its gradients where it is finite."""
        value = loss.item()
        if not math.isfinite(value):
            return value, None
        return value, torch.autograd.grad(loss, self.trained, allow_unused=True)

    def take(self, loss: float, gradients: Gradients | None) -> None:
        """Takes a step, or skips it where there is no gradient, or one that is not finite.

        :raises FitError: if too many steps in a row were skipped.
        """
        present = [gradient for gradient in gradients or () if gradient is not None]
        norm = math.inf
        if gradients is not None:
            norms = torch._foreach_norm(present)
            norm = torch.stack([*map(Tensor.double, norms)]).norm().item()
        if gradients is None or not math.isfinite(norm):
            self._skip()
            return
        self.losses.append(loss)
        self._norms = [*self._norms[1 - _CLIP_WINDOW :], norm]
        limit = self._clip_factor * statistics.median(self._norms)
        shrink = min(1.0, limit / norm) if norm > 0 else 1.0
        if shrink < 1.0:
            torch._foreach_mul_(present, shrink)
        for parameter, gradient in zip(self.trained, gradients):
            if gradient is not None and gradient.stride() != parameter.stride():
                # PyTorch's fused Adam reads both in the order of memory
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        self.optimizer.step()
        for parameter in self.trained:
            parameter.grad = None

    def nonfinite_sites(self) -> list[str]:
        """The sites that made the last loss other than finite, as far as they are known."""
        return []

    def _skip(self) -> None:
        if self.num_skipped < _MAX_NAMED:  # naming a site runs the model again
            self.culprits.update(self.nonfinite_sites() or ["the gradient"])
        self.losses.append(math.nan)
        if self.last_are_skipped(_MAX_SKIPS):
            raise FitError(
                f"the fit stopped: the loss or its gradient was not finite in {_MAX_SKIPS} steps "
                f"in a row, because of {', '.join(self.culprits)}. The parameters are finite, as the "
                "last good steps left them. Check the data, and that the model and its gradient are finite "
                "for all its latents: what a mask or torch.where leaves out of a value, NaN for example, "
                "stays in its gradient"
            )

    def copies(self) -> list[Tensor]:
        """The values of all parameters."""
        return copies(self.trained)

    def set_parameters(self, values: Iterable[Tensor]) -> None:
        """Puts the parameters at given values, one for each, in place."""
        copy_to(self.trained, values)


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The values of tensors."""
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def copy_to(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Puts tensors at given values, one for each, in place."""
    for tensor, value in zip(tensors, values):
        tensor.copy_(value)
