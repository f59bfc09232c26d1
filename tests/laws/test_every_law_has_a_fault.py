"""Every law of `ddiff.testing` detects at least one planted fault."""

from __future__ import annotations

import test_planted_faults_bound
import test_planted_faults_chain
import test_planted_faults_clock_and_schedule
import test_planted_faults_data
import test_planted_faults_derived_formulas
import test_planted_faults_draws
import test_planted_faults_gaussian
import test_planted_faults_information
import test_planted_faults_network
import test_planted_faults_paths
import test_planted_faults_reverse_process
import test_planted_faults_time_rule
import test_planted_faults_vocabulary

from ddiff.testing import (
    bound,
    bound_terms,
    clean_distribution,
    clock,
    dataset,
    denoiser,
    encoder,
    head,
    judge,
    normalizer,
    reverse_process,
    schedule,
    time_rule,
    tokenizer,
    vocabulary,
)
from ddiff.testing.gaussian import GAUSSIAN_LAWS
from ddiff.testing.joint import PATH_LAWS
from ddiff.testing.process import PROCESS_LAWS

MODULES = (
    test_planted_faults_bound,
    test_planted_faults_chain,
    test_planted_faults_clock_and_schedule,
    test_planted_faults_data,
    test_planted_faults_derived_formulas,
    test_planted_faults_draws,
    test_planted_faults_gaussian,
    test_planted_faults_information,
    test_planted_faults_network,
    test_planted_faults_paths,
    test_planted_faults_reverse_process,
    test_planted_faults_time_rule,
    test_planted_faults_vocabulary,
)
LAWS = (
    *PROCESS_LAWS,
    *GAUSSIAN_LAWS,
    *PATH_LAWS,
    *clock.CLOCK_LAWS,
    *schedule.SCHEDULE_LAWS,
    *vocabulary.VOCABULARY_LAWS,
    *time_rule.TIME_RULE_LAWS,
    *clean_distribution.CLEAN_DISTRIBUTION_LAWS,
    *head.HEAD_LAWS,
    *denoiser.DENOISER_LAWS,
    *tokenizer.TOKENIZER_LAWS,
    *dataset.DATASET_LAWS,
    *normalizer.NORMALIZER_LAWS,
    *encoder.ENCODER_LAWS,
    *judge.JUDGE_LAWS,
)
TESTED_ELSEWHERE = {
    bound.speed_equality.name,  # test_planted_faults_bound.py, without a table
    denoiser.evidence_is_dropped.name,  # test_planted_faults_network.py, without a table
    reverse_process.scores_are_decoded.name,  # test_planted_faults_hybrid.py
    bound_terms.terms_have_their_expectations.name,  # tests/faults/test_bound_terms_law.py
}


def test_every_conformance_check_has_a_planted_fault() -> None:
    covered = {fault.law.name for module in MODULES for fault in module.FAULTS}
    assert {law.name for law in LAWS} - covered == TESTED_ELSEWHERE
