"""Conformance checks of a judge of samples: its findings and their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ddiff.evaluation.judges import DrawnFields, Finding, Judge
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law


class JudgeCase(NamedTuple):
    """Judge to check, and samples that it can judge."""

    judge: Judge
    drawn: DrawnFields

    def find(self) -> list[Finding]:
        return list(self.judge.judge(self.drawn))


@law("judge: values are finite and inside their intervals", tolerance=0.0)
def values_are_inside(case: JudgeCase) -> Iterator[Gap]:
    """Check that every value is finite, and lies in its 95 % interval if it has one.

    Tolerance 0: the ends of an interval may equal the value.
    """
    for finding in case.find():
        value = torch.tensor(finding.value, dtype=torch.float64)
        is_finite = torch.tensor(float(math.isfinite(finding.value)))
        yield compare(is_finite, 1.0, {"finite": finding.name})
        if finding.interval is not None:
            low, high = finding.interval
            yield compare(value.clamp(low, high), value, {"value": finding.name})


@law("judge: counts are numbers of samples", tolerance=0.0)
def counts_are_samples(case: JudgeCase) -> Iterator[Gap]:
    """Check that a finding counts at least one sample, and that names of findings are different.

    Tolerance 0: counts are integers.
    """
    findings = case.find()
    for finding in findings:
        count = torch.tensor(finding.count, dtype=torch.float64)
        yield compare(count, count.clamp(min=1.0), {"count": finding.name})
    names = {finding.name for finding in findings}
    yield compare(torch.tensor(len(names)), float(len(findings)), {"different names": ""})


@law("judge: judging twice gives the same findings", tolerance=0.0)
def judging_is_repeatable(case: JudgeCase) -> Iterator[Gap]:
    """Check that a judge finds the same values on the same samples.

    Tolerance 0: the values must be equal.
    """
    second = {finding.name: finding.value for finding in case.find()}
    for finding in case.find():
        value = torch.tensor(second.get(finding.name, math.nan), dtype=torch.float64)
        yield compare(value, finding.value, {"value": finding.name})


JUDGE_LAWS: tuple[Law, ...] = (values_are_inside, counts_are_samples, judging_is_repeatable)


def check_judge(judge: Judge, drawn: DrawnFields) -> list[LawReport]:
    """Apply every conformance check of judges. `drawn` are samples that the judge can judge."""
    return evaluate_laws(JudgeCase(judge, drawn), JUDGE_LAWS)
