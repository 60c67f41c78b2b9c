# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Functions of tensors whose operations are captured once, and replayed without the Python around them.

The gradient of a small model is a thousand operations of a few microseconds. Pyro's handlers, ``torch.vmap``
and autograd take several times as long to find out which these are, and find the same ones each time.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: a function of tensors that returns tensors without a graph
Function = Callable[..., tuple[Tensor, ...]]

# calls with the same shapes after which it is worth while: capturing takes as long as 5 to 30 calls
_PATIENCE = 12
# numbers of all tensors of a call, which are held while it is captured: where there are more, arithmetic
# takes the time, and not what is around it
_MOST_NUMBERS = 2**25
# every so many replays one is compared with a call of the function, the first ones more often
_CHECK_EVERY = 64
# differences that are no round-off, in units of the square root of the dtype's precision
_SLACK = 10.0


class Captured:
    """A function of tensors that replays its operations once it was called often enough.

    The function may read parameters and other tensors, which are seen as they are at each replay, and draw
    random numbers from PyTorch's own generators, of which a replay takes the same ones. It is called as it
    is where its operations cannot be captured, as where its path depends on values, and at inputs where a
    replay fails. Now and then it is called to compare a replay with it: one that differs is the last.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._calls: Counter[Hashable] = Counter()
        self._replays: dict[Hashable, Callable[..., tuple[Tensor, ...] | None]] = {}
        self.can_replay = True  #: whether replays are what calls are, as far as is known

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not self.can_replay:
            return self._function(*inputs)
        key = tuple((value.shape, value.dtype, value.device) for value in inputs)
        self._calls[key] += 1
        count = self._calls[key] - _PATIENCE
        if count == 0:
            try:
                self._replays[key] = _capture(self._function, inputs)
            except Exception:  # any error means that it cannot be captured
                self.can_replay = False
        if count < 0 or not self.can_replay:
            return self._function(*inputs)
        if count % _CHECK_EVERY and not math.log2(count).is_integer():
            return self._replays[key](*inputs) or self._function(*inputs)
        devices = {value.device.index for value in inputs if value.is_cuda}
        with torch.random.fork_rng(devices=devices):
            found = self._replays[key](*inputs)
        expected = self._function(*inputs)
        self.can_replay = found is None or all(map(_is_close, found, expected))
        return expected


class CapturedLoss:
    """A function of parameters, a scalar, with gradients that are found along with it.

    :param loss: returns the scalar, differentiable in the parameters.
    """

    def __init__(self, loss: Callable[[], Tensor], parameters: Iterable[Tensor]) -> None:
        self._loss, self._parameters = loss, list(parameters)
        self._used = list[Tensor]()  # those that it depends on
        self._captured = Captured(self._with_gradients)

    def __call__(self) -> Tensor:
        value, *gradients = self._captured()
        found: Tensor = _KnownGradients.apply(value, gradients, *self._used)
        return found

    def _with_gradients(self) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            value = self._loss()
            found = torch.autograd.grad(value, self._parameters, allow_unused=True)
        pairs = [(p, g) for p, g in zip(self._parameters, found) if g is not None]
        self._used = [parameter for parameter, _ in pairs]
        return value.detach(), *(gradient for _, gradient in pairs)


class _KnownGradients(torch.autograd.Function):
    """A value whose gradients are known."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: Sequence[Tensor], *parameters: Tensor
    ) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(weights[0] * gradient for gradient in ctx.gradients)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    slack = _SLACK * torch.finfo(expected.dtype).eps ** 0.5
    unit = expected.abs().nan_to_num(0.0, 0.0).amax() if expected.numel() else 0.0
    return torch.allclose(found, expected, slack, slack * float(unit), equal_nan=True)


def _capture(
    function: Function, inputs: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, ...] | None]:
    """The operations of a call, to be replayed; ``None`` is what a replay returns where it fails."""
    operations = _Operations(inputs)
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        torch.jit.optimized_execution(False),  # which changes the order of sums
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        with operations:
            found = function(*inputs)
        repeat = operations.repeating(found)
        given = tuple(operations.constants.values())
        # as torch.jit.trace does it, which holds what it made for as long as Python runs
        values, unnamed = (*inputs, *given), lambda value: ""
        graph, _ = torch._C._create_graph_by_tracing(repeat, values, unnamed, True, False)
        script = torch._C._create_function_from_graph("replay", graph)

    def replay(*values: Tensor) -> tuple[Tensor, ...] | None:
        try:
            with torch.jit.optimized_execution(False):
                outputs: tuple[Tensor, ...] = script(*values, *given)
        except RuntimeError:
            return None
        results, codes = outputs[: len(found)], outputs[len(found) :]
        return None if any(bool(code.any()) for code in codes) else results

    return replay


