"""The conformance kit: laws that processes, samplers, heads and other components must obey.

    from ddiff.testing import assert_laws, check_process

    def test_my_process_obeys_every_law():
        assert_laws(check_process(MyProcess(...)))      # a small instance, at most 64 states

A law is a property that the kit tests. In code, a law is a callable object with a `name` and a
`tolerance`. Its docstring states the property and the reason for the tolerance. For example,
`chain.chapman_kolmogorov(process)` returns one `LawReport`. Laws compute in float64 by enumeration
and quadrature, and give the same result at every call.
"""

from ddiff.testing.clean_distribution import check_clean_distribution
from ddiff.testing.clock import check_clock
from ddiff.testing.dataset import check_dataset
from ddiff.testing.denoiser import check_denoiser
from ddiff.testing.encoder import check_encoder
from ddiff.testing.gaussian import check_gaussian
from ddiff.testing.head import check_head
from ddiff.testing.joint import check_path
from ddiff.testing.judge import check_judge
from ddiff.testing.normalizer import check_normalizer
from ddiff.testing.process import check_process
from ddiff.testing.report import Law, LawReport, assert_laws
from ddiff.testing.sampler import check_sampler
from ddiff.testing.schedule import check_schedule
from ddiff.testing.time_rule import check_time_rule
from ddiff.testing.tokenizer import check_tokenizer
from ddiff.testing.vector_sampler import check_vector_sampler
from ddiff.testing.vocabulary import check_vocabulary

__all__ = [
    "Law",
    "LawReport",
    "assert_laws",
    "check_clean_distribution",
    "check_clock",
    "check_dataset",
    "check_denoiser",
    "check_encoder",
    "check_gaussian",
    "check_head",
    "check_judge",
    "check_normalizer",
    "check_path",
    "check_process",
    "check_sampler",
    "check_schedule",
    "check_time_rule",
    "check_tokenizer",
    "check_vector_sampler",
    "check_vocabulary",
]
