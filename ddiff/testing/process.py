"""All laws of a forward process, cheap ones first."""

from __future__ import annotations

from ddiff.core.clock import LevelClock
from ddiff.core.process import ForwardProcess
from ddiff.core.schedule import Schedule
from ddiff.errors import ArgumentError
from ddiff.testing import bound, chain, drawn, draws, edges, information, moves, reverse
from ddiff.testing.clock import check_clock
from ddiff.testing.probes import require_small
from ddiff.testing.report import Law, LawReport, check
from ddiff.testing.schedule import check_schedule
from ddiff.testing.vocabulary import check_vocabulary

PROCESS_LAWS: tuple[Law, ...] = (
    chain.rates_rows_sum_to_zero,
    chain.rates_are_not_negative,
    chain.kernels_agree,
    chain.transition_rows_are_laws,
    chain.transition_is_oracle,
    chain.chapman_kolmogorov,
    chain.marginal_follows_transitions,
    chain.total_probability,
    chain.ends_as_declared,
    chain.ends_are_approached,
    chain.safe_at_ends,
    reverse.posterior_is_bayes,
    reverse.posterior_is_derived,
    reverse.likelihood_is_derived,
    reverse.density_is_derived,
    reverse.score_is_law,
    reverse.weight_is_derived,
    reverse.factors_multiply,
    reverse.density_is_a_divergence,
    reverse.decode_nll_is_derived,
    reverse.closing_kl_is_derived,
    reverse.active_covers_density,
    reverse.scope_suffices,
    reverse.informed_is_enough,
    draws.sample_follows_marginal,
    draws.step_follows_posterior,
    draws.decode_follows_bayes,
    draws.step_asks_once,
    draws.decode_asks_once,
    draws.draws_are_their_own,
    draws.arguments_are_untouched,
    edges.gradients_are_finite,
    edges.impossible_truth_is_bayes,
    moves.from_clean_is_marginal,
    moves.stay_probability_is_derived,
    moves.scores_at_ends,
    moves.scores_decode_to_posterior,
    moves.scores_are_decoded,
    moves.reverse_flows_balance,
    moves.density_is_of_reverse_rates,
    moves.reverse_rates_make_posterior,
    moves.climb_follows_transition,
    moves.events_follow_reverse_rates,
    moves.events_ask_once,
    moves.monotone_moves_reveal,
    moves.solve_inverts,
    information.information_is_enumerated,
    information.clock_is_a_time_change,
    information.tau_is_the_share_lost,
    information.variance_has_no_tail,
    bound.weights_are_level_flows,
    bound.constant_denoiser,
    bound.discrete_bound_converges,
    bound.entropy_equality,
    bound.speed_equality,
    drawn.draws_of_the_bound,
)

OF_EXACT_STEPS = (
    draws.step_follows_posterior,
    draws.decode_follows_bayes,
    moves.events_follow_reverse_rates,
)
"""What a process that declares `exact_step = False` does not promise."""


def check_parts(process: ForwardProcess) -> list[LawReport]:
    """The laws of the vocabulary, the clocks and the schedules that a process holds."""
    reports = check_vocabulary(process.vocabulary)
    for part in vars(process).values():
        if isinstance(part, LevelClock):
            reports += check_clock(part)
            reports += [
                report for one in vars(part).get("schedules", ()) for report in check_schedule(one)
            ]
        elif isinstance(part, Schedule):
            reports += check_schedule(part)
    return reports


def check_process(process: ForwardProcess) -> list[LawReport]:
    """Every law that applies to a small instance (at most 64 states), by brute force in float64.

    A process that declares `exact_step = False` is not held to its posterior. Raises ArgumentError for a larger one; a law
    that the process breaks, or raises in, is a report that has not passed.
    """
    if not isinstance(process, ForwardProcess):
        raise ArgumentError(
            f"check_process: process must be an instance of a ForwardProcess; got {process!r}. Build one first on a small "
            "vocabulary: a class is no process yet, but its `examples()` are."
        )
    require_small(process)
    laws = (
        PROCESS_LAWS
        if process.exact_step
        else [law for law in PROCESS_LAWS if law not in OF_EXACT_STEPS]
    )
    return check(process, laws)
