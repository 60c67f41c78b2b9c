# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models with symmetries, and models that only look as if they had some, by name."""

from collections.abc import Callable

from models import asymmetric, factor_models, labels
from models.symmetry import Symmetric

SYMMETRIC: dict[str, Callable[[], Symmetric]] = {
    "mixture": labels.mixture,
    "annotators": labels.annotators,
    "topics": labels.topics,
    "factors": factor_models.factors,
    "network": factor_models.network,
    "bimodal": factor_models.bimodal,
    "mixture, enumerated": labels.mixture_enumerated,
    "hidden Markov, enumerated": labels.hmm_enumerated,
    "hidden Markov": labels.hidden_markov,
    "experts": labels.experts,
    "block model": labels.blocks,
    "Bradley-Terry, flat": factor_models.bradley_terry_flat,
    "two layers": factor_models.two_layers,
    "documents": labels.documents,
    "sparse factors": factor_models.sparse_factors,
    "latent classes": labels.latent_classes,
    "full covariances": labels.full_covariances,
    "Poisson mixture": labels.poisson_mixture,
    "product": factor_models.product,
    "isotropic factors": factor_models.isotropic_factors,
    "zero-inflated regressions": labels.zero_inflated_regressions,
    "exchangeable pair": factor_models.exchangeable_pair,
}
ASYMMETRIC: dict[str, Callable[[], Symmetric]] = {
    "ordered mixture": asymmetric.ordered_mixture,
    "unequal priors": asymmetric.unequal_priors,
    "unequal weights": asymmetric.unequal_weights,
    "weak covariate": asymmetric.weak_covariate,
    "triangular factors": asymmetric.triangular_factors,
    "informed rows": asymmetric.informed_rows,
    "eight schools": asymmetric.groups,
    "seeded topics": asymmetric.seeded_topics,
    "exchangeable slopes": asymmetric.exchangeable_slopes,
    "informed annotators": asymmetric.informed_annotators,
    "reference class": asymmetric.reference_class,
    "fixed outputs": asymmetric.fixed_outputs,
    "Bradley-Terry": factor_models.bradley_terry_normal,
}
