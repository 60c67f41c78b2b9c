# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Sums over the states of discrete latents, many draws at once, against single draws and Pyro's sums."""

from functools import partial
from itertools import pairwise

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex

from pyro_artransform.model import LogJoint
from pyro_artransform.model.enumeration import _elimination


def changepoint():
    """Rates of counts before and after an unknown year, all at once in the one site of data."""
    early, late = (
        pyro.sample("early", dist.Exponential(1.0)),
        pyro.sample("late", dist.Exponential(1.0)),
    )
    year = pyro.sample("year", dist.Categorical(torch.ones(8)))
    with pyro.plate("years", 8) as t:
        rates = torch.stack([early, late])
        is_late = (t >= year).long()
        pyro.sample("y", dist.Poisson(rates[is_late]), obs=torch.tensor([4.0, 5, 4, 1, 0, 1, 2, 0]))


# After examples of Pyro and NumPyro, in the form that these have: what is indexed from the left stays so


def gmm(y):
    """Two normal components of one scale."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((2,), 0.5)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        component = pyro.sample("component", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(locs[component], scale), obs=y)


def music():
    """Which of five tones sound in three series of at most six steps, and the lengths."""
    return (torch.rand(3, 6, 5) < 0.8).double(), torch.tensor([5, 3, 6])


def sticky(size):
    """The concentration of transitions that mostly stay where they are."""
    return 0.9 * torch.eye(size) + 0.1


def sounding(*shape):
    """The probability of each tone, given states of these numbers."""
    rates = dist.Beta(0.1, 0.9).expand((*shape, 5)).to_event(len(shape) + 1)
    return pyro.sample("probs_y", rates)


def hmm_0(tones, lengths):
    """Series after series, in a sequential plate."""
    probs_x = pyro.sample("probs_x", dist.Dirichlet(sticky(4)).to_event(1))
    probs_y = sounding(4)
    keys = pyro.plate("tones", 5, dim=-1)
    for i in pyro.plate("series", len(tones)):
        x = 0
        for t in pyro.markov(range(lengths[i])):
            x = pyro.sample(f"x_{i}_{t}", dist.Categorical(probs_x[x]))
            with keys:
                played = dist.Bernoulli(probs_y[x.squeeze(-1)])
                pyro.sample(f"y_{i}_{t}", played, obs=tones[i, t])


def hmm_4(tones, lengths):
    """All series at once, of two chains, of which one depends on the other; what is over is masked."""
    probs_w = pyro.sample("probs_w", dist.Dirichlet(sticky(2)).to_event(1))
    cube = dist.Dirichlet(sticky(2)).expand_by([2]).to_event(2)
    probs_x = pyro.sample("probs_x", cube)
    probs_y = sounding(2, 2)
    keys, w, x = pyro.plate("tones", 5, dim=-1), 0, 0
    with pyro.plate("series", len(tones), dim=-2):
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths)[:, None]):
                w = pyro.sample(f"w_{t}", dist.Categorical(probs_w[w]))
                x = pyro.sample(f"x_{t}", dist.Categorical(Vindex(probs_x)[w, x]))
                with keys as key:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[w, x, key]), obs=tones[:, t])


def dippers():
    """Which of 20 animals were seen in five years, and their sex."""
    return (torch.rand(20, 5) < 0.6).double(), (torch.rand(20) < 0.5).double()


def cjs_5(seen, sex):
    """Effects of sex and year on the logit of survival, from the year in which an animal was first seen."""
    effect = sex * pyro.sample("phi_beta", dist.Normal(0.0, 10.0))
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    animals = pyro.plate("animals", len(seen), dim=-1)
    z, was_seen = torch.ones(len(seen)), torch.zeros(len(seen)).bool()
    for t in pyro.markov(range(seen.shape[1])):
        gamma = pyro.sample(f"phi_gamma_{t}", dist.Normal(0.0, 10.0)) if t else 0.0
        phi = torch.sigmoid(effect + gamma)
        with animals, poutine.mask(mask=was_seen):
            known = 1.0 * was_seen
            survival = known * phi * z + (1 - known)
            z = pyro.sample(f"z_{t}", dist.Bernoulli(survival))
            pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=seen[:, t])
        was_seen |= seen[:, t].bool()


def experts(x, y):
    """Three linear regressions, of which a softmax of the columns chooses one for each row."""
    shape = x.shape[-1], 3
    gate = pyro.sample("gate", dist.Normal(0.0, 1.0).expand(shape).to_event(2))
    slopes = pyro.sample("slopes", dist.Normal(0.0, 2.0).expand(shape).to_event(2))
    scales = pyro.sample("scales", dist.HalfNormal(1.0).expand([3]).to_event(1))
    means = x @ slopes
    with pyro.plate("rows", len(x)) as row:
        expert = pyro.sample("expert", dist.Categorical(logits=x @ gate))
        pyro.sample("y", dist.Normal(means[row, expert], scales[expert]), obs=y)


def mace(labels):
    """An annotator who does not know the class draws from a distribution of their own."""
    with pyro.plate("annotators", len(labels)):
        guesses = pyro.sample("guesses", dist.Dirichlet(torch.full((4,), 10.0)))
        guessing = pyro.sample("guessing", dist.Beta(0.5, 0.5))
    with pyro.plate("items", labels.shape[1], dim=-1):
        kind = pyro.sample("kind", dist.Categorical(torch.ones(4)))
        with pyro.plate("positions", len(labels), dim=-2) as annotator:
            is_guess = pyro.sample("is_guess", dist.Bernoulli(guessing[annotator][:, None]))
            known = torch.eye(4)[kind]
            probs = torch.where(is_guess[..., None] == 0, known, guesses[annotator][:, None])
            pyro.sample("labels", dist.Categorical(probs), obs=labels)


def lda(words):
    """Latent Dirichlet allocation, the topic of each word summed out."""
    with pyro.plate("topics", 3):
        weights = pyro.sample("topic_weights", dist.Gamma(1 / 3, 1.0))
        topics = pyro.sample("topic_words", dist.Dirichlet(torch.full((10,), 1 / 10)))
    with pyro.plate("documents", words.shape[1], dim=-1):
        shares = pyro.sample("doc_topics", dist.Dirichlet(weights))
        with pyro.plate("words", len(words), dim=-2):
            topic = pyro.sample("word_topics", dist.Categorical(shares))
            pyro.sample("doc_words", dist.Categorical(topics[topic]), obs=words)


EXAMPLES = {
    changepoint: lambda: (),
    gmm: lambda: (torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0]),),
    **dict.fromkeys((hmm_0, hmm_4), music),
    cjs_5: dippers,
    experts: lambda: (torch.randn(200, 4), torch.randn(200)),
    mace: lambda: (torch.randint(4, (5, 8)),),
    lda: lambda: (torch.randint(10, (6, 4)),),
}


def value_and_gradient(log_joint, strategy, z):
    log_joint = log_joint.evaluated(strategy=strategy)
    z = z.clone().requires_grad_()
    values = log_joint(z)
    (gradient,) = torch.autograd.grad(values.sum(), z)
    return values.detach(), gradient


@pytest.mark.parametrize("model", EXAMPLES)
def test_many_draws_at_once_and_the_sums_of_pyro(model):
    strategy = "plate" if model is cjs_5 else "vmap"
    model = partial(config_enumerate(model), *EXAMPLES[model]())
    log_joint = LogJoint(model)
    assert log_joint.strategy == strategy
    z = torch.randn(3, log_joint.latents.latent_dim)
    values, gradient = value_and_gradient(log_joint, "loop", z)
    assert values.isfinite().all()
    for strategy in {log_joint.strategy, "vmap"}:
        found = value_and_gradient(log_joint, strategy, z)
        assert torch.allclose(found[0], values, rtol=1e-12)
        assert torch.allclose(found[1], gradient, rtol=1e-9, atol=1e-9 * gradient.abs().max())
    first = z[0].requires_grad_()
    constrained, ladj = log_joint.latents.constrain_with_ladj(first)
    elbo = TraceEnum_ELBO(max_plate_nesting=log_joint.num_plates)
    given = poutine.condition(model, constrained)
    expected = ladj - elbo.differentiable_loss(given, lambda: None)
    assert torch.allclose(values[0], expected, rtol=1e-12)
    (wanted,) = torch.autograd.grad(expected, first)
    assert torch.allclose(gradient[0], wanted, rtol=1e-8, atol=1e-8 * wanted.abs().max())


@config_enumerate
def impossible():
    """No state is possible for a datum that is further than one from both locations."""
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", 2):
        kind = pyro.sample("kind", dist.Bernoulli(0.5))
        off = torch.tensor([0.0, 3.0]) - locs[kind.long()]
        pyro.factor("bounded", torch.where(off.abs() < 1, -((off / scale) ** 2), -torch.inf))


def test_a_sum_of_zeros_has_no_logarithm_and_a_gradient_all_the_same():
    log_joint = LogJoint(impossible)
    assert log_joint.strategy == "vmap"
    z = torch.tensor([[0.1, 2.9, 0.0], [0.2, 0.1, 0.0], [7.0, 7.0, 0.0]])
    for strategy in ("vmap", "loop"):
        values, gradient = value_and_gradient(log_joint, strategy, z)
        assert values.isfinite().tolist() == [True, False, False]
        assert values[1:].isneginf().all()
        assert gradient.isfinite().all()


def test_far_states_do_not_vanish():
    """The terms of a sum are 1e4 nats apart, as are those of its factors."""

    @config_enumerate
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        rows = torch.tensor([[0.0, -1e4], [-1e4, 0.0]]) * z
        one = pyro.sample("one", dist.Bernoulli(0.5)).long()
        other = pyro.sample("other", dist.Bernoulli(0.5)).long()
        pyro.factor("both", rows[one, other])
        pyro.factor("first", torch.tensor([0.0, -2e4])[one] * z)
        pyro.factor("second", torch.tensor([-2e4, 0.0])[other] * z)

    z = torch.ones(2, 1)
    values, gradient = value_and_gradient(LogJoint(model), "vmap", z)
    # states (0, 1) are the likeliest, by 1e4 nats
    expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + 2 * torch.tensor(0.5).log() - 1e4
    assert torch.allclose(values, expected)
    assert torch.allclose(gradient, torch.full((2, 1), -1e4 - 1.0))


def test_a_chain_is_summed_from_its_end():
    """No product has more dimensions than the two of a transition, in chains of any length."""
    names = [chr(200 + t) for t in range(500)]
    factors = [(name, torch.Size([3])) for name in names]
    factors += [(b + a, torch.Size([3, 3])) for a, b in pairwise(names)]
    steps = _elimination(tuple(factors), frozenset(names))
    assert len(steps) == 501
    dims = [set(name) for name, _ in factors]
    for name, members in steps:
        dims.append(set().union(*(dims[i] for i in members)))
        assert len(dims[-1]) <= 2
        dims[-1].discard(name)
    assert dims[-1] == set()
