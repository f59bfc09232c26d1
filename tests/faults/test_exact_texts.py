"""`run.chain_rule`: the exact likelihood of short texts of a trained run."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from tiny_run import RECIPE

import ddiff as api
from ddiff.core.times import Noisy
from ddiff.nn.network import as_network

# hierarchical vocabulary and head replaced by flat ones
FLAT = RECIPE.replace('kind = "clusters"\nsizes = [8]', 'kind = "flat"')
FLAT = FLAT.replace('[process]\nkind = "hdlm"', '[process]\nkind = "mdlm"')
FLAT = FLAT.replace('head = "levelwise"\n', "")
TIMELESS = FLAT.replace("heads = 2", "heads = 2\ntime = false")


def train(folder: Path, text: str) -> api.Run:
    (folder / "flat.toml").write_text(text.replace('name = "tiny"', 'name = "flat"'))
    run = api.run("flat.toml")
    # after four steps all predictions are alike; larger weights depend on the context
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.denoiser.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return run


def nats_in_order(run: api.Run, ids: torch.Tensor, order: tuple[int, ...]) -> float:
    """Return -ln of the probability that the order reveals `ids` [L], one token at a time."""
    mask = run.vocabulary.mask_id
    zt = torch.full_like(ids, mask)
    is_clean = torch.zeros(len(ids), dtype=torch.bool)
    network = as_network(run.denoiser, run.process)
    nats = 0.0
    for place in order:
        times = torch.where(is_clean, 0.0, 0.5).double()
        # the network keeps its last input, which later steps must not change
        query = network(Noisy(zt=zt.clone()[None], t=times[None], clean=is_clean.clone()[None]))
        row = torch.tensor([place])
        node = torch.tensor([run.process.vocabulary.root])
        log_p = query(row, node, lambda dist, target: dist.log_prob(target), ids[row])
        nats -= float(log_p)
        zt[place] = ids[place]
        is_clean[place] = True
    return nats


def test_chain_rule_of_a_run_equals_the_sum_over_all_orders(folder: Path) -> None:
    """The network works in float32, so both are equal to about 1e-4."""
    run = train(folder, TIMELESS)
    texts = ["cat", "a"]
    found = run.chain_rule(texts)
    assert (found.bound > found.nll).all()
    for number, text in enumerate(texts):
        ids = torch.tensor([*run.tokenizer.encode([text])[0], run.tokenizer.eos_id])
        orders = list(itertools.permutations(range(len(ids))))
        nats = [nats_in_order(run, ids, order) for order in orders]
        exact = -math.log(sum(math.exp(-value) for value in nats) / len(nats))
        assert float(found.nll[number]) == pytest.approx(exact, abs=1e-3)
        assert float(found.bound[number]) == pytest.approx(sum(nats) / len(nats), abs=1e-3)


def test_chain_rule_refuses_networks_with_time_and_long_texts(folder: Path) -> None:
    run = train(folder, FLAT)
    with pytest.raises(api.ArgumentError, match="must not depend on time"):
        run.chain_rule(["cat"])
    with pytest.raises(api.ArgumentError, match=r"text 0 has \d+ tokens, .* at most 8"):
        run.chain_rule(["the old cat sat on the red hat"])
    with pytest.raises(api.ArgumentError, match="texts must be a list"):
        run.chain_rule("cat")
