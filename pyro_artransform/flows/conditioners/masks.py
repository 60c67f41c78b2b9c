# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Masks of autoregressive networks, as pure functions.

An *adjacency* is a boolean ``(D, D)`` matrix of a directed acyclic graph: entry ``[i, j]`` says that
the parameters of coordinate ``i`` may depend on ``x_j``. The *parents* of ``i`` are the ones in row ``i``.

A hidden unit carries the set of inputs that it may see, a boolean row of length D. A unit may feed another
one if its set is a subset of the other's, and an output ``i`` if its set is a subset of the parents of
``i``. Then output ``i`` sees only its parents, at any depth. For the full graph of an order, the sets are
nested, and the rule is that of MADE, with sets instead of degrees.

**References**

1. Graphical Normalizing Flows (Wehenkel, Louppe, 2021), https://arxiv.org/abs/2006.02548
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._base.arguments import shown
from ..._base.levels import graph_levels


def check_graph(
    order: Tensor | Sequence[int] | None, adjacency: Tensor | None, input_dim: int
) -> tuple[Tensor, Tensor]:
    """Checks the graph arguments of a masked network; returns the order by level, and the graph.

    :return: the order, long of shape ``(D,)``, and the adjacency, shape ``(D, D)``, on the CPU.
    :raises ValueError: if one is invalid, or both are given; the message names a cycle.
    """
    if adjacency is not None:
        if order is not None:
            raise ValueError("expected an order or an adjacency, got both")
        adjacency, expected = torch.as_tensor(adjacency, device="cpu"), (input_dim, input_dim)
        if adjacency.shape != expected:
            raise ValueError(f"adjacency: expected shape {expected}, got {tuple(adjacency.shape)}")
        if ((adjacency != 0) & (adjacency != 1)).any():
            raise ValueError("adjacency: expected booleans (or zeros and ones), got other values")
        adjacency = adjacency.bool()
        return levels(adjacency).argsort(stable=True), adjacency
    natural = torch.arange(input_dim, device="cpu")
    order = natural if order is None else torch.as_tensor(order, device="cpu")
    if order.shape != natural.shape or not bool((order.sort().values == natural).all()):
        wanted = f"a permutation of 0 .. {input_dim - 1}"
        raise ValueError(f"order: expected {wanted}, got {shown(order.tolist())}")
    rank = order.argsort()
    return order.long(), rank[:, None] > rank[None, :]


def levels(adjacency: Tensor) -> Tensor:
    """The level of each coordinate: 0 without parents, else one more than the highest level of a parent.

    :return: long, shape ``(D,)``; the largest level plus 1 is the depth of the graph.
    :raises ValueError: if the graph has a cycle; the message names it.
    """
    parents = [row.nonzero()[:, 0].tolist() for row in adjacency.to("cpu")]
    return torch.tensor(graph_levels(parents), dtype=torch.long, device=adjacency.device)


def hidden_sets(adjacency: Tensor, with_context: bool = False) -> Tensor:
    """The distinct sets of inputs that hidden units must carry: the parents of each coordinate.

    Without a context the empty set is omitted, unless it is the only one.

    :return: shape ``(number of sets, D)``, sorted by :func:`set_levels`.
    """
    sets = adjacency.unique(dim=0)
    if not with_context and sets.any():
        sets = sets[sets.any(-1)]
    return sets[set_levels(sets, levels(adjacency)).argsort(stable=True)]


def set_levels(sets: Tensor, level: Tensor) -> Tensor:
    """The step of an inversion at which all members of each set are known, shape ``(N,)``.

    :param sets: shape ``(N, D)``; the empty set gets 0.
    :param level: levels of the coordinates, shape ``(D,)``.
    """
    return (sets * (level + 1)).amax(-1)


def spread(sets: Tensor, hidden_dim: int) -> Tensor:
    """Assigns sets to ``hidden_dim`` units, evenly and in order; the last set always has a unit."""
    unit = torch.arange(1, hidden_dim + 1, device=sets.device)
    return sets[(unit * len(sets) + hidden_dim - 1) // hidden_dim - 1]


def mlp_masks(adjacency: Tensor, hidden_dims: Sequence[int], with_context: bool) -> list[Tensor]:
    """The masks of a multilayer perceptron, of shape ``(out, in)``, one per layer."""
    sets = hidden_sets(adjacency, with_context)
    units = [spread(sets, width) for width in hidden_dims]
    masks = [units[0]]
    for inner, outer in zip(units, [*units[1:], adjacency]):
        # entry [b, a] says whether set a of inner is a subset of set b of outer
        masks.append((~outer).float() @ inner.float().T == 0)
    return masks
