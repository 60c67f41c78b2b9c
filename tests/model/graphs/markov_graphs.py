# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Markov graphs by name, as a set of neighbours for each coordinate, and precisions with them."""

import torch


def from_edges(dim, edges):
    neighbours = [set() for _ in range(dim)]
    for i, j in edges:
        neighbours[i].add(j)
        neighbours[j].add(i)
    return neighbours


def chain(length, num_globals=0):
    edges = [(i, i + 1) for i in range(length - 1)]
    dim = length + num_globals
    return from_edges(dim, [*edges, *((i, k) for k in range(length, dim) for i in range(k))])


def grid(rows, columns):
    edges = [(i, i + 1) for i in range(rows * columns) if (i + 1) % columns]
    edges += [(i, i + columns) for i in range((rows - 1) * columns)]
    return from_edges(rows * columns, edges)


def tree(dim):
    return from_edges(dim, [((i - 1) // 2, i) for i in range(1, dim)])


def plate(size, num_globals=2):
    dim = size + num_globals
    return from_edges(dim, [(i, k) for k in range(size, dim) for i in range(k)])


def crossed(rows, columns):
    return from_edges(rows + columns, [(i, rows + j) for i in range(rows) for j in range(columns)])


def complete(dim):
    return from_edges(dim, [(i, j) for i in range(dim) for j in range(i)])


def dominant_precision(neighbours, slack, generator):
    """A dense precision with the zeros of a graph, whose diagonal exceeds its rows by some slack."""
    dim = len(neighbours)
    precision = torch.zeros(dim, dim)
    for i, own in enumerate(neighbours):
        for j in own:
            if i < j:
                precision[i, j] = precision[j, i] = torch.randn((), generator=generator)
    return precision + torch.diag(precision.abs().sum(1) + slack)


GRAPHS = {
    "one": [set()],
    "chain": chain(30),
    "chain with globals": chain(30, 3),
    "tree": tree(31),
    "grid": grid(8, 8),
    "plate": plate(20),
    "crossed plates": crossed(12, 5),
    "complete": complete(7),
    "apart": from_edges(6, [(0, 1), (2, 3)]),
    "nothing": [set() for _ in range(4)],
}
