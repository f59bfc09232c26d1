"""All conformance checks of a forward process, in the order of evaluation: fast checks first."""

from __future__ import annotations

from ddiff.core.clock import LevelClock
from ddiff.core.process import ForwardProcess
from ddiff.core.schedule import Schedule
from ddiff.errors import ArgumentError
from ddiff.testing import (
    bound,
    bound_terms,
    chain,
    derived_formulas,
    draws,
    edge_cases,
    information,
    reverse_process,
)
from ddiff.testing.clock import check_clock
from ddiff.testing.probes import require_small
from ddiff.testing.report import Law, LawReport, evaluate_laws
from ddiff.testing.schedule import check_schedule
from ddiff.testing.vocabulary import check_vocabulary

PROCESS_LAWS: tuple[Law, ...] = (
    chain.rates_rows_sum_to_zero,
    chain.rates_are_not_negative,
    chain.kernels_agree,
    chain.transition_rows_are_distributions,
    chain.transition_is_oracle,
    chain.chapman_kolmogorov,
    chain.marginal_follows_transitions,
    chain.total_probability,
    chain.ends_as_declared,
    chain.ends_are_approached,
    chain.safe_at_ends,
    derived_formulas.posterior_is_bayes,
    derived_formulas.posterior_is_derived,
    derived_formulas.likelihood_is_derived,
    derived_formulas.density_is_derived,
    derived_formulas.density_accepts_scores,
    derived_formulas.weight_is_derived,
    derived_formulas.weight_times_divergence_is_density,
    derived_formulas.density_is_a_divergence,
    derived_formulas.decode_nll_is_derived,
    derived_formulas.closing_kl_is_derived,
    derived_formulas.active_covers_density,
    derived_formulas.scope_suffices,
    derived_formulas.trained_part_suffices,
    draws.sample_follows_marginal,
    draws.step_follows_posterior,
    draws.decode_follows_bayes,
    draws.step_queries_once,
    draws.decode_queries_once,
    draws.draws_depend_on_own_uniforms,
    draws.arguments_are_unchanged,
    edge_cases.gradients_are_finite,
    edge_cases.impossible_truth_is_bayes,
    reverse_process.from_clean_is_marginal,
    reverse_process.stay_probability_is_derived,
    reverse_process.scores_at_ends,
    reverse_process.scores_decode_to_posterior,
    reverse_process.scores_are_decoded,
    reverse_process.reverse_flows_balance,
    reverse_process.reverse_rates_make_density,
    reverse_process.reverse_rates_make_posterior,
    reverse_process.forward_step_follows_transition,
    reverse_process.events_follow_reverse_rates,
    reverse_process.events_query_once,
    reverse_process.monotone_moves_reveal,
    reverse_process.solve_inverts,
    information.information_is_enumerated,
    information.clock_is_a_time_change,
    information.tau_is_the_share_lost,
    information.variance_has_no_tail,
    bound.weights_are_level_flows,
    bound.constant_denoiser,
    bound.discrete_bound_converges,
    bound.entropy_equality,
    bound.speed_equality,
    bound_terms.terms_have_their_expectations,
)

# laws that do not apply to a process with `exact_step = False`
LAWS_OF_EXACT_STEPS = (
    draws.step_follows_posterior,
    draws.decode_follows_bayes,
    reverse_process.events_follow_reverse_rates,
)


def check_parts(process: ForwardProcess) -> list[LawReport]:
    """Check the vocabulary, the clocks and the schedules that a process contains."""
    reports = check_vocabulary(process.vocabulary)
    for part in vars(process).values():
        if isinstance(part, LevelClock):
            reports += check_clock(part)
            for schedule in vars(part).get("schedules", ()):
                reports += check_schedule(schedule)
        elif isinstance(part, Schedule):
            reports += check_schedule(part)
    return reports


def check_process(process: ForwardProcess) -> list[LawReport]:
    """Apply every conformance check of processes to a process in float64.

    The report of a failed check has `passed = False`. A check also fails if the process raises an
    exception during the check. If the process declares `exact_step = False`, its reverse steps are
    not exact, and the checks in `LAWS_OF_EXACT_STEPS` are not applied.

    Raises ArgumentError for an instance with more than 64 states.
    """
    if not isinstance(process, ForwardProcess):
        raise ArgumentError(
            f"check_process: process must be an instance of a ForwardProcess; got {process!r}. "
            "Build an instance on a small vocabulary, or use one of the class's `examples()`."
        )
    require_small(process)
    laws = list(PROCESS_LAWS)
    if not process.exact_step:
        laws = [law for law in laws if law not in LAWS_OF_EXACT_STEPS]
    return evaluate_laws(process, laws)
