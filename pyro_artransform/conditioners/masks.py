# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Masks of autoregressive networks, as pure functions.

An *adjacency* is a boolean ``(D, D)`` matrix of a directed acyclic graph: entry ``[i, j]`` says that
the parameters of coordinate ``i`` may depend on ``x_j``. The *parents* of ``i`` are the ones of row ``i``.

A hidden unit carries the set of inputs that it may see, a boolean row of length D. A unit may feed another
one if its own set is a subset of the other's, and an output ``i`` if it is a subset of the parents of
``i``; then output ``i`` sees its parents and nothing else, at any depth. For the full graph of an order
the sets are nested and the rule is the one of MADE, with degrees in place of sets.

**References**

1. MADE: Masked Autoencoder for Distribution Estimation (Germain, Gregor, Murray, Larochelle, 2015),
   https://arxiv.org/abs/1502.03509
2. Graphical Normalizing Flows (Wehenkel, Louppe, 2021), https://arxiv.org/abs/2006.02548
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_graph(
    order: Tensor | Sequence[int] | None, adjacency: Tensor | None, input_dim: int
) -> tuple[Tensor, Tensor]:
    """A graph, and its coordinates sorted by level, from one of the two arguments or by default.

    :param order: a permutation: ``order[k]`` is the coordinate that comes k-th; by default 0 .. D-1.
    :param adjacency: see :func:`check_adjacency`.
    :param input_dim: the number D of coordinates.
    :return: the order, long of shape ``(D,)``, and the adjacency, shape ``(D, D)``, on the CPU.
    :raises ValueError: if one is wrong, or both are given.
    """
    if adjacency is not None:
        if order is not None:
            raise ValueError("expected an order or an adjacency, got both")
        adjacency = check_adjacency(adjacency, input_dim)
        return levels(adjacency).argsort(stable=True), adjacency
    natural = torch.arange(input_dim, device="cpu")
    order = natural if order is None else torch.as_tensor(order, device="cpu")
    if order.shape != natural.shape or not bool((order.sort().values == natural).all()):
        raise ValueError(
            f"order: expected a permutation of 0 .. {input_dim - 1}, got {order.tolist()}"
        )
    return order.long(), order_to_adjacency(order)


def check_adjacency(adjacency: Tensor, input_dim: int) -> Tensor:
    """An acyclic graph of D coordinates, of booleans or zeros and ones, as booleans on the CPU.

    :raises ValueError: if the shape or an entry is wrong or the graph has a cycle (a coordinate that
        depends on itself is one); the message names the cycle.
    """
    adjacency = torch.as_tensor(adjacency, device="cpu")
    expected = input_dim, input_dim
    if adjacency.shape != expected:
        raise ValueError(f"adjacency: expected shape {expected}, got {tuple(adjacency.shape)}")
    if ((adjacency != 0) & (adjacency != 1)).any():
        raise ValueError("adjacency: expected booleans (or zeros and ones), got other values")
    adjacency = adjacency.bool()
    levels(adjacency)
    return adjacency


def order_to_adjacency(order: Tensor) -> Tensor:
    """The full graph of an order of shape ``(D,)``: each coordinate depends on all before it."""
    rank = order.argsort()
    return rank[:, None] > rank[None, :]


def levels(adjacency: Tensor) -> Tensor:
    """The level of each coordinate: 0 without parents, else one more than its highest parent's.

    The largest level plus 1 is the depth of the graph: as many fixed-point passes invert exactly.

    :return: long, shape ``(D,)``.
    :raises ValueError: if the graph has a cycle; the message names it.
    """
    parents = adjacency.detach().to("cpu")
    level = torch.full((len(parents),), -1, dtype=torch.long, device=parents.device)
    for k in range(len(parents)):
        ready = (level < 0) & ~(parents & (level < 0)).any(-1)
        if not ready.any():
            break
        level[ready] = k
    if (level < 0).any():
        raise ValueError(_cycle_message(parents, level < 0))
    return level.to(adjacency.device)


def _cycle_message(parents: Tensor, unresolved: Tensor) -> str:
    """Names a cycle among coordinates that all have a parent among them."""
    path = [int(unresolved.nonzero()[0, 0])]
    while path[-1] not in path[:-1]:
        path.append(int((parents[path[-1]] & unresolved).nonzero()[0, 0]))
    cycle = path[path.index(path[-1]) :][::-1]
    return (
        f"adjacency: expected an acyclic graph, got the cycle {' -> '.join(map(str, cycle))} "
        "(entry [i, j] says that coordinate i depends on coordinate j)"
    )


def hidden_sets(adjacency: Tensor, with_context: bool = False) -> Tensor:
    """The distinct sets of inputs that hidden units need to carry: the parents of the coordinates.

    :param with_context: whether units without inputs are of use; otherwise the empty set is left out,
        unless it is the only one.
    :return: shape ``(number of sets, D)``, sorted by :func:`set_levels`.
    """
    sets = adjacency.unique(dim=0)
    if not with_context and sets.any():
        sets = sets[sets.any(-1)]
    return sets[set_levels(sets, levels(adjacency)).argsort(stable=True)]


def set_levels(sets: Tensor, level: Tensor) -> Tensor:
    """The step of an inversion at which all members of a set are known, 0 for the empty set.

    :param sets: shape ``(N, D)``.
    :param level: levels of the coordinates, shape ``(D,)``.
    :return: long, shape ``(N,)``.
    """
    return (sets * (level + 1)).amax(-1)


def spread(sets: Tensor, hidden_dim: int) -> Tensor:
    """The sets of ``hidden_dim`` units, evenly and in order; the last set always has a unit."""
    unit = torch.arange(1, hidden_dim + 1, device=sets.device)
    return sets[(unit * len(sets) + hidden_dim - 1) // hidden_dim - 1]


def subset_mask(inner: Tensor, outer: Tensor) -> Tensor:
    """The mask ``[b, a]`` that says whether set ``a`` of ``inner`` is a subset of set ``b`` of ``outer``."""
    return (~outer).float() @ inner.float().T == 0


def mlp_masks(adjacency: Tensor, hidden_dims: Sequence[int], with_context: bool) -> list[Tensor]:
    """The masks of a multilayer perceptron, one of shape ``(out, in)`` for each layer.

    :param hidden_dims: the widths of the hidden layers.
    :param with_context: whether the first layer sees a context too.
    """
    sets = hidden_sets(adjacency, with_context)
    units = spread(sets, hidden_dims[0])
    masks = [units]
    for hidden_dim in hidden_dims[1:]:
        previous, units = units, spread(sets, hidden_dim)
        masks.append(subset_mask(previous, units))
    return masks + [subset_mask(units, adjacency)]
