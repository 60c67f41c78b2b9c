# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What each of several processes sees of a loader."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from pyro_artransform.inference.loader import BatchStream
from pyro_artransform.inference.sharding import StridedLoader, shard
from tests.inference import loaders
from tests.inference.loaders import KNOWN, listed, ordered, shuffled


def numbers(count=43):
    return torch.arange(count)


def seen(batches):
    """The numbers in the batches of an epoch."""
    return torch.cat([batch[0] for batch in batches]).tolist()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", [shuffled, ordered, loaders.with_generator])
def test_rows_of_a_data_loader(kind, size):
    """Each once, but for those that fill up the shares; in another order in the next epoch."""
    shares = [shard(kind(numbers()), 5, rank, size, 7) for rank in range(size)]
    rows = [seen(share) for share in shares]
    assert {len(part) for part in rows} == {-(-43 // size)}
    assert sorted({row for part in rows for row in part}) == list(range(43))
    for share in shares:
        assert isinstance(share, DataLoader)
        assert len(next(iter(share))[0]) == 10
        share.sampler.set_epoch(1)
    assert (seen(shares[0]) == rows[0]) == (kind is ordered)


def test_rows_that_are_left_out():
    rows = [seen(shard(shuffled(numbers(), drop_last=True), 4, r, 2, 7)) for r in range(2)]
    assert [len(part) for part in rows] == [20, 20]
    assert len(set(rows[0] + rows[1])) == 40


def test_options_of_a_data_loader():
    def collate(rows):
        return (torch.stack([row[0] for row in rows]) + 100,)

    share = shard(shuffled(numbers(), collate_fn=collate), 5, 1, 2, 7)
    assert min(seen(share)) >= 100


@pytest.mark.parametrize("name", ["weighted", "sampler with a generator", "a list", "a tuple"])
def test_batches_of_other_loaders(name):
    """Each batch counts once an epoch, and all processes have the same order."""
    whole = StridedLoader(KNOWN[name](numbers()), 5, 0, 1, 7)
    shares = [shard(KNOWN[name](numbers()), 5, rank, 2, 7) for rank in range(2)]
    for epoch in range(3):
        torch.manual_seed(epoch)
        for loader in (whole, *shares):
            loader.set_epoch(epoch)
        batches = [list(loader) for loader in (whole, *shares)]
        assert len(batches[0]) == len(batches[1]) + len(batches[2]) == 5
        assert len(batches[1]) == (2 if epoch == 1 else 3)
        assert sorted(seen(batches[0])) == sorted(seen(batches[1]) + seen(batches[2]))


def test_a_seed_leaves_the_generator_as_it_was():
    torch.manual_seed(0)
    list(shard(loaders.weighted(numbers()), 5, 0, 2, 7))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


def test_a_distributed_sampler_of_the_user():
    data = TensorDataset(numbers())
    loader = DataLoader(data, batch_size=10, sampler=DistributedSampler(data, 2, 1))
    assert shard(loader, 3, 1, 2, 7) is loader
    stream = BatchStream(loader)
    orders = []
    for _ in range(2):
        orders.append([stream.next().args[0].tolist() for _ in range(3)])
    assert orders[0] != orders[1]  # it is told of the epochs
    assert [batch.args[0].tolist() for batch in stream.one_pass(3)] == orders[0]


def test_a_loader_of_few_batches():
    with pytest.raises(ValueError, match="at least one batch for each of 6 processes, got 5"):
        shard(listed(numbers()), 5, 0, 6, 7)
    whole = BatchStream([(numbers(),)])
    assert whole.share(1, 2) is whole
    assert BatchStream(listed(numbers())).share(0, 1).num_batches == 5


@pytest.mark.parametrize("kind", [shuffled, loaders.weighted, listed])
def test_a_share_goes_on_where_it_was(kind):
    torch.manual_seed(3)
    stream = BatchStream(kind(numbers())).share(1, 2)
    for _ in range(4):
        stream.next()
    state = stream.state()
    expected = [stream.next().args[0].tolist() for _ in range(6)]
    torch.manual_seed(4)
    other = BatchStream(kind(numbers())).share(1, 2)
    assert other.restore(state)
    assert [other.next().args[0].tolist() for _ in range(6)] == expected
    assert other.whole.origin is state["origin"]
    assert len(list(other.whole.one_pass(5))) == 5
