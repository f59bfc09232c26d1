"""Exact likelihood of short texts under a masked model: `run.chain_rule`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ddiff.data.packing import batch_rows, pack_texts
from ddiff.data.symbol_rows import fill_rows
from ddiff.data.text import check_text
from ddiff.data.tokenizer import Tokenizer
from ddiff.errors import ArgumentError
from ddiff.evaluation.chain_rule import LONGEST, ChainRule, chain_rule_nll
from ddiff.nn.network import as_network
from ddiff.runs.build import Model
from ddiff.runs.conditioning import SampleConditions


def score_chain_rule(
    model: Model, tokenizer: Tokenizer, texts: Sequence[str], length: int
) -> ChainRule:
    """Compute the exact likelihood of texts, and the expectation of their bounds.

    Args:
        model: denoiser with its process.
        tokenizer: tokenizer of the run. End marks count, as in every evaluation.
        texts: texts of at most `LONGEST` tokens.
        length: length of a row.

    Raises ArgumentError for longer texts, for a model that needs conditions, and for models whose
    likelihood `chain_rule_nll` cannot compute.
    """
    if isinstance(texts, str | bytes) or not texts:
        raise ArgumentError(
            f"run.chain_rule: texts must be a list of one or more str; got {texts!r}. For one "
            "text, pass [text]."
        )
    if model.process is None:
        raise ArgumentError(
            "run.chain_rule: the likelihood of this model is exact already, since it has no "
            "diffusion process. Use run.nelbo(texts)."
        )
    # raises if the denoiser needs conditions
    SampleConditions.parse(model.denoiser, {}, len(texts))
    model.objective.module.eval()
    network = as_network(model.denoiser, model.process)
    nll = []
    bound = []
    for number, text in enumerate(texts):
        check_text(text, f"run.chain_rule: text {number}")
        rows = pack_texts(fill_rows([text], tokenizer, length), tokenizer, length)
        batch = batch_rows(rows, [0])
        size = int(batch.valid.sum())
        if len(rows) > 1 or size > LONGEST:
            raise ArgumentError(
                f"run.chain_rule: text {number} has {rows.tokens.num_tokens} tokens, end mark "
                f"included; at most {min(LONGEST, length)} are possible, since the network is "
                "evaluated at every set of them. Give shorter texts."
            )
        found = chain_rule_nll(network, model.process, batch.ids[:, :size].to(model.device))
        nll.append(found.nll)
        bound.append(found.bound)
    return ChainRule(torch.cat(nll), torch.cat(bound))
