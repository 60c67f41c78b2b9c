# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Weights by mini-batches whose elements have latents of their own, against exact ones."""

import math
from functools import partial
from unittest.mock import patch

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from pyro_artransform import AutoAmortized
from pyro_artransform.diagnostics.plates import PlateDiagnostics
from pyro_artransform.inference.evaluation import elements as weights_of_elements
from pyro_artransform.inference.evaluation.elements import ElementWeights, weigh_elements
from pyro_artransform.inference.evaluation.verdict import (
    FitStatus,
    about_elements,
    about_good_elements,
    judge,
)
from pyro_artransform.inference.loader import BatchStream
from pyro_artransform.inference.optimization import minibatches as passes
from pyro_artransform.inference.optimization.minibatches import NUM_VALIDATION, MinibatchObjective
from pyro_artransform.inference.optimization.objective import PyroObjective
from pyro_artransform.model import LogJoint
from tests.inference import loaders
from tests.inference.loaders import SIZE, groups, groups_evidence, shuffled

Y = 3 * torch.randn(SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PRECISION = 1 / 9 + SIZE / 1.25
evidence = partial(groups_evidence, Y)


def posterior(y, size=SIZE, shift=0.0, width=1.0, of_mean=0.0, broken=None):
    """That of :func:`loaders.groups`, if nothing is set.

    :param broken: an index in the data, whose element alone is shifted and widened.
    """
    loc = pyro.param("loc", Y.sum() / 1.25 / PRECISION)  # a fit needs some parameter
    mean = pyro.sample("mean", dist.Normal(loc + of_mean, PRECISION**-0.5))
    is_other = torch.ones(len(y), dtype=torch.bool) if broken is None else y == Y[broken]
    shift, width = torch.where(is_other, shift, 0.0), torch.where(is_other, width, 1.0)
    with pyro.plate("groups", size, subsample_size=len(y)):
        pyro.sample("z", dist.Normal((mean + 4 * y) / 5 + shift, width * 5**-0.5))


def minibatches(guide, model=groups, make_loader=shuffled, data=Y):
    stream = BatchStream(make_loader(data))
    first = next(stream.one_pass(1))
    log_joint = LogJoint(model, *first)
    objective = PyroObjective(model, guide, first, log_joint)
    validation = list(stream.one_pass(NUM_VALIDATION))
    return MinibatchObjective(objective, stream, log_joint, validation)


def weighed(guide, *args, num_shared=250, min_inner=4, max_batches=500, **options):
    by_batch = minibatches(guide, *args, **options)
    numbers = {"_NUM_SHARED": num_shared, "_MIN_INNER": min_inner}
    of_pass = patch.object(passes, "_MAX_BATCHES", max_batches)
    with of_pass, patch.multiple(weights_of_elements, **numbers):
        return weigh_elements(by_batch, by_batch.over_a_pass(), 0)


def elements(khat, khat_se, tail_share, gap, index=None):
    numbers = {"khat": khat, "khat_se": khat_se, "tail_share": tail_share, "gap": gap}
    return PlateDiagnostics(plate="rows", index=index, **numbers)


def verdict(found):
    objection = about_elements(found, "a better one")
    return judge(FitStatus(), about_others=objection, praise=about_good_elements(found))


def test_the_posterior_itself():
    """All weights are the evidence, and nothing is noise."""
    found = weighed(posterior)
    assert found.shared.log_evidence == pytest.approx(evidence(), abs=1e-9)
    assert found.shared.elbo == pytest.approx(evidence(), abs=1e-9)
    assert found.noise < 1e-12
    elements = found.elements
    assert elements.plate == "groups"
    assert torch.equal(elements.index, torch.arange(SIZE))
    assert elements.gap.abs().max() < 1e-12
    assert elements.tail_share.max() < 1e-12
    assert verdict(found).trusted
    for words in (
        "Trusted: for the shared latents, the ELBO",
        "43 elements of plate 'groups'",
        "other modes were not",
    ):
        assert words in verdict(found).words


def test_gaps_are_divergences():
    """A shift of half a deviation is an eighth of a nat for each element, and of the shared latent."""
    torch.manual_seed(0)
    options = {"num_shared": 2000, "min_inner": 8}
    wide = partial(posterior, width=1.3)
    elements = weighed(wide, **options).elements
    divergence = 1.3**2 / 2 - 0.5 - math.log(1.3)
    assert (elements.gap - divergence).abs().max() < 0.01
    found = weighed(partial(posterior, of_mean=0.5 * PRECISION**-0.5), **options)
    assert found.shared.log_evidence == pytest.approx(evidence(), abs=0.06)
    assert found.shared.log_evidence - found.shared.elbo == pytest.approx(0.125, abs=0.04)
    assert found.elements.gap.max() < 0.01
    assert "nats below the log evidence" in verdict(found).words


def test_noise_of_elements_is_no_gap_of_what_they_share():
    torch.manual_seed(0)
    found = weighed(partial(posterior, width=1.1), num_shared=2000, min_inner=8)
    assert found.shared.log_evidence == pytest.approx(evidence(), abs=0.03)
    raw = found.shared.log_weights
    assert raw.var() == pytest.approx(found.noise, rel=0.15)
    assert raw.mean() < evidence() - 0.025
    assert found.shared.elbo == pytest.approx(evidence(), abs=0.025)
    assert verdict(found).trusted


@pytest.mark.parametrize(
    ("changes", "num_shared", "words"),
    [
        ({"shift": 1.0}, 250, "element 17 (ELBO "),
        ({"shift": 20.0}, 250, "element 17 (ELBO "),
        # heavy tails
        ({"width": 0.6}, 1000, "element 17 ("),
        # narrow and far off its own draws weigh nearly the same, and those of the prior do not
        ({"shift": 20 * 5**-0.5, "width": 0.004}, 1000, "element 17 ("),
    ],
)
def test_one_element_is_named(changes, num_shared, words):
    torch.manual_seed(0)
    found = weighed(partial(posterior, broken=17, **changes), num_shared=num_shared)
    assert (~found.elements.trusted).nonzero().flatten().tolist() == [17]
    assert found.elements.gap.argmax() == 17
    if "shift" not in changes:
        assert found.elements.khat.argmax() == 17
    if changes.get("width") == 0.004:  # 20 deviations
        assert 150 < found.elements.gap[17] < 210
    judged = verdict(found)
    assert not judged.trusted
    assert f"the guide fails for 1 of the 43 elements of plate 'groups': {words}" in judged.words
    assert "if they are many, use a better one." in judged.words


def test_much_noise_hides_what_all_share():
    torch.manual_seed(0)
    found = weighed(partial(posterior, width=1.4, shift=0.02), num_shared=500)
    good = found._replace(elements=weighed(posterior).elements)
    assert found.noise > 1
    assert "the shared latents could not be checked" in verdict(good).words


def test_the_largest_of_many_khats():
    """Those at the bound are trusted half of the time, however many there are."""
    torch.manual_seed(0)
    for size in (1, 50, 2000):
        trusted = 0
        for _ in range(200):
            khat, zero = 0.7 + 0.1 * torch.randn(size), torch.zeros(size)
            ones = torch.ones(size)
            trusted += bool(elements(khat, 0.1 * ones, ones, zero).trusted.all())
        assert 70 < trusted < 130


@pytest.mark.parametrize(
    ("share", "why"),
    [
        (
            1.0,
            "1.10 (above 0.7, as expected by chance for the largest of so many), but other modes",
        ),
        (1e-4, "1.10 (above 0.7, with a tail of negligible weight), but other modes"),
    ],
)
def test_why_a_large_khat_is_trusted(share, why):
    khat, zero = torch.linspace(0.2, 1.1, 1000), torch.zeros(1000)
    found = ElementWeights(elements(khat, zero + 0.15, zero + share, zero), None, 0.0, 4)
    assert not found.elements.objection
    assert f"the largest k-hat is {why}" in about_good_elements(found)


def test_the_worst_elements_are_shown():
    index = torch.arange(10, 22)
    khat, gap = torch.linspace(0.1, 1.2, 12), torch.linspace(0.5, 0.06, 12)
    shown = repr(elements(khat, 0 * khat, 0 * khat + 1, gap, index)).split("\n")
    assert shown[0] == "Elements: 0 of 12 of plate 'rows' are trusted"
    assert shown[1].startswith("  largest gaps in nats 0.5 of element 10, 0.46 of element 11, ")
    assert shown[2].startswith("  largest k-hats       1.2 of element 21, 1.1 of element 20, ")
    assert [line.count("element") for line in shown[1:]] == [5, 5]


@pytest.mark.parametrize("kind", ["listed", "unknown order"])
def test_elements_without_an_index(kind):
    """Of a loader that does not tell its rows the place in a pass is known."""
    make_loader = {"listed": lambda y: y.split(10), "unknown order": loaders.Unknown}[kind]
    found = weighed(posterior, make_loader=make_loader)
    if kind == "listed":
        assert found.elements.index is None
        assert found.elements.name_of(17) == "element 17 of a pass over the loader"
    else:
        assert "each row exactly once" in found


def of_plate(y):
    """Rows with their indices, in an order of their own."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(3))
    return [(y[index], index) for index in order.split(10)]


def test_indices_of_the_plates_of_a_guide():
    options = {"flow": None, "local_flow": None, "create_plates": loaders.plate_of_indexed}
    guide = AutoAmortized(loaders.indexed, **options)
    found = weighed(guide, loaders.indexed, make_loader=of_plate, num_shared=50)
    assert torch.equal(found.elements.index, torch.arange(SIZE))


def test_what_is_not_known_is_said():
    def other(y, prior=lambda y: y.new_zeros(()), times=1.0, moved=lambda z: z, is_crossed=False):
        mean = pyro.sample("mean", dist.Normal(prior(y), 3.0))
        groups = pyro.plate("groups", SIZE, subsample_size=len(y))
        rows = pyro.plate("rows", SIZE, subsample_size=len(y)) if is_crossed else groups
        with groups:
            z = pyro.sample("z", dist.Normal(mean, 1.0))
        with rows, poutine.scale(scale=times):
            pyro.sample("y", dist.Normal(moved(z), 0.5), obs=y)

    def most(y):
        rows = SubsetRandomSampler(range(39))
        return DataLoader(TensorDataset(y), batch_size=10, sampler=rows)

    def in_no_plate(y):
        mean = pyro.sample("mean", dist.Normal(pyro.param("other", torch.tensor(0.0)), 1.0))
        pyro.sample("z", dist.Normal((mean + 4 * y) / 5, 5**-0.5).to_event(1))

    def outside(y):
        groups(y)
        pyro.sample("more", dist.Normal(y.sum(), 1.0), obs=torch.tensor(0.0))

    few, double = partial(weighed, num_shared=50), partial(groups, size=2 * SIZE)
    for words, found in (
        ("covers 90.7 % of the data", few(posterior, make_loader=most)),
        ("covers 50 % of the data", few(partial(posterior, size=2 * SIZE), double)),
        ("covers 50 % of the data", few(posterior, partial(other, times=2.0))),
        ("depend on the mini-batch", few(posterior, partial(other, prior=torch.mean))),
        ("depend on the mini-batch", few(posterior, outside)),
        ("do not vectorize over draws", few(in_no_plate)),
        ("depend on each other", few(posterior, partial(other, moved=lambda z: z.cumsum(-1)))),
        (r"those of ['groups', 'rows']", few(posterior, partial(other, is_crossed=True))),
        ("a pass saw 60 % of the data, in 3 batches", few(posterior, max_batches=3)),
    ):
        assert isinstance(found, str)
        assert words in found


def test_an_error_is_no_end_of_a_fit(monkeypatch):
    """What a long fit has reached is kept."""

    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(BatchStream, "one_pass_with_rows", fails)
    assert (
        "importance weights of elements could not be computed (RuntimeError: out of memory"
        in weighed(posterior)
    )