class _Slot(NamedTuple):
    """The place of a tensor among all those of a call."""

    place: int


class _Operations(TorchDispatchMode):
    """Records the operations on tensors, those of a backward pass and inside of ``torch.vmap`` as well.

    :param inputs: what a replay gets other ones for; all other tensors are taken by reference.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.recorded = list[tuple[Any, Any, Any, Any]]()
        self.codes = list[_Slot]()  # of errors of linear algebra, which nobody would read otherwise
        self.constants: dict[_Slot, Tensor] = {}
        self._num_numbers = 0
        # tensors are known by their identity, for which they have to be held
        self._held, self._slots = list[Tensor](), dict[int, _Slot]()
        # what depends on inputs, parameters or random numbers
        self._inputs = [*map(self._new_slot, inputs)]
        self._varying = {*self._inputs}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # importing it takes a second, and nothing here is compiled

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        used = list[_Slot]()
        slots = _replaced((args, kwargs), Tensor, lambda value: self.slot_of(value, used))
        if self._reads_values(func, args, used):
            raise RuntimeError(f"{func} makes of values what is no tensor, or the shape of one")
        found = func(*args, **kwargs)
        if func is torch.ops.aten._linalg_check_errors.default:
            self.codes += used
            return found
        several = found if isinstance(found, (tuple, list)) else [found]
        new = [self._new_slot(v) if isinstance(v, Tensor) else None for v in several]
        self.recorded.append((func, *slots, new))
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if is_random or not self._varying.isdisjoint(used):
            self._varying.update(slot for slot in new if slot is not None)
        return found

    def _reads_values(self, func: Any, args: Sequence[Any], used: Sequence[_Slot]) -> bool:
        """Whether what varies gives Python a value, or a tensor its shape."""
        tags = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
        if not any(tag in func.tags for tag in tags):
            return False
        if func is torch.ops.aten.index.Tensor:
            masks = [each for each in args[1] if each is not None and each.dtype is torch.bool]
            used = [*map(self.slot_of, masks)]
        return not self._varying.isdisjoint(used)

    def _new_slot(self, value: Tensor) -> _Slot:
        self._slots[id(value)] = slot = _Slot(len(self._held))
        self._held.append(value)
        self._num_numbers += value.numel()
        if self._num_numbers > _MOST_NUMBERS:
            raise RuntimeError(f"a call has tensors of more than {_MOST_NUMBERS} numbers in all")
        return slot

    def slot_of(self, value: Tensor, used: list[_Slot] | None = None) -> _Slot:
        """The place of a tensor, that of a constant if it was there before; it is added to those used."""
        slot = self._slots.get(id(value))
        if slot is None:
            slot = self._new_slot(value)
            self.constants[slot] = value
            if value.requires_grad:
                self._varying.add(slot)
        if used is not None:
            used.append(slot)
        return slot

    def repeating(self, results: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        """A function of inputs and constants that repeats the operations, for these results and the codes."""
        outputs = [*map(self.slot_of, results), *self.codes]
        recorded, slots = self.recorded, [*self._inputs, *self.constants]

        def repeat(*given: Tensor) -> tuple[Tensor, ...]:
            known = dict(zip(slots, given))
            for func, args, kwargs, new in recorded:
                args, kwargs = _replaced((args, kwargs), _Slot, known.__getitem__)
                found = func(*args, **kwargs)
                known.update(zip(new, found if isinstance(found, (tuple, list)) else [found]))
            return tuple(known[slot] for slot in outputs)

        return repeat


def _replaced(values: Any, kind: type, new: Callable[[Any], Any]) -> Any:
    """Arguments of an operation with new ones for all of a kind."""
    if isinstance(values, kind):
        return new(values)
    if type(values) in (tuple, list):
        return type(values)(_replaced(value, kind, new) for value in values)
    if type(values) is dict:
        return {name: _replaced(value, kind, new) for name, value in values.items()}
    return values
