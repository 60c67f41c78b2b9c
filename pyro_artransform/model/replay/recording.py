# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Records the operations of one call of a function as a program that can be run again.

A program is valid only if it does not depend on values. A call is therefore refused if Python reads a varying
value, or if it does anything that is not known to replay exactly. This module lists what is allowed, not what
is forbidden.
"""

import logging
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..._base.time_limit import is_out_of_time
from .batching import batched
from .execution import Run, compiled
from .program import Call, Program, Value

_ATEN = torch.ops.aten
# operations whose output depends on values, and one that raises an error because of them
_READ_BY = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_CHECK_ERRORS = _ATEN._linalg_check_errors.default
# operations that write into their first input, and what they write, of the same dtype
_OUT_OF_PLACE = {
    getattr(getattr(_ATEN, f"{name}_"), overload): getattr(getattr(_ATEN, name), overload)
    for name, overload in (
        *(("add", "Tensor"), ("bitwise_and", "Tensor"), ("copy", "default"), ("div", "Tensor")),
        *(("exp", "default"), ("fill", "Scalar"), ("index_add", "default"), ("log", "default")),
        *(("index_copy", "default"), ("index_put", "default"), ("logical_and", "default")),
        *(("masked_fill", "Scalar"), ("mul", "Tensor"), ("neg", "default"), ("relu", "default")),
        *(("scatter", "value"), ("sub", "Tensor")),
    )
}
# maximum memory in bytes of the tensors of a call, which capture keeps alive; with more, arithmetic dominates
# the overhead that a replay saves
_MOST_BYTES = 2**29
_MASKS = (torch.bool, torch.uint8)  # dtypes of indices that select entries
# functions that only return Python numbers
_READS = {
    *(Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__),
    *(Tensor.__complex__, Tensor.is_nonzero, torch.is_nonzero, Tensor.tolist),
}
# attributes of a tensor that do not depend on its values, besides those named is_*
_METADATA = {
    *("dim", "ndim", "ndimension", "size", "shape", "stride", "numel", "nelement", "__len__"),
    *("storage_offset", "element_size", "itemsize", "nbytes", "get_device", "type"),
    *("_version", "grad_fn", "requires_grad"),
}
# elementwise Python functions, and backward, which a replay does not perform
_REFUSED = {"apply_", "map_", "map2_", "backward"}
_VALUELESS = (Tensor, torch.Size, torch.dtype, torch.device, torch.layout, type(None))
_CONSTANTS = (
    *(bool, int, float, complex, str, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


# bypasses the dispatch under which hooks and Python backward passes would not be recorded
_grad = FunctionType(
    torch.autograd.grad.__code__,
    {**vars(torch.autograd), "has_torch_function": lambda _: False},
    argdefs=torch.autograd.grad.__defaults__,
)


class Replay(NamedTuple):
    """Runs the operations of a call at other inputs."""

    program: Program
    run: Run
    constants: list[Tensor]  #: outside tensors that the call reads, by reference
    shapes: list[tuple[torch.Size, bool]]  #: of constants, and whether they require gradients
    num_results: int
    is_random: bool  #: whether it draws random numbers

    def is_current(self) -> bool:
        """Whether the outside tensors still have the same shapes and ``requires_grad``."""
        return all(
            (value.shape, value.requires_grad) == was
            for value, was in zip(self.constants, self.shapes)
        )

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...] | None:
        """The results; ``None`` if an operation fails, or a value that Python had read has changed."""
        try:
            outputs = self.run(*inputs, *self.constants)
        except (IndexError, RuntimeError):
            return None
        results, failures = outputs[: self.num_results], outputs[self.num_results :]
        return None if any(bool(failure.any()) for failure in failures) else tuple(results)


def record(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], seconds: float
) -> Replay | None:
    """Records a replay; ``None`` if the function is refused, fails or exceeds ``seconds`` of CPU time."""
    recording = _Recording(inputs, time.process_time() + seconds)
    state = _python_random_state()
    try:
        with (
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            with recording, _Reads(recording):
                found = function(*inputs)
            # the first run compiles it
            replays = (each for each in recording.replays(found) if each(*inputs) is not None)
            replay = next(replays, None)
    except Exception as error:  # any error means that the call cannot be replayed
        logging.getLogger(__name__).debug("a call is not replayed: %r", error)
        return None
    is_random = _python_random_state() != state
    return None if recording.is_refused or is_random else replay


def _python_random_state() -> object:
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy and str(numpy.random.get_state())


class _Recording(TorchDispatchMode):
    """Lists tensor operations, including those of backward passes and ``torch.vmap``.

    Values that depend on inputs or random numbers vary, and so do all tensors that share their memory. Python
    may read other values, such as data and parameters; a replay fails if these have changed.
    """

    def __init__(self, inputs: Sequence[Tensor], end: float) -> None:
        super().__init__()
        self._end, self._num_bytes = end, 0
        # tensors are identified by id and memory by address, so references must be kept
        self._held, self._values = list[Tensor](), dict[int, Value]()
        self._calls, self._random, self._is_pure = list[Call](), set[Value](), True
        # calls that write into memory, by number, and the other values that share it
        self._writes = list[tuple[int, list[Value]]]()
        self._outside = list[Tensor]()  # tensors that existed before, other than inputs
        self._constants = dict[Value, Tensor]()
        self._failures = list[Value]()  # error codes of linear algebra and changed reads
        self.is_refused = self.has_lifted = False
        self._inputs = [*map(self._hold, inputs)]
        given = {*map(_memory, inputs)} - {0}
        # memory that existed before the call, memory that varies, and memory made by recorded operations
        self._given, self._varying, self._made = given, {-1, *given}, {*given}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # importing dynamo takes a second, and nothing here is compiled

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            with torch._C.DisableTorchFunction():
                if func is _ATEN.bmm.default and has_one_matrix(*args):
                    with self:
                        return product_with_one_matrix(*args)
                return self._record(func, args, kwargs or {})
        except BaseException:  # a model that catches the error continues on another path
            self.is_refused = True
            raise

    def refuse(self, why: str) -> None:
        self.is_refused = True
        raise RuntimeError(why)

    def _record(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        # a look at the clock takes longer than an operation
        is_late = len(self._calls) % 32 == 0 and time.process_time() > self._end
        if self.is_refused or is_late or is_out_of_time():
            self.refuse("the capture was refused, or takes too long")
        schema = func._schema
        rest = schema.arguments[len(args) :]
        arguments = [*args, *(kwargs.get(each.name, each.default_value) for each in rest)]
        if not _READ_BY.isdisjoint(func.tags):
            read = _tensors(arguments)
            if func is _ATEN.index.Tensor:  # only masks determine the shape of the result
                read = (index for index in _tensors(args[1]) if index.dtype in _MASKS)
            self.read(func, read)
        given = [*map(self._argument, arguments)]
        if func is _ATEN._to_copy.default and not isinstance(arguments[0], Tensor):  # of vmap
            dtype = torch.float64 if isinstance(arguments[0], float) else None  # as in Python
            given[0] = self._constant(torch.tensor(arguments[0], dtype=dtype, device="cpu"))
        pairs = zip(arguments, schema.arguments)
        written = [value for value, each in pairs if each.alias_info and each.alias_info.is_write]
        if not self._given.isdisjoint(map(_memory, _tensors(written))):
            self.refuse(f"{func} modifies a tensor that existed before the call")
        found = func(*args, **kwargs)
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if written:
            self._note_write(func, written[0], arguments)
        if func is _CHECK_ERRORS:
            self._failures += given[:1]
        elif torch.Tag.data_dependent_output not in func.tags:
            outputs = self._call(func, given, found)
            self._random |= {*outputs} if is_random else set()
        sizes = {_memory(tensor): _size(tensor) for tensor in _tensors((found, written))}
        new = sizes.keys() - {0}
        self._num_bytes += sum(sizes[memory] for memory in new - self._made - self._given)
        if self._num_bytes > _MOST_BYTES:
            self.refuse(f"the tensors of a call take more than {_MOST_BYTES} bytes")
        self._made |= new - self._given
        if is_random or not self._varying.isdisjoint(map(_memory, _tensors(arguments))):
            self._varying |= new
        self.has_lifted |= func is _ATEN.lift_fresh.default
        return found

    def _note_write(self, func: Any, written: Tensor, arguments: Sequence[Any]) -> None:
        """Notes which values share the memory that an operation writes into."""
        memory, others = _memory(written), list[Value]()
        self._is_pure &= func in _OUT_OF_PLACE and memory > 0
        for value in _tensors(arguments):  # the result has the dtype of what is written
            self._is_pure &= not value.is_floating_point() or value.dtype == written.dtype
        if self._is_pure:
            shared = (t for t in self._held if _memory(t) == memory and t is not written)
            others = [self._values[id(each)] for each in shared]
        self._writes.append((len(self._calls), others))

    def _without_writes(self, outputs: Sequence[Value]) -> list[Call] | None:
        """The operations without writes; ``None`` if a value is used after another one's memory changed."""
        if not self._is_pure:
            return None
        last = dict[Value, int]()
        for k, call in enumerate(self._calls):
            last.update(dict.fromkeys(call.values, k))
        last.update(dict.fromkeys(outputs, len(self._calls)))
        for k, others in self._writes:
            if any(last.get(value, -1) > k for value in others):
                return None
        return [c._replace(function=_OUT_OF_PLACE.get(c.function, c.function)) for c in self._calls]

    def read(self, func: Any, values: Iterable[Tensor]) -> None:
        """Refuses a read of varying values; makes replays fail if other values have changed."""
        for value in values:
            if _memory(value) in self._varying:
                self.refuse(f"{func} returns a value to Python")
            given = self._value_of(value), self._constant(value.detach().clone())
            is_other = Value(tuple(value.shape), torch.bool, value.device)
            self._calls.append(Call(_ATEN.ne.Tensor, given, (is_other,)))
            self._failures.append(is_other)

    def _argument(self, argument: Any) -> Any:
        """What stands for an operation's argument in a program."""
        if isinstance(argument, Tensor):
            return self._value_of(argument)
        if isinstance(argument, (list, tuple)):
            return tuple(map(self._argument, argument))
        if not isinstance(argument, _CONSTANTS):
            self.refuse(f"an operation has an argument of {type(argument)}")
        return argument

    def _constant(self, tensor: Tensor) -> Value:
        value = Value.like(tensor)
        self._constants[value] = tensor
        return value

    def _value_of(self, tensor: Tensor) -> Value:
        """The value of a tensor, made by an operation or existing before the call."""
        if id(tensor) not in self._values:
            memory = _memory(tensor)
            if memory in self._made:
                self.refuse("a tensor shares memory with another one that it was not computed from")
            self._given |= {memory} - {0}
            self._outside.append(tensor)
            self._inputs.append(self._hold(tensor))
        return self._values[id(tensor)]

    def _hold(self, tensor: Tensor) -> Value:
        """Makes a new value stand for a tensor from now on."""
        value = self._values[id(tensor)] = Value.like(tensor)
        self._held.append(tensor)
        return value

    def _call(self, func: OpOverload, given: Sequence[Any], found: Any) -> tuple[Value, ...]:
        """Appends an operation that returned ``found``; returns its outputs."""
        several = found if isinstance(found, (tuple, list)) else [found]
        outputs = list[Value]()
        for each in several if found is not None else []:
            if not isinstance(each, (Tensor, type(None))):
                self.refuse(f"an operation returns {type(each)}")
            outputs.append(self._hold(each) if isinstance(each, Tensor) else Value())
        self._calls.append(Call(func, tuple(given), tuple(outputs)))
        return self._calls[-1].outputs

    def replays(self, results: Sequence[Tensor]) -> Iterator[Replay]:
        """Replays that return these results, the fastest first."""
        outputs = [*map(self._value_of, results), *self._failures]
        shapes = [(value.shape, value.requires_grad) for value in self._outside]
        rest = self._outside, shapes, len(results), bool(self._random)
        program = Program(self._inputs, self._constants, self._calls, outputs)
        if (calls := self._without_writes(outputs)) is not None:
            fast = batched(program._replace(calls=calls), self._random)
            yield Replay(fast, compiled(fast), *rest)
        yield Replay(program, compiled(program), *rest)


