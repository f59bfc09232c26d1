"""Every law of `ddiff.testing` detects at least one planted fault."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import ddiff.testing
from ddiff.testing import bound, bound_terms, denoiser, sampler, vector_sampler
from ddiff.testing.report import Law

TESTED_ELSEWHERE = {
    bound.speed_equality.name,  # test_planted_faults_bound.py, without a table
    denoiser.evidence_is_dropped.name,  # test_planted_faults_network.py, without a table
    bound_terms.terms_have_their_expectations.name,  # tests/faults/test_bound_terms_law.py
    *(law.name for law in sampler.SAMPLER_LAWS),  # test_samplers.py
    *(law.name for law in vector_sampler.VECTOR_SAMPLER_LAWS),  # test_vector_samplers.py
}


def find_laws() -> set[str]:
    """Return the names of all laws that modules of `ddiff.testing` define."""
    modules = [
        importlib.import_module(f"ddiff.testing.{module.name}")
        for module in pkgutil.iter_modules(ddiff.testing.__path__)
    ]
    return {
        value.name
        for module in modules
        for value in vars(module).values()
        if isinstance(value, Law)
    }


def test_every_conformance_check_has_a_planted_fault() -> None:
    files = sorted(Path(__file__).parent.glob("test_planted_faults_*.py"))
    modules = [importlib.import_module(file.stem) for file in files]
    covered = {fault.law.name for module in modules for fault in getattr(module, "FAULTS", ())}
    assert find_laws() - covered == TESTED_ELSEWHERE
