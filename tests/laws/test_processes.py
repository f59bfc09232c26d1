"""Conformance checks (laws) of `ddiff.testing`: processes that pass, and faults that are reported.

`EVERY` holds small instances of forward processes by name, each with at most 64 states.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from chains import EVERY
from ddiff_hybrid.epsilon import EpsilonHybrid

from ddiff.core.components import MixtureProcess, mask_distribution, token_distribution
from ddiff.core.process import ForwardProcess
from ddiff.core.schedule import GeometricSchedule, LinearSchedule, PowerSchedule
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.errors import ArgumentError
from ddiff.testing import (
    Law,
    LawReport,
    assert_laws,
    bound,
    check_process,
    reverse_process,
    schedule,
)
from ddiff.testing.process import PROCESS_LAWS, check_parts

UNMASKED = FlatVocabulary(3, mask=False)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Use one thread: the tensors are so small that a second thread costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", EVERY)
def test_small_process_passes_every_conformance_check(name: str) -> None:
    reports = check_process(EVERY[name])
    assert_laws(reports)
    # Checks of overrides, trees and declared properties need not apply; all others must.
    undeclared = (0 if EVERY[name].has_events else 2) + (0 if EVERY[name].is_monotone else 1)
    assert len(reports) >= len(PROCESS_LAWS) - 8 - undeclared


def test_a_tree_and_a_masked_process_cover_all_conformance_checks_but_one() -> None:
    """The exception compares an override of `reverse_log_probs` with the derived formula.

    No process of the library overrides `reverse_log_probs`.
    """
    chains = (EVERY["three levels, powers, xi"], EVERY["mixture: mask, cosine"])
    seen = {report.law for process in chains for report in check_process(process)}
    assert {one.name for one in PROCESS_LAWS} - seen == {"override = derived: reverse_log_probs"}


@pytest.mark.parametrize(
    "name", ["three levels, nearly equal", "two levels, powers", "mixture: uniform"]
)
def test_parts_of_a_process_pass_their_conformance_checks(name: str) -> None:
    """`check_parts` checks the vocabulary, the level clock and the noise schedules of a process.

    A level clock is the distribution of the time at which a position reaches each level of a tree.
    """
    assert_laws(check_parts(EVERY[name]))


EXTREME_AND_CORRECT: dict[str, tuple[Law, object]] = {
    "noise at t = 0": (
        schedule.one_minus_alpha_is_accurate,
        GeometricSchedule(0.5, 0.5001),
    ),
    "a vocabulary of one token": (
        bound.discrete_bound_converges,
        MixtureProcess(FlatVocabulary(1), LinearSchedule(), mask_distribution(FlatVocabulary(1))),
    ),
    "a transition close to stationary": (
        reverse_process.solve_inverts,
        MixtureProcess(UNMASKED, GeometricSchedule(1.0, 100.0), token_distribution(UNMASKED)),
    ),
    "early masks and redrawn tokens": (
        bound.constant_denoiser,
        EpsilonHybrid(FlatVocabulary(3), PowerSchedule(0.5), 0.1),
    ),
}


@pytest.mark.parametrize("name", EXTREME_AND_CORRECT)
def test_conformance_checks_accept_correct_extreme_cases(name: str) -> None:
    one, subject = EXTREME_AND_CORRECT[name]
    assert_laws([one(subject)])


def test_check_process_rejects_a_process_with_more_than_64_states() -> None:
    clock = EVERY["one level, linear"].clock  # type: ignore[attr-defined]
    large = TreeProcess(FlatVocabulary(100), clock)
    with pytest.raises(ArgumentError, match=r"at most 64 states.*got 101"):
        check_process(large)


def test_assert_laws_raises_for_an_empty_list_of_reports() -> None:
    with pytest.raises(ArgumentError, match="so no law was checked"):
        assert_laws([])


def test_assert_laws_message_contains_state_time_and_error() -> None:
    report = LawReport("rows sum to one", 0.25, 1e-9, "zt = 3, t = 0.5", "Because.")
    with pytest.raises(AssertionError) as raised:
        assert_laws([report])
    assert (
        '"rows sum to one" is broken: error 0.25, allowed 1e-09, largest at zt = 3, t = 0.5'
        in str(raised.value)
    )


def test_conformance_check_fails_if_the_process_raises() -> None:
    class Raising(type(EVERY["kimura"])):  # type: ignore[misc]
        def rates(self, t: torch.Tensor) -> None:
            raise RuntimeError("no rates today")

    twin: ForwardProcess = Raising.__new__(Raising)
    twin.__dict__.update(vars(EVERY["kimura"]))
    report = next(one for one in check_process(twin) if one.law == "rates: rows sum to zero")
    assert not report.passed
    assert "RuntimeError: no rates today" in report.where
