# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The posteriors of fit.md and chains.md by name."""

from collections.abc import Callable
from functools import partial

from models import hierarchies, paths, regressions
from models.library import Posterior, Subject
from models.priors import funnel_with_data
from models.regressions import linear

#: of fit.md
SMALL = {
    "schools, centred": Posterior(
        partial(hierarchies.schools, centred=True), 10, lambda: hierarchies.schools_truth().evidence
    ),
    "schools, non-centred": Posterior(
        partial(hierarchies.schools, centred=False),
        10,
        lambda: hierarchies.schools_truth().evidence,
    ),
    "autoregression": linear(regressions.autoregression_data, 7),
    "survey": linear(regressions.survey_data, 10),
    "cancer": Posterior(regressions.logistic, 31, lambda: regressions.CANCER_EVIDENCE),
    "chain": Posterior(paths.chain, paths.LENGTH, paths.chain_evidence),
}
#: of chains.md: for Pyro, and in another form for NumPyro (`in_numpyro.py`)
LARGE: dict[str, Callable[[], Subject]] = {
    "hierarchy": hierarchies.hierarchy,
    "volatility": paths.volatility,
    "item responses": hierarchies.items,
    "funnel": lambda: (funnel_with_data, (100,)),
}
#: for either library
BOUND = SMALL | {
    "state space": Posterior(paths.states, 1_000),
    "counts on a grid": Posterior(paths.field, 1_026),
    "groups": Posterior(hierarchies.groups, 45),
    "regression": linear(regressions.rows_data, 27),
    "logistic_horseshoe": Posterior(regressions.logistic_horseshoe, 202),
    "walk": Posterior(paths.white_walk, 2_003),
}
NAMES = (*LARGE, *BOUND)