class _Reads(TorchFunctionMode):
    """Refuses functions that may give Python values other than by operations, such as through memory."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, recording = kwargs or {}, self._recording
        if isinstance(func, OpOverload):
            return func(*args, **kwargs)
        if func in _READS:
            recording.read(func, args[:1])
            return func(*args, **kwargs)
        recording.has_lifted = False
        if func is torch.autograd.grad:
            with self:
                return _grad(*args, **kwargs)
        found = func(*args, **kwargs)
        if not _is_known(func, found):
            recording.refuse(f"{func} may return values to Python")
        is_python = isinstance(func, FunctionType)
        if recording.has_lifted and not is_python and [*_tensors(_sequences(func, args))]:
            recording.refuse(f"{func} makes a tensor from values that it reads from others")
        return found


def _is_known(func: Any, found: Any) -> bool:
    """Whether a function is known to return no values, and to write only through operations."""
    name, kind = func.__name__, func.__name__
    if kind in ("__get__", "__set__", "__delete__"):  # of an attribute
        attribute = getattr(func.__self__, "fget", func.__self__)
        name = getattr(attribute, "__name__", "")
    if kind in ("__set__", "__delete__"):
        return name == "requires_grad"
    if name in _METADATA or name.startswith("is_"):
        return True
    return name not in _REFUSED and _is_valueless(found)


def _is_valueless(found: Any) -> bool:
    if isinstance(found, (tuple, list)) and not isinstance(found, torch.Size):
        return all(map(_is_valueless, found))
    return isinstance(found, _VALUELESS)


def _sequences(func: Any, args: Sequence[Any]) -> list[Any]:
    """The sequences among the arguments of a function, without an index tuple."""
    if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], tuple):
        args = (*args[1], *args[2:])
    return [each for each in args if isinstance(each, (list, tuple))]


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _memory(value: Tensor) -> int:
    """The address of a tensor's memory: 0 if it is empty, -1 if unknown."""
    return value.untyped_storage().data_ptr() if torch._C._has_storage(value) else -1


def _size(value: Tensor) -> int:
    """The size of a tensor's memory in bytes, 0 if unknown."""
    return value.untyped_storage().nbytes() if torch._C._has_storage(value) else 0


def has_one_matrix(left: Tensor, right: Tensor) -> bool:
    """Whether a batch of products shares one matrix, and the other factors are vectors."""
    return _is_the_same(left, right.shape[2]) or _is_the_same(right, left.shape[1])


def product_with_one_matrix(left: Tensor, right: Tensor) -> Tensor:
    """``torch.bmm(left, right)`` of one matrix and vectors with the same strides, in 0.4 of the time."""
    if _is_the_same(left, right.shape[2]):
        return torch.mm(right.squeeze(2), left.select(0, 0).t()).unsqueeze(2)
    return torch.mm(left.squeeze(1), right.select(0, 0)).unsqueeze(1)


def _is_the_same(matrices: Tensor, num_vectors: int) -> bool:
    return num_vectors == 1 and len(matrices) > 1 and matrices.stride(0) == 0
