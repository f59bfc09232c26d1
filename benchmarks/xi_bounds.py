"""Compare the exact bound of HDLM with the loss in the code of its paper, for xi < 1.

    python benchmarks/xi_bounds.py    # write the table in plugins/ddiff_hdlm/README.md, one minute

xi is the probability that the forward process moves a token to its true cluster, instead of a wrong
cluster. The code of arXiv 2510.08632 approximates the bound if xi < 1.

The data are sequences of two tokens with a known joint distribution. There are four tokens in three
clusters. Expectations over states and times are sums in float64, without random draws. The bound
and the approximation have the same noise, times, weights, prior term and decoding term. They
differ only in the divergence between the true and the predicted reverse transition.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddiff import CleanDistribution, HierarchicalVocabulary, LogTimeClock, TreeProcess
from ddiff.testing.bound import (
    WHOLE,
    Table,
    constant_table,
    exact_nelbo,
    random_joint,
    rest_conditional_table,
)

GAMMAS = (0.5, 1.0, 2.0)
XIS = (1.0, 0.95, 0.9, 0.8, 0.6)
TREE = HierarchicalVocabulary([[0, 0, 1, 2]])
LOG_JOINT = random_joint(TREE.num_tokens)
# Error of a bound in nats: at gamma = 0.5, a millionth of the tokens is still clean at the last
# evaluated time, 1 - 1e-12.
TOLERANCE = 1e-5
README = Path(__file__).parents[1] / "plugins" / "ddiff_hdlm" / "README.md"
BEGIN, END = "<!-- benchmarks/xi_bounds.py -->\n", "<!-- end -->\n"


class Published(TreeProcess):
    """Tree process with the approximate divergence of HDLM's code (option `simplified`).

    xi is the probability that the forward process moves a token to its true cluster. Let n be the
    number of clusters, P_c the predicted probability of the true cluster c, p(x) the
    predicted probability of the true token x, and rho = xi P_c + (1 - xi)(1 - P_c)/(n - 1) the
    predicted probability that the forward process moves the token to c. The divergence of the code
    (arXiv 2510.08632) is

    - at masks: -xi ln(rho / xi), which is one term of the exact divergence;
    - at the true cluster: -ln(xi p(x) / rho), which is exact;
    - at any other cluster: -ln p(x), which lacks the normalizer.
    """

    def divergence(self, dist: CleanDistribution, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        vocabulary, xi, others = (
            self.vocabulary,
            self.parents.xi[0],
            self.vocabulary.level_sizes[1] - 1,
        )
        right = vocabulary.ancestor(x0, 1)
        mass = dist.log_prob(right).exp()
        log_rho = (xi * mass + (1.0 - xi) * (1.0 - mass) / others).log()
        word = -dist.log_prob(x0)
        at_masks = xi * (torch.full_like(word, xi).log() - log_rho)
        at_clusters = word + torch.where(
            zt == right, log_rho - torch.full_like(word, xi).log(), 0.0
        )
        return torch.where(zt == vocabulary.root, at_masks, at_clusters)


class Row(NamedTuple):
    """Exact bound and the approximation that HDLM's code computes, for one prediction.

    Both values are the mean nats of a sequence of two tokens.
    """

    gamma: float
    xi: float
    prediction: str
    exact: float
    published: float


def process_of(kind: type[TreeProcess], gamma: float, xi: float) -> TreeProcess:
    return kind(TREE, LogTimeClock((gamma, 1.0)), xi)


def predictions_of(process: TreeProcess) -> dict[str, Table]:
    """Return fixed predictions that are evaluated in place of a network, by name.

    The names are columns of the table; plugins/ddiff_hdlm/README.md describes the predictions.
    """
    true, bend = (
        rest_conditional_table(process, LOG_JOINT),
        torch.tensor([1.0, -0.5, 0.5, -1.0], dtype=torch.float64),
    )
    return {
        "exact": true,
        "bent": lambda zt, t: (true(zt, t) + bend).log_softmax(-1),
        "constant": constant_table(unigram_log_probs()),
        "flattering": lambda zt, t: flattering(process, true(zt, t), zt),
    }


def flattering(process: TreeProcess, log_p: Tensor, zt: Tensor) -> Tensor:
    """Return the log-probabilities [B,L,V] that minimize the loss in HDLM's code (`Published`).

    `log_p` [B,L,V] is the exact log-distribution of x given the rest of the sequence, and `zt` are
    the noisy states. Let n be the number of clusters, and b = (1 - xi)/(n - 1) the probability of a
    move to a given wrong cluster.

    - At masks, let p_k be the exact probability of cluster k. The minimizer gives cluster k the
      probability max(mu p_k - b, 0)/(xi - b). The number mu is chosen so that these sum to 1.
    - At cluster k, let A be the exact probability that k is the true cluster. The minimizer gives
      the tokens of k the total probability s, and all other tokens 1 - s. The number s is the
      positive root of (1 - A)(xi - b) s^2 + b s - A b = 0.
    """
    xi, count = process.parents.xi[0], TREE.level_sizes[1]
    if xi == 1.0:
        return log_p
    b = (1.0 - xi) / (count - 1)
    cluster = TREE.ancestor(torch.arange(TREE.num_tokens), 1) - TREE.num_tokens
    member = torch.nn.functional.one_hot(cluster, count).double()  # [V,n]
    p = log_p.exp()
    mass = p @ member

    filled = torch.ones_like(mass, dtype=torch.bool)
    for _ in range(count):
        mu = (xi - b + b * filled.sum(-1, keepdim=True)) / (mass * filled).sum(-1, keepdim=True)
        filled = filled & (mu * mass > b)
    at_masks = p * (torch.where(filled, mu * mass - b, 0.0) / (xi - b) / mass)[..., cluster]

    here = member.T[
        (zt - TREE.num_tokens).clamp(0, count - 1)
    ]  # [B,L,V] tokens below the cluster z_t
    own = (p * here).sum(-1, keepdim=True)
    right = xi * own / (xi * own + b * (1.0 - own))
    bent = (1.0 - right) * (xi - b)
    below = ((b * b + 4.0 * bent * right * b).sqrt() - b) / (2.0 * bent)
    at_clusters = p * torch.where(here > 0, below / own, (1.0 - below) / (1.0 - own))
    return torch.where((zt == TREE.root).unsqueeze(-1), at_masks, at_clusters).log()


def unigram_log_probs() -> Tensor:
    """Return the log-distribution [V] of a token, averaged over both positions of a sequence."""
    return (0.5 * (LOG_JOINT.exp().sum(0) + LOG_JOINT.exp().sum(1))).log()


def entropy() -> float:
    return -mean(LOG_JOINT.reshape(-1))


def unigram_nelbo() -> float:
    """Return E[-ln p(x_1) p(x_2)], the NELBO of a network that always predicts the unigram p."""
    single = unigram_log_probs()
    return -mean((single.unsqueeze(-1) + single).reshape(-1))


def mean(values: Tensor) -> float:
    return float(LOG_JOINT.exp().reshape(-1) @ values)


def rows(gammas: Sequence[float] = GAMMAS, xis: Sequence[float] = XIS) -> list[Row]:
    """Compute one row of the table for each combination of gamma, xi and prediction.

    gamma is the rate at which tokens move to a cluster (`LogTimeClock`). xi is the probability that
    the cluster is the true one. Errors are below 1e-5 nats.
    """
    found = []
    for gamma in gammas:
        for xi in xis:
            exact, published = (process_of(kind, gamma, xi) for kind in (TreeProcess, Published))
            for name, dist in predictions_of(exact).items():
                values = (
                    mean(exact_nelbo(process, dist, 2, WHOLE).total)
                    for process in (exact, published)
                )
                found.append(Row(gamma, xi, name, *values))
    return found


def table(found: Sequence[Row]) -> str:
    """Return a Markdown table with a row per (gamma, xi) and a column per prediction.

    gamma is the rate at which tokens move to a cluster, and xi the probability of a move to the
    true cluster. Each cell is "exact bound / loss in HDLM's code" in nats. A value below the
    entropy of the data is bold, because a valid bound cannot be below the entropy.
    """
    names = list(dict.fromkeys(row.prediction for row in found))
    lines = ["| gamma | xi | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for gamma, xi in dict.fromkeys((row.gamma, row.xi) for row in found):
        cells = [
            f"{shown(row.exact)} / {shown(row.published)}"
            for row in found
            if (row.gamma, row.xi) == (gamma, xi)
        ]
        lines.append(f"| {gamma:g} | {xi:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(nats: float) -> str:
    return f"{nats:.4f}" if nats > entropy() - TOLERANCE else f"**{nats:.4f}**"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=README,
        help="Markdown file with two HTML comments; the table between them is replaced",
    )
    page = parser.parse_args().out
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    made = table(rows())
    page.write_text(before + BEGIN + made + END + rest.partition(END)[2], encoding="utf-8")
    print(
        f"entropy {entropy():.4f}, cross-entropy of single tokens {unigram_nelbo():.4f}\n{made}",
        end="",
    )


if __name__ == "__main__":
    main()
