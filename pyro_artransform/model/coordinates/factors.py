# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Latents that a model multiplies by other latents before any other use, as in ``z * tau * lam``.

Torch's functions are intercepted while the model runs. Only multiplications are known; any other use of a
latent, or of a product, ends the search for factors.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import validation_enabled
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..handlers import hidden_sites
from .families import PriorScale

# functions that multiply two tensors, and functions that read no values
_MULTIPLY: frozenset[Any] = frozenset(
    {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__}
)
_METADATA: frozenset[Any] = frozenset(
    {Tensor.dim, Tensor.size, Tensor.ndim.__get__, Tensor.shape.__get__, Tensor.dtype.__get__}  # type: ignore[attr-defined]
)


class OtherUseError(RuntimeError):
    """A model uses a latent otherwise than in its first run."""

    words = (
        "expected the model to multiply these latents as in its first run, before any other use. Let it do "
        "the same operations for all values of latents"
    )


class _Product(NamedTuple):
    """A latent, or its product with the first of its factors."""

    tensor: Tensor
    num_left: int  #: the number of factors to come
    factor: Any  #: the product of the factors so far; None before the first
    at_last: Callable[[Any], Tensor]


class Products(TorchFunctionMode):
    """Replaces the product of a latent and all its factors by the value of a function of the factors."""

    def __init__(self) -> None:
        super().__init__()
        self._known = dict[int, _Product]()

    def follow(self, value: Tensor, num_factors: int, at_last: Callable[[Any], Tensor]) -> None:
        """Follows a latent.

        :param at_last: maps the product of the factors to that of the latent and the factors.
        """
        self._known[id(value)] = _Product(value, num_factors, None, at_last)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _MULTIPLY and not kwargs:
            for own, other in (args, args[::-1]):
                if (known := self._known.get(id(own))) is not None:
                    factor = other if known.factor is None else known.factor * other
                    if known.num_left == 1:
                        return known.at_last(factor)
                    tensor = func(*args)  # of the right shape; its values are not used
                    self._known[id(tensor)] = _Product(
                        tensor, known.num_left - 1, factor, known.at_last
                    )
                    return tensor
        leaves = tree_leaves((args, kwargs)) if self._known and func not in _METADATA else []
        if any(id(leaf) in self._known for leaf in leaves):
            raise OtherUseError(OtherUseError.words)
        return func(*args, **(kwargs or {}))


class _Uses(TorchFunctionMode):
    """Records the uses of latents and of their products."""

    def __init__(self) -> None:
        super().__init__()
        #: the products that a tensor is part of, by id; None for another use
        self._uses = dict[int, list[Tensor | None]]()
        self._tensors = list[Tensor]()  # which keeps ids unique

    def follow(self, tensor: Tensor) -> None:
        self._uses[id(tensor)] = []
        self._tensors.append(tensor)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        followed = [id(leaf) for leaf in tree_leaves((args, kwargs)) if id(leaf) in self._uses]
        if followed and func not in _METADATA:
            is_product = func in _MULTIPLY and not kwargs and len(followed) == 1
            for key in followed:
                self._uses[key].append(found if is_product else None)
            if is_product:
                self.follow(found)
        return found

    def num_factors(self, tensor: Tensor) -> int:
        """The number of factors of its own shape that a tensor is multiplied by before any other use."""
        number = 0
        while len(uses := self._uses[id(tensor)]) == 1:
            (product,) = uses
            if product is None or product.shape != tensor.shape:
                break
            number, tensor = number + 1, product
        return number


class _Followed(Messenger):
    """Follows the values of latents through a run."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.uses, self._names, self.tensors = _Uses(), set(names), dict[str, Tensor]()

    def _pyro_post_sample(self, message: Any) -> None:
        name, scale = message["name"], message["scale"]
        is_plain = message["mask"] is None and isinstance(scale, float | int) and scale == 1
        if name in self._names and is_plain and type(PriorScale.of(message["fn"])) is PriorScale:
            message["value"] = self.tensors[name] = message["value"].clone()
            self.uses.follow(message["value"])


@torch.no_grad()
def find_factors(
    run: Callable[[], object], values: Mapping[str, Tensor], names: Iterable[str]
) -> dict[str, int]:
    """The number of factors by which a model multiplies latents before any other use, where not zero.

    :param run: the model at its arguments.
    :param values: values of all latents.
    :param names: the latents on the whole real line to look at; their priors must have a scale.
    """
    followed, random = _Followed(names), torch.random.fork_rng(devices=[])
    with random, validation_enabled(False), hidden_sites(), followed.uses, followed:
        poutine.condition(run, dict(values))()
    counts = {k: followed.uses.num_factors(tensor) for k, tensor in followed.tensors.items()}
    return {name: count for name, count in counts.items() if count}
