# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import itertools
from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from pyro_artransform._base.processes import Processes
from pyro_artransform._base.time_limit import OutOfTimeError
from pyro_artransform.inference import all_batches
from pyro_artransform.inference.all_batches import AllBatches, full_data_density
from pyro_artransform.inference.loader import BatchStream
from pyro_artransform.model import LogJoint
from tests.inference import loaders
from tests.inference.loaders import KNOWN, rows, shuffled

known = pytest.mark.parametrize("kind", KNOWN.values(), ids=KNOWN.keys())


def numbers(size=loaders.SIZE):
    return torch.arange(float(size))


def taken(batches, count):
    return [batches.next().args[0].tolist() for _ in range(count)]


def seen(batches):
    return [x for batch in batches for x in batch]


class Loader:
    """Re-iterable without a length, with what ``make`` returns in each epoch."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return self.make()


class Once(list):
    """Ends for good."""

    def __init__(self, batches):
        super().__init__(batches)
        self.iterator = iter(batches)

    def __iter__(self):
        return self.iterator


BATCHES = [torch.zeros(2)]
EMPTY = DataLoader(TensorDataset(torch.zeros(3)), batch_size=4, drop_last=True)
REFUSED = [
    *(
        (TypeError, [batch], f"mapping.* or a tensor, got {name}")
        for batch, name in ((3.0, "float"), ("text", "str"), (None, "NoneType"), ({1, 2}, "set"))
    ),
    *(
        (TypeError, loader, r"restarts in each epoch, got .*A list works")
        for loader in (iter(BATCHES), zip(BATCHES), torch.zeros(3, 2), {"x": BATCHES[0]}, "rows", 3)
    ),
    (ValueError, [{"scale": 1.0}], "without 'scale'"),
    (ValueError, [], "at least one batch, got none"),
    (ValueError, EMPTY, "at least one batch, got none"),
    (ValueError, [numbers(), numbers()[:0]], "expected batches with rows, got an empty one"),
    (ValueError, Once(BATCHES), "none in epoch 2"),
    (ValueError, Loader(lambda: itertools.repeat(torch.zeros(2))), r"loader: .* no end.*__len__"),
]


@pytest.mark.parametrize(("error", "loader", "words"), REFUSED)
def test_what_is_no_loader_and_no_batch(error, loader, words):
    with pytest.raises(error, match=words):
        taken(BatchStream(loader, {"scale": 2.0}), 2)


def test_epochs_of_other_lengths():
    """The weight of a batch is its share of an epoch."""
    sizes = itertools.chain([3], itertools.repeat(2))
    batches = BatchStream(Loader(lambda: iter([numbers()] * next(sizes))))
    assert batches.num_batches == 3
    with pytest.raises(ValueError, match="expected 3 batches in each epoch, got 2 in epoch 1"):
        taken(batches, 3)


def test_a_loader_without_a_length_is_counted():
    class Rows(IterableDataset):
        def __iter__(self):
            return iter(numbers(5))

    before = torch.get_rng_state()
    batches = BatchStream(DataLoader(Rows(), batch_size=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert batches.num_batches == 3
    assert taken(batches, 4) == [[0.0, 1.0], [2.0, 3.0], [4.0], [0.0, 1.0]]
    assert len(list(batches.one_pass(3))) == 3
    share = BatchStream(DataLoader(Rows(), batch_size=2)).share(Processes(1, 2), 7)
    assert taken(share, 2) == [[2.0, 3.0], [0.0, 1.0]]
    assert BatchStream(loaders.Unknown(*rows())).num_batches == 5


@known
def test_epochs_follow_each_other(kind):
    batches = BatchStream(kind(numbers()))
    places = []
    for _ in range(12):
        batches.next()
        places.append((batches.epoch, batches.position))
    assert batches.num_batches == 5
    assert places == [(k // 5, k % 5 + 1) for k in range(12)]
    assert batches.place(20) == ("epoch 3/4", "batch 2/5")


@known
def test_one_pass_changes_nothing(kind):
    torch.manual_seed(1)
    batches, other = (BatchStream(kind(numbers())) for _ in range(2))
    torch.manual_seed(2)
    expected = taken(other, 12)
    torch.manual_seed(2)
    found, passes = [], []
    for _ in range(4):
        before = torch.get_rng_state()
        passes.append([batch.args[0].tolist() for batch in batches.one_pass(5)])
        assert torch.equal(torch.get_rng_state(), before)
        found += taken(batches, 3)
    assert found == expected
    assert passes == [passes[0]] * 4
    assert len(passes[0]) == 5


@pytest.mark.parametrize("kind", KNOWN)
def test_the_rows_of_a_pass(kind):
    """A loader of a sampler tells them, and a pass changes nothing."""
    x, y = loaders.rows()
    torch.manual_seed(3)
    stream = BatchStream(KNOWN[kind](x, y))
    states = stream._states()
    found = list(stream.one_pass_with_rows())
    assert len(found) == stream.num_batches
    assert all(map(torch.equal, stream._states(), states))
    for batch, indices in found:
        assert (indices is None) == kind.startswith("a ")
        if indices is not None:
            assert torch.equal(batch.args[1], y[indices])


def test_one_pass_is_spread_over_the_epoch():
    batches = BatchStream(list(numbers(100)[:, None]))
    assert [batch.args[0].item() for batch in batches.one_pass(4)] == [12, 37, 62, 87]
    assert len(list(batches.one_pass(1000))) == 100
    assert len(list(BatchStream(shuffled(numbers(100), batch_size=1)).one_pass(4))) == 4


def test_rows_that_come_once():
    """A batch of some of the rows is not all data, though it may be the only one."""
    x, samplers = numbers(), torch.utils.data
    data = TensorDataset(x)
    assert not BatchStream(loaders.Unknown(x)).is_partition
    parts = {name for name, kind in KNOWN.items() if BatchStream(kind(x)).is_partition}
    assert set(KNOWN) - parts == {"sampler with a generator", "weighted"}
    odd = type("Odd", (samplers.SequentialSampler.__base__,), {"__len__": lambda _: 43})()
    for is_partition, options in (
        (False, {"sampler": odd}),
        (False, {"batch_size": 10, "drop_last": True}),
        (True, {"batch_size": 43, "drop_last": True}),
        (False, {"batch_size": 20, "sampler": samplers.RandomSampler(data, num_samples=20)}),
        (True, {"batch_size": 10, "sampler": samplers.SubsetRandomSampler(range(20))}),
    ):
        assert BatchStream(DataLoader(data, **options)).is_partition == is_partition


@known
def test_each_batch_is_one_processs_in_each_epoch(kind):
    """The order is that of all processes, wherever their generators are."""
    whole = BatchStream(kind(numbers())).share(Processes(0, 1), 7)
    shares = []
    for rank in range(2):
        torch.manual_seed(rank)
        shares.append(BatchStream(kind(numbers())).share(Processes(rank, 2), 7))
        assert shares[-1].num_batches == 3
    first, second = (taken(share, 5) for share in shares)
    # the k-th batch of all epochs is that of process k modulo their number
    together = [batch for pair in zip(first, second) for batch in pair]
    assert together == taken(whole, 10)


def test_a_process_loads_its_own_rows_only():
    class Watched(TensorDataset):
        def __getitem__(self, index):
            loaded.append(index)
            return super().__getitem__(index)[0]

    loaded = []
    batches = BatchStream(DataLoader(Watched(numbers()), batch_size=10, shuffle=True))
    assert seen(taken(batches.share(Processes(1, 2), 7), 2)) == loaded


def test_a_distributed_sampler_of_the_user_and_a_single_batch():
    whole = BatchStream([(numbers(),)])
    assert whole.share(Processes(1, 2), 7) is whole
    with pytest.raises(ValueError, match="at least one batch for each of 6 processes, got 5"):
        BatchStream(loaders.listed(numbers())).share(Processes(0, 6), 7)
    data = TensorDataset(numbers())
    loader = DataLoader(data, batch_size=10, sampler=DistributedSampler(data, 2, 1))
    stream = BatchStream(loader)
    assert stream.share(Processes(1, 2), 7) is stream
    orders = [taken(stream, 3) for _ in range(2)]
    assert orders[0] != orders[1]  # it is told of the epochs
    assert [batch.args[0].tolist() for batch in stream.one_pass(3)] == orders[0]


@pytest.mark.parametrize("with_generator", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True},
        {"shuffle": True, "num_workers": 1},
        {"drop_last": True},
        {"batch_size": 1},
    ],
)
def test_rows_of_tensors_are_those_of_the_loader(with_generator, options):
    """In its order, and with its random numbers, without a call for each row."""
    data = TensorDataset(torch.randn(11, 2), torch.arange(11))
    generator = torch.Generator() if with_generator else None
    loader = DataLoader(data, **{"batch_size": 4, "generator": generator, **options})

    def start():
        torch.manual_seed(1)
        if generator is not None:
            generator.manual_seed(2)

    start()
    expected, state = [[*batch] for _ in range(2) for batch in loader], torch.get_rng_state()
    start()
    stream = BatchStream(loader)
    assert not hasattr(stream._loader.dataset, "tensors")
    found = [[*stream.next().args] for _ in range(2 * len(loader))]
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, one, other))
        assert [value.dtype for value in one] == [value.dtype for value in other]
    assert torch.equal(torch.get_rng_state(), state)
    assert not [*stream._iterator]  # ends its worker, for which others would wait


def test_rows_that_are_collated_in_another_way_stay_as_they_are():
    data = TensorDataset(numbers())
    for loader in (
        DataLoader(
            data, batch_size=4, collate_fn=lambda rows: torch.cat([x[None] for (x,) in rows])
        ),
        DataLoader(data, batch_size=None),
        DataLoader([*range(10)], batch_size=4),
    ):
        assert BatchStream(loader)._loader is loader


@pytest.mark.parametrize("limit", [0, 50, 2**20])
def test_passes_over_all_batches(limit, monkeypatch):
    """The same ones each time, loaded once where they take little memory; else none are kept."""
    monkeypatch.setattr("pyro_artransform.inference.all_batches._MOST_HELD", limit)
    loaded = []

    class Watched(list):
        def __iter__(self):
            loaded.append(len(self))
            return super().__iter__()

    y = torch.arange(12.0)
    batches = AllBatches(BatchStream(Watched(y.split(5))))
    loaded.clear()
    for _ in range(3):
        assert torch.equal(torch.cat([batch.args[0] for batch in batches]), y)
    assert loaded == ([3] if limit == 2**20 else [3, 3, 3])
    assert len(batches._held) == (3 if limit == 2**20 else 0)


def of_rows(part, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 12, subsample_size=size or len(part)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=part)


def test_passes_join_batches_of_rows():
    """Up to a number of rows, unless each batch has a constant, or the model a fixed number of rows."""
    y, names = torch.arange(12.0), {"size": 12}
    joined = AllBatches(BatchStream(y.split(5), names), num_rows=10)
    assert [batch.args[0].tolist() for batch in joined] == [y[:10].tolist(), y[10:].tolist()]
    assert all(batch.kwargs == names for batch in joined)
    constant = torch.ones(5)
    apart = AllBatches(BatchStream([(part, constant) for part in y[:10].split(5)]), num_rows=10)
    assert len([*apart]) == 2

    points, values = torch.randn(3, 1), []
    for model, count in ((partial(of_rows, size=4), 3), (of_rows, 1)):
        stream = BatchStream(y.split(4))
        density = full_data_density(LogJoint(model, (y[:4],)), stream)
        assert len([*stream.all_batches]) == count
        values.append(density(points))
    assert torch.allclose(*values)


def test_time_that_is_over_is_no_refusal_of_joined_batches(monkeypatch):
    """Passes must not go on, nor with joined batches that were not compared with their parts."""

    def over(*_):
        raise OutOfTimeError

    y = torch.arange(12.0)
    stream = BatchStream(y.split(4))
    monkeypatch.setattr(all_batches, "_is_same", over)
    with pytest.raises(OutOfTimeError):
        full_data_density(LogJoint(of_rows, (y[:4],)), stream)
    assert stream.all_batches is None
