"""All laws of a Gaussian process, in the order in which they are evaluated."""

from __future__ import annotations

from ddiff.core.gaussian import GaussianProcess
from ddiff.testing import gaussian_bound, gaussian_draws, gaussian_forward, gaussian_terms
from ddiff.testing.gaussian_probes import require_narrow
from ddiff.testing.report import Law, LawReport, evaluate_laws

GAUSSIAN_LAWS: tuple[Law, ...] = (
    gaussian_forward.snr_is_derived,
    gaussian_forward.snr_falls,
    gaussian_forward.closes_as_declared,
    gaussian_forward.variance_is_preserved,
    gaussian_forward.outputs_round_trip,
    gaussian_forward.outputs_are_defined,
    gaussian_forward.outputs_are_refused,
    gaussian_forward.velocity_is_a_derivative,
    gaussian_forward.transition_composes,
    gaussian_forward.posterior_is_bayes,
    gaussian_forward.posterior_keeps_marginals,
    gaussian_forward.deterministic_step_is_exact,
    gaussian_draws.sample_follows_marginal,
    gaussian_draws.step_follows_posterior,
    gaussian_draws.prior_is_standard_normal,
    gaussian_draws.decoder_normalizes,
    gaussian_draws.decode_follows_nll,
    gaussian_draws.draws_query_once,
    gaussian_draws.draws_are_independent,
    gaussian_draws.arguments_are_unchanged,
    gaussian_terms.gradients_are_finite,
    gaussian_terms.closing_is_a_divergence,
    gaussian_terms.information_is_normal,
    gaussian_terms.information_time_is_even,
    gaussian_terms.density_is_a_product,
    gaussian_terms.weight_integrates,
    gaussian_bound.constant_prediction,
    gaussian_bound.other_predictions_are_worse,
    gaussian_bound.schedule_does_not_matter,
    gaussian_bound.bound_is_pointwise_tight,
    gaussian_bound.bound_is_tight,
)


def check_gaussian(process: GaussianProcess) -> list[LawReport]:
    """Apply every law of a Gaussian process to an instance of width 1 to 3, in float64.

    A law during which the process raises an exception counts as broken. The report of a broken law
    has `passed = False`.

    Raises ArgumentError for another process, and for a width above 3.
    """
    return evaluate_laws(require_narrow(process), GAUSSIAN_LAWS)
