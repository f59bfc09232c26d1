"""Coverage of confidence intervals for processes whose noise is concentrated near t = 0 or t = 1.

If noise times were uniform in t, a few draws would contribute most of the bound. Most evaluations
would then underestimate the bound, and 10 to 70 % of the intervals would lie below the true value.
Noise times that are uniform in information time remove this heavy tail.
"""

from __future__ import annotations

import numpy as np
import pytest
from coverage import repeated, zipf
from ddiff_gidd.process import GeneralizedInterpolation
from ddiff_hdlm.process import HierarchicalDiffusion
from ddiff_mdlm.process import MaskedDiffusion

from ddiff.core.information import IdentityTime
from ddiff.core.process import ForwardProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.testing.information import tail_variance_share, variance_has_no_tail

TOKENS = 64
RUNS = 60
DEFAULT = (1e-3, 1.0 - 1e-3)
WHOLE = (0.0, 1.0)
FLAT = FlatVocabulary(TOKENS)
TREE = HierarchicalVocabulary([[token % 8 for token in range(TOKENS)]])


def mdlm(tokens: FlatVocabulary = FLAT, **settings: object) -> ForwardProcess:
    return MaskedDiffusion.build(MaskedDiffusion.Config(**settings), vocabulary=tokens)


def hdlm(**settings: object) -> ForwardProcess:
    return HierarchicalDiffusion.build(HierarchicalDiffusion.Config(**settings), vocabulary=TREE)


def gidd(tokens: FlatVocabulary = FLAT, **settings: object) -> ForwardProcess:
    return GeneralizedInterpolation.build(
        GeneralizedInterpolation.Config(**settings), vocabulary=tokens
    )


CASES = [
    (mdlm(), DEFAULT),
    (mdlm(schedule="power", power=0.3), DEFAULT),
    (hdlm(gamma=0.3), DEFAULT),
    (hdlm(gamma=1.0), DEFAULT),
    (gidd(), DEFAULT),
    (gidd(p_uniform=0.5, gamma=0.5), DEFAULT),
    (hdlm(gamma=0.3), WHOLE),
    (gidd(p_uniform=0.5, gamma=0.3), WHOLE),
    (gidd(p_uniform=0.2), WHOLE),
    (mdlm(schedule="power", power=0.3), WHOLE),
]


@pytest.mark.slow
def test_confidence_intervals_have_coverage_near_95_percent() -> None:
    """Of 60 evaluations of each of ten cases, 93 to 97 % of all intervals contain the true value.

    In each case, two more claims are tested:

    - At least 50 of 60 intervals contain the true value. With a coverage of 95 %, fewer do with
      probability 5e-4.
    - The median bound is at most three standard errors of a median, 1.25 sd/sqrt(60) each, below
      the true value. Any of ten medians is lower with probability 1 %.

    The seeds are fixed.
    """
    covered = []
    for number, (process, window) in enumerate(CASES):
        repeats = repeated(process, window, RUNS, zipf(TOKENS), seed=number)
        error = 1.2533 * repeats.bounds.std(ddof=1) / RUNS**0.5
        assert np.median(repeats.bounds) > repeats.truth - 3.0 * error, CASES[number]
        covered.append(float(repeats.covers.mean()))
    assert 0.93 <= np.mean(covered) <= 0.97, covered
    assert min(covered) >= 50 / RUNS, covered


@pytest.mark.parametrize(
    "process",
    [
        mdlm(FlatVocabulary(5), schedule="power", power=0.3),
        gidd(FlatVocabulary(3), p_uniform=0.5, gamma=0.5),
        gidd(FlatVocabulary(3)),
    ],
)
def test_variance_check_rejects_uniform_t_and_accepts_information_time(
    process: ForwardProcess,
) -> None:
    assert variance_has_no_tail(process).passed
    assert (
        float(tail_variance_share(process, IdentityTime(), WHOLE)) > variance_has_no_tail.tolerance
    )


def test_process_with_noise_times_uniform_in_t_fails_the_variance_check() -> None:
    process = gidd(FlatVocabulary(3), p_uniform=0.5, gamma=0.5)
    process.__dict__["information_time"] = IdentityTime()
    report = variance_has_no_tail(process)
    assert not report.passed
    assert "Remedy" in str(report)
