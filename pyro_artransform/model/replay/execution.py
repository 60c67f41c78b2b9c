# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Runs programs by TorchScript's interpreter.

The interpreter takes the least time for an operation: Python code that ``torch.fx`` writes takes 2.5 times as
long. TorchScript is deprecated, though, and this is the only file that knows of it. Where PyTorch lacks it,
nothing is replayed.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .program import Program, Value

#: a function of the inputs of a program, which returns its results
Run = Callable[..., Sequence[Tensor]]

# what is used of TorchScript, besides the types of schemas
_TORCHSCRIPT = ("Graph", "_create_function_from_graph", "_set_graph_executor_optimize")
# in the order of their enum values
_MEMORY_FORMATS = [torch.contiguous_format, torch.preserve_format, torch.channels_last]


@functools.cache
def has_torchscript() -> bool:
    """Whether programs can be run; says so once where they cannot."""
    found = all(hasattr(torch._C, name) for name in _TORCHSCRIPT)
    if not found:
        logging.getLogger(__name__).warning(
            "this version of PyTorch has no TorchScript: gradients are not replayed, and take longer"
        )
    return found


def compiled(program: Program) -> Run:
    """A function that runs a program."""
    script = torch._C._create_function_from_graph("replay", _Graph(program).graph)

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        was = torch._C._get_graph_executor_optimize()
        torch._C._set_graph_executor_optimize(False)  # optimization would reorder sums
        try:
            found: tuple[Tensor, ...] = script(*inputs)
        finally:
            torch._C._set_graph_executor_optimize(was)
        return found

    return run


class _Graph:
    """A program as a graph of TorchScript."""

    def __init__(self, program: Program) -> None:
        self.graph: Any = torch._C.Graph()
        self._values = {value: self.graph.addInput() for value in program.inputs}
        tensor = torch._C.TensorType.get()
        for value, constant in program.constants.items():
            self._values[value] = self._lowered(constant, tensor)
        for call in program.calls:
            schema = call.function._schema
            inputs = [self._lowered(x, a.type) for x, a in zip(call.inputs, schema.arguments)]
            types = [each.type for each in schema.returns]
            outputs = self._node(schema.name, inputs, types)
            if any(isinstance(type_, torch._C.ListType) for type_ in types):
                outputs = self._node("prim::ListUnpack", outputs, [tensor] * len(call.outputs))
            self._values.update(zip(call.outputs, outputs))
        results = [self._values[value] for value in program.results]
        type_ = torch._C.TupleType([tensor] * len(results))
        self.graph.registerOutput(self._node("prim::TupleConstruct", results, [type_])[0])

    def _node(self, name: str, inputs: Sequence[Any], types: Sequence[Any]) -> list[Any]:
        """Appends a node; returns its outputs."""
        node = self.graph.create(name, inputs, len(types))
        self.graph.appendNode(node)
        outputs = [*node.outputs()]
        for output, type_ in zip(outputs, types):
            output.setType(type_)
        return outputs

    def _lowered(self, argument: Any, type_: Any) -> Any:
        """The graph value of an argument of a type."""
        if isinstance(argument, Value):
            return self._values[argument]
        if isinstance(type_, torch._C.OptionalType) and argument is not None:
            return self._lowered(argument, type_.getElementType())
        if isinstance(argument, tuple):
            if argument and not any(isinstance(each, Value) for each in argument):
                return self.graph.insertConstant([*argument])
            elements = [self._lowered(each, type_.getElementType()) for each in argument]
            return self._node("prim::ListConstruct", elements, [type_])[0]
        if isinstance(argument, torch.memory_format):
            argument = _MEMORY_FORMATS.index(argument)
        is_whole = isinstance(type_, torch._C.FloatType) and type(argument) is int
        return self.graph.insertConstant(float(argument) if is_whole else argument)
