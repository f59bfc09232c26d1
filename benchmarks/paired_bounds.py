"""Compare the bounds of trained runs on the same validation documents, with equal random numbers.

    python benchmarks/paired_bounds.py runs/long/mdlm_0 runs/long/hdlm_0 runs/long/xi_0

Each run is compared with the first one. The interval of a difference is over documents (95 %), and
that of the ratio of perplexities follows from it. All runs must have the same data and tokenizer.

With `--found`, all runs but the first one are evaluated with the clock that `ddiff clock` found for
them, and only the documents that did not determine its path are compared. `ddiff clock` chose the
best of two or three clocks on the same documents, so that the bounds of these runs are slightly too
small.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from natural_trees import find_clock, score

from ddiff.evaluation.ratio import RatioEstimate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path, help="directory of the run to compare with")
    parser.add_argument("runs", type=Path, nargs="+", help="directories of the other runs")
    parser.add_argument("--found", action="store_true", help="evaluate RUNS with found clocks")
    given = parser.parse_args()
    if given.found:
        for place in given.runs:
            find_clock(place)
    base = score(given.base, clock="recipe" if given.found else None)
    print("| run | nats/token | minus first | 95 % interval | ratio of perplexities |")
    print("| --- | --- | --- | --- | --- |")
    print(f"| {given.base} | {base.mean:.4f} | | | |", flush=True)
    for place in given.runs:
        found = score(place, clock="found" if given.found else None)
        if not np.array_equal(found.tokens, base.tokens):
            raise SystemExit(
                f"{place} and {given.base} have different numbers of tokens in the validation "
                "documents: the runs must have the same data and tokenizer."
            )
        difference = found.mean - base.mean
        total = RatioEstimate.of((found.nats - base.nats)[:, None], base.tokens).total
        assert total is not None  # the validation text has several documents
        low, high = total.around(difference)
        ratio = f"{math.exp(difference):.3f} [{math.exp(low):.3f}, {math.exp(high):.3f}]"
        cells = f"{found.mean:.4f} | {difference:+.4f} | [{low:+.4f}, {high:+.4f}] | {ratio}"
        print(f"| {place} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
