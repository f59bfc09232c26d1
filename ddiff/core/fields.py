"""Samples of several fields: the joint network, and the bound of a sample along a path.

A field has its own process (tokens or vectors) and its own positions. One network reads the noisy
states of all fields and predicts each clean field. Along a path of times (`ddiff.core.paths`)

    -ln p(x) <= sum over fields of ( closing + diffusion + decoding )

With exact predictions the sum is -ln p(x) on every path, if no field is noisy at its clean end.
Otherwise fields that are decoded at the same tau are decoded separately, although they depend on
each other, and the bound is larger. A short lag between them (`lagged_path`) removes this cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddiff.core.elbo import (
    NelboTerms,
    Network,
    closing_term,
    corrupt,
    decoding_term,
    diffusion_term,
)
from ddiff.core.field import Fields, JointTimes, rng_of_field
from ddiff.core.paths import HeldAt, Leg, Path
from ddiff.core.process import Query
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy

JointNoisy = Mapping[str, Noisy]
"""Noisy states of all fields of a batch, by the name of the field."""

JointNetwork = Callable[[JointNoisy], Mapping[str, Query]]
"""Prepare the evaluation of a joint state. All queries of one joint state share one evaluation."""


def hold(network: JointNetwork, state: JointNoisy, name: str) -> Network:
    """Return the network of one field, with all other fields held at their states in `state`.

    The result is a `Network` of this field, so every sampler and every term of the bound can use
    it.
    """

    def held(noisy: Noisy) -> Query:
        return network({**state, name: noisy})[name]

    return held


def is_same_state(first: JointNoisy, second: JointNoisy) -> bool:
    """Return whether two joint states have equal entries, so that their predictions are equal."""
    if first.keys() != second.keys():
        return False
    return all(_is_same_field(first[name], second[name]) for name in first)


def _is_same_field(first: Noisy, second: Noisy) -> bool:
    for one, other in zip(first, second, strict=True):
        if one is other:
            continue
        # torch.equal is False for tensors of different shapes.
        if one is None or other is None or not torch.equal(one, other):
            return False
    return True


def corrupt_fields(
    fields: Fields,
    x0: Mapping[str, Tensor],
    times: JointTimes,
    scored: Mapping[str, Tensor],
    rng: CounterRng,
    channel: str,
) -> dict[str, Noisy]:
    """Draw the noisy states of all fields at the given times.

    Args:
        x0: clean tokens [B,n] or vectors [B,n,d] by field.
        scored: bool [B,n] by field; other positions stay clean.
        channel: channel of the random generator.
    """
    noisy = {}
    for name, field in fields.items():
        own = rng_of_field(rng, fields, name)
        noisy[name] = corrupt(field.process, x0[name], times[name], scored[name], own, channel)
    return noisy


def joint_nelbo(
    fields: Fields,
    network: JointNetwork,
    x0: Mapping[str, Tensor],
    scored: Mapping[str, Tensor],
    path: Path,
    rng: CounterRng,
    slot: Tensor,
    slots: int | Tensor,
    absent: Mapping[str, Tensor] | None = None,
) -> dict[str, NelboTerms]:
    """Draw one unbiased estimate of the terms of the bound along a path, by field.

    A field that the path holds has terms 0: a clean field is given, and a field at the prior or
    absent is not part of the sample.

    Args:
        x0: clean tokens [B,n] or vectors [B,n,d] by field.
        scored: bool [B,n] by field. Positions that are not scored stay clean and add nothing.
        path: path of all fields.
        slot: [B] stratum of each sample among `slots`.
        slots: number of strata, or one number per sample [B].
        absent: bool [B] by field, samples that lack a field; None: no sample lacks one. A field
            that the path holds at the prior has states from the prior in these samples too.
    """
    scored = dict(scored)
    marked = {}
    for name, missing in (absent or {}).items():
        lacks = missing.unsqueeze(-1)
        if path.legs[name] == "prior":
            # Draws from the prior need no values, and all samples have the same target.
            scored[name] = scored[name] | lacks
        else:
            scored[name] = scored[name] & ~lacks
            marked[name] = missing
    absent = marked
    data = _JointData(fields, x0, scored, absent, path, rng)
    terms = {name: _no_terms(scored[name]) for name in fields}
    for times in path.draws(fields, rng, slot, slots):
        _add_diffusion_terms(terms, data, network, times)
    for name, leg in path.legs.items():
        if isinstance(leg, Leg):
            ends = path.ends(fields, name, rng, slot, slots)
            decoding, closing = _end_terms(data, network, name, *ends)
            terms[name] = terms[name]._replace(decoding=decoding, closing=closing)
    return terms


class _JointData(NamedTuple):
    """Samples whose bound is estimated, and the path; see `joint_nelbo`."""

    fields: Fields
    x0: Mapping[str, Tensor]
    scored: Mapping[str, Tensor]
    absent: Mapping[str, Tensor]
    path: Path
    rng: CounterRng

    def corrupt(self, times: JointTimes, channel: str) -> JointNoisy:
        """Draw the states of all fields; a field that is held noisy has one state in all terms."""
        noisy = corrupt_fields(self.fields, self.x0, times, self.scored, self.rng, channel)
        for name, leg in self.path.legs.items():
            if isinstance(leg, HeldAt):
                process = self.fields[name].process
                own = rng_of_field(self.rng, self.fields, name)
                noisy[name] = corrupt(
                    process, self.x0[name], times[name], self.scored[name], own, "held"
                )
        return mark_absent(noisy, self.absent)


def _add_diffusion_terms(
    terms: dict[str, NelboTerms], data: _JointData, network: JointNetwork, times: JointTimes
) -> None:
    """Add the diffusion terms of one draw of times to those of the fields that move there."""
    state = data.corrupt(times, "diffusion")
    queries = network(state)
    for name, field in data.fields.items():
        if not bool((times[name].speed > 0).any()):
            continue
        diffusion = diffusion_term(
            field.process,
            _constant(queries[name]),
            data.x0[name],
            state[name],
            times[name].speed,
        )
        found = terms[name]
        terms[name] = found._replace(diffusion=found.diffusion + diffusion, noisy=state[name])


def _end_terms(
    data: _JointData,
    network: JointNetwork,
    name: str,
    first: JointTimes,
    last: JointTimes,
) -> tuple[Tensor, Tensor]:
    """Return the decoding term and the closing term [B,n] of one field."""
    process = data.fields[name].process
    x0 = data.x0[name]
    scored = data.scored[name]
    rng = rng_of_field(data.rng, data.fields, name)
    at_first = hold(network, data.corrupt(first, "decoding"), name)
    at_last = hold(network, data.corrupt(last, "closing"), name)
    decoding = decoding_term(process, at_first, x0, first[name], scored, rng)
    closing = closing_term(process, at_last, x0, last[name], scored, rng)
    return decoding, closing


def _constant(query: Query) -> Network:
    """Return a network of one noisy state, whose query is already prepared."""
    return lambda noisy: query


def mark_absent(state: Mapping[str, Noisy], absent: Mapping[str, Tensor]) -> dict[str, Noisy]:
    """Mark the fields that a sample lacks, in addition to those that the path leaves out."""
    marked = dict(state)
    for name, missing in absent.items():
        known = marked[name].absent
        marked[name] = marked[name]._replace(absent=missing if known is None else known | missing)
    return marked


def _no_terms(scored: Tensor) -> NelboTerms:
    zeros = torch.zeros(scored.shape, dtype=torch.float64, device=scored.device)
    nowhere = Noisy(zeros.long(), zeros, torch.zeros_like(scored))
    return NelboTerms(zeros, zeros, zeros, nowhere)


def joint_network_from_functions(
    functions: Mapping[str, Callable[[JointNoisy], Any]],
) -> JointNetwork:
    """Make a `JointNetwork` from one function per field, for toy models and exact predictions.

    Each function maps a joint state to the predictions of all flat positions of its field: a
    function `select(rows)` of the row numbers, which returns a `Prediction` of these rows.
    """

    def network(state: JointNoisy) -> Mapping[str, Query]:
        return {name: _function_query(function, state) for name, function in functions.items()}

    return network


def _function_query(function: Callable[[JointNoisy], Any], state: JointNoisy) -> Query:
    def query(rows: Tensor, node: Tensor, fn: Callable[..., Any], *per_row: Tensor) -> Any:
        return fn(function(state)(rows), *per_row)

    return query
