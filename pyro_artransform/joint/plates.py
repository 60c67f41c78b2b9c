# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What one run of a model or a guide says of its plates, and how runs are hidden and compared."""

from collections.abc import Iterator
from typing import Any

import torch
from pyro import poutine
from torch import Tensor


def frames(*traces: poutine.Trace) -> Iterator[Any]:
    """The frames of the plates around each site, as often as they occur.

    :param traces: traces of models and guides.
    """
    nodes: Any = (node for trace in traces for node in trace.nodes.values())
    return (frame for node in nodes for frame in node.get("cond_indep_stack", ()))


def plate_nesting(*traces: poutine.Trace) -> int:
    """How many dimensions the plates take, counted from the right.

    :param traces: traces of models and guides.
    """
    return max((-frame.dim for frame in frames(*traces) if frame.vectorized), default=0)


def is_subsampled(trace: poutine.Trace) -> bool:
    """Whether any plate holds a part of its elements only.

    :param trace: a trace.
    """
    return any(map(is_part, frames(trace)))


def is_part(frame: Any) -> bool:
    """Whether a plate holds a part of its elements only.

    :param frame: its frame.
    """
    return frame.full_size not in (None, frame.size)


def hidden_sites() -> Any:
    """Hides the sites of a run from handlers around it, its parameters not: they are trained."""
    return poutine.block(hide_types=["sample", "observe"])


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether many draws at once gave what one at a time did, but for round-off.

    :param found: a tensor.
    :param expected: another one.
    """
    tolerance = 1e-4 if found.dtype == torch.float32 else 1e-8
    return found.shape == expected.shape and torch.allclose(
        found, expected, rtol=tolerance, atol=tolerance, equal_nan=True
    )
