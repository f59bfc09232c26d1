"""The denoiser: a backbone that makes hidden states, a head that reads them as laws, and how the engine asks it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, final, get_args

import torch
from torch import Tensor, nn

from ddiff.core.network import CountingNetwork, Predicts
from ddiff.core.prediction import (
    CleanDistribution,
    DenseDistribution,
    Prediction,
    drop_own_evidence,
)
from ddiff.core.times import Noisy
from ddiff.data.condition_forms import Form
from ddiff.errors import ArgumentError
from ddiff.nn.attention import (
    AttentionLayout,
    AttentionMask,
    KeyValueCache,
    PositionFacts,
    block_mask,
    dense_mask,
    flexes,
)
from ddiff.nn.heads import Head, HeadCallback

if TYPE_CHECKING:
    from ddiff.core.process import ForwardProcess, RowFunction

NUM_ROW_COUNTS = 32

ParameterizationName = Literal["rest", "all"]
Inputs = Literal["own", "previous"]


class Context(NamedTuple):
    """What a backbone knows beside ids and times.

    valid [B,L] bool, False at padding (None: no padding); document [B,L] long, which document each position belongs to
    (None: nothing is packed). None rather than a tensor of ones lets attention go without a mask. `conditions` by name:
    labels [B] or [B,L] long (-1: absent), vectors [B,d] or [B,L,d] float (NaN: absent). `sight` and `cache` are the
    denoiser's own: which columns the backbone is run on, and what it has kept of earlier ones; valid and document then
    speak of the cached columns too, which come first.
    """

    valid: Tensor | None = None
    document: Tensor | None = None
    conditions: Mapping[str, Tensor] = {}
    layout: AttentionLayout | None = None
    cache: KeyValueCache | None = None

    def attention_mask(self) -> Tensor | None:
        """[B or 1,1,L,m+L] bool, who may look at whom, the m cached columns first; None when everybody at all."""
        columns = self._columns()
        return (
            None if columns is None else dense_mask(columns, self.cache.length if self.cache else 0)
        )

    def kernel_mask(self, x: Tensor, width: int) -> AttentionMask:
        """The same as `attend` takes it, for hidden states x [B,L,d] and heads `width` wide: made once for all layers.

        A GPU is given tiles for flex attention, but beside a cache, where L changes from pass to pass.
        """
        if self.cache or not flexes(x, width):
            return self.attention_mask()
        columns = self._columns()
        return None if columns is None else block_mask(columns)

    def _columns(self) -> PositionFacts | None:
        """What is known of the columns, the cached ones first; None when it hides nothing."""
        block, noisy = self._blocks(), None
        if self.layout is not None and self.layout.noisy is not None:
            noisy = self.layout.noisy.unsqueeze(0)
        known = [fact for fact in (self.valid, self.document, block) if fact is not None]
        if not known:
            return None
        place = torch.arange(known[0].shape[-1], device=known[0].device).unsqueeze(0)
        return PositionFacts(place, self.valid, self.document, block, noisy)

    def _blocks(self) -> Tensor | None:
        """[1 or B,m+L]: cached columns are seen by all the others, as their first block is."""
        if self.layout is None or self.cache is None:
            return None if self.layout is None else self.layout.block
        first = self.layout.block.amin(-1, keepdim=True)
        if bool((self.layout.block == first).all()):
            return None
        return torch.cat([first.expand(-1, self.cache.length), self.layout.block], -1)

    def positions(self, length: int, device: torch.device) -> Tensor:
        """[L] long: where each column stands in its sequence."""
        return torch.arange(length, device=device) if self.layout is None else self.layout.position

    def rows(self, sequences: Tensor) -> Context:
        """The same for some of the sequences [b]."""
        pick = lambda value: None if value is None else value[sequences]  # noqa: E731
        conditions = {name: value[sequences] for name, value in self.conditions.items()}
        return self._replace(
            valid=pick(self.valid), document=pick(self.document), conditions=conditions
        )

    def columns(self, columns: Tensor, length: int) -> Context:
        """The same for some columns [n] of the L of each sequence."""
        pick = lambda value: None if value is None else value[:, columns]  # noqa: E731
        conditions = {
            name: value[:, columns] if _by_position(value, length) else value
            for name, value in self.conditions.items()
        }
        return self._replace(
            valid=pick(self.valid), document=pick(self.document), conditions=conditions
        )


def _by_position(value: Tensor, length: int) -> bool:
    """Whether a condition has a value per position: labels [B,L], vectors [B,L,d]."""
    return value.dim() == (3 if value.is_floating_point() else 2) and value.shape[1] == length


UNPADDED = Context()


class Backbone(nn.Module):
    """Base class of backbones: noisy ids [B,L] and times t [B,L] -> hidden states [B,L,width].

    `forward` passes the mask `context.kernel_mask` to `attend` (or uses `context.attention_mask()`)
    and takes positions from `context.positions`, so that padding, documents and blocks are
    respected.
    """

    width: int
    reads_time: bool = True
    """The hidden states depend on t. False: on the ids only."""
    caches: bool = False
    """Keys and values pass through `context.cache`."""
    condition_dropout: Mapping[str, float] = MappingProxyType({})
    """Conditions by name, with the share of samples from which training withholds each."""
    condition_forms: Mapping[str, Form] = MappingProxyType({})
    """The form of each condition, to refuse values that do not fit before the network is run."""

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        raise NotImplementedError


class Parameterization(Protocol):
    """What a head's output says: how a question about an answer becomes a question to the head."""

    @property
    def predicts(self) -> Predicts: ...

    def prepare(self, process: ForwardProcess, zt: Tensor, t: Tensor) -> Tensor | None:
        """[k] what the question needs to know of rows in states zt [k] at times t [k], found where they were drawn."""

    def wrap_callback(
        self, fn: HeadCallback, process: ForwardProcess, zt: Tensor, t: Tensor, prepared: Any
    ) -> HeadCallback:
        """`fn` as the head can call it; the rows, and what is `prepared` of them, are where the head is."""

    def scope(self, node: Tensor, process: ForwardProcess) -> Tensor:
        """[k] the nodes below which rows must ask that want to ask below `node` [k]."""


@final
class LeaveOneOutParameterization:
    """The law given the rest of the sequence: what the engine's formulas want."""

    predicts: Predicts = "distribution"

    def prepare(self, process: ForwardProcess, zt: Tensor, t: Tensor) -> None:
        return None

    def wrap_callback(
        self, fn: HeadCallback, process: ForwardProcess, zt: Tensor, t: Tensor, prepared: Any
    ) -> HeadCallback:
        return fn

    def scope(self, node: Tensor, process: ForwardProcess) -> Tensor:
        return node


@final
class FullConditionalParameterization:
    """The full conditional P(x_i | z), as plain cross-entropy at visible rows trains it: divided by q_t(z_i | x)."""

    predicts: Predicts = "distribution"

    def prepare(self, process: ForwardProcess, zt: Tensor, t: Tensor) -> None:
        return None

    def wrap_callback(
        self, fn: HeadCallback, process: ForwardProcess, zt: Tensor, t: Tensor, prepared: Any
    ) -> HeadCallback:
        def question(dist: CleanDistribution, idx: Tensor) -> Tensor | tuple[Tensor, ...]:
            log_p = drop_own_evidence(dist.log_mass(0), process.log_likelihood(zt[idx], t[idx]))
            return fn(DenseDistribution(log_p, process.vocabulary), idx)

        return question

    def scope(self, node: Tensor, process: ForwardProcess) -> Tensor:
        return torch.full_like(node, process.vocabulary.root)  # the evidence spans the vocabulary


PARAMETERIZATIONS: Mapping[str, Parameterization] = {
    "rest": LeaveOneOutParameterization(),
    "all": FullConditionalParameterization(),
}


class Denoiser(nn.Module):
    """backbone + head. `given` says what its law conditions on: "rest" (own evidence excluded) or "all" (plain
    cross-entropy at visible rows). A head that says something else brings a `reading` of its own.

    `inputs="previous"` makes it autoregressive: position i is shown the word before it (the mask at the start of a
    document) and sees no later one, so that its law is P(x_i | x_<i) whatever stands in its own place.
    """

    precision: torch.dtype | None = None
    """Of matrix products (None: that of the weights); laws and sums are float32 at least whatever it is."""

    fixed_shapes = False
    """Whether the rows of a step are filled up to one of `NUM_ROW_COUNTS` numbers, so that few shapes reach the head."""

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        parameterization: ParameterizationName = "rest",
        inputs: Inputs = "own",
    ) -> None:
        super().__init__()
        if inputs not in get_args(Inputs):
            raise ArgumentError(f'Denoiser: inputs must be "own" or "previous"; got {inputs!r}.')
        if parameterization not in PARAMETERIZATIONS:
            raise ArgumentError(
                f'Denoiser: parameterization must be "rest" or "all" (the recipe key given); got {parameterization!r}.'
            )
        if backbone.width != head.width:
            raise ArgumentError(
                f"Denoiser: head must be as wide as backbone; got {head.width} for a backbone of {backbone.width}."
            )
        own = head.parameterization
        if own is not None and parameterization != "rest":
            raise ArgumentError(
                f'Denoiser: parameterization="{parameterization}" applies to a distribution, and the head {type(head).__name__} has '
                "a parameterization of its own. Leave it out (in a recipe, the key given), or use a head that predicts a distribution."
            )
        self.backbone = backbone
        self.head = head
        self.parameterization: Parameterization = own or PARAMETERIZATIONS[parameterization]
        self.inputs = inputs

    @property
    def reads_time(self) -> bool:
        return self.backbone.reads_time

    @property
    def caches(self) -> bool:
        return self.backbone.caches

    @property
    def condition_dropout(self) -> Mapping[str, float]:
        return self.backbone.condition_dropout

    @property
    def condition_forms(self) -> Mapping[str, Form]:
        return self.backbone.condition_forms

    def hidden_states(self, noisy: Noisy, context: Context) -> Tensor:
        """Hidden states [B*L, width] of flat positions."""
        with self._products_in(noisy.zt.device):
            return self._hidden_states(noisy, context)

    def _products_in(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.precision, enabled=self.precision is not None)

    def _hidden_states(self, noisy: Noisy, context: Context) -> Tensor:
        if self.inputs == "previous":
            return self._causal(noisy, context)
        if noisy.block is None:
            return self.backbone(noisy.zt, noisy.t, context).flatten(0, 1)
        length, position = (
            noisy.zt.shape[1],
            torch.arange(noisy.zt.shape[1], device=noisy.zt.device),
        )
        if noisy.memory is None:
            context = context._replace(layout=AttentionLayout(position, noisy.block))
            return self.backbone(noisy.zt, noisy.t, context).flatten(0, 1)
        twice = torch.cat([position, position])
        half = torch.arange(2 * length, device=position.device) >= length
        layout = AttentionLayout(twice, torch.cat([noisy.block, noisy.block], -1), half)
        both, t = (
            torch.cat([noisy.memory, noisy.zt], 1),
            torch.cat([torch.zeros_like(noisy.t), noisy.t], 1),
        )
        hidden = self.backbone(both, t, context.columns(twice, length)._replace(layout=layout))
        return hidden[:, length:].flatten(0, 1)

    def _causal(self, noisy: Noisy, context: Context) -> Tensor:
        position = torch.arange(noisy.zt.shape[1], device=noisy.zt.device)
        layout = AttentionLayout(position, position.unsqueeze(0))
        ids = self._previous(noisy.zt if noisy.memory is None else noisy.memory, context.document)
        return self.backbone(
            ids, torch.zeros_like(noisy.t), context._replace(layout=layout)
        ).flatten(0, 1)

    def _previous(self, ids: Tensor, document: Tensor | None) -> Tensor:
        """[B,L] the word before each; the mask where a document starts."""
        start = self.head.vocabulary.root
        before = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)
        if document is None:
            return before
        same = torch.cat(
            [
                torch.ones_like(document[:, :1], dtype=torch.bool),
                document[:, 1:] == document[:, :-1],
            ],
            1,
        )
        return torch.where(same, before, start)

    @torch.no_grad()
    def extend_cache(
        self, noisy: Noisy, context: Context, cache: KeyValueCache
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [B,n,width] of the first block that is not clean everywhere, and its columns [n].

        All sequences share their blocks, in rising order. PositionFacts before that block that the cache lacks are run along
        and kept; later blocks are not run at all. The result is that of `trunk`. ArgumentError when noisy.block is none, or
        differs between sequences.
        """
        block = _shared_block(noisy)
        causal = self.inputs == "previous"
        is_open = (~noisy.clean).any(0)
        first_open = int(is_open.int().argmax()) if bool(is_open.any()) else len(block) - 1
        start, stop = (
            int((block < block[first_open]).sum()),
            int((block <= block[first_open]).sum()),
        )
        ids, t, seen, settled = noisy.zt, noisy.t, block, start
        if causal:  # shown the word before it, the first open column is settled itself
            ids, t, settled = (
                self._previous(noisy.zt, context.document),
                torch.zeros_like(t),
                first_open + 1,
            )
            seen = torch.arange(len(block), device=block.device)
        held = cache.crop(ids, seen, settled)
        columns, until = (
            torch.arange(held, stop, device=block.device),
            torch.arange(stop, device=block.device),
        )
        hidden: Tensor | None = None
        if len(columns):
            cache.begin_update(settled - held)
            shown = context.columns(until, len(block))._replace(
                conditions=context.columns(columns, len(block)).conditions,
                layout=AttentionLayout(columns, seen[columns].unsqueeze(0)),
                cache=cache,
            )
            with self._products_in(block.device):
                computed = self.backbone(ids[:, columns], t[:, columns], shown)
            hidden = cache.finish_update(ids[:, :stop], seen[:stop], computed)
        else:
            hidden = cache.hidden
        assert hidden is not None
        return hidden[:, start:stop], until[start:]

    def read(self, hidden: Tensor, node: Tensor, fn: HeadCallback) -> Tensor | tuple[Tensor, ...]:
        """fn's results for hidden rows [k,width] that ask below node [k]; no gradients."""
        with self._products_in(hidden.device):
            return self.head.query(hidden, node, fn)

    def forward(
        self, noisy: Noisy, context: Context, rows: Tensor, node: Tensor, fn: HeadCallback
    ) -> tuple[Tensor, ...]:
        """One training step's pass: (sum of fn's first result over flat positions `rows` [k], *results detached)."""
        count = len(rows)
        if self.fixed_shapes and count:
            rows, node, fn = _pad_rows(rows, node, fn, noisy.zt.numel())
        hidden = self.hidden_states(noisy, context).index_select(0, rows)
        with self._products_in(hidden.device):
            total, *results = self.head.total(hidden, node, fn)
        return total, *(result[:count] for result in results)

    @torch.no_grad()
    def query(
        self, noisy: Noisy, context: Context, rows: Tensor, node: Tensor, fn: HeadCallback
    ) -> Tensor | tuple[Tensor, ...]:
        """fn's results for flat positions `rows` [k] that ask below node [k], in row order; no gradients."""
        return self.read(self.hidden_states(noisy, context).index_select(0, rows), node, fn)


def _pad_rows(
    rows: Tensor, node: Tensor, fn: HeadCallback, positions: int
) -> tuple[Tensor, Tensor, HeadCallback]:
    """Rows and nodes [k], the last repeated up to a multiple of `positions` / NUM_ROW_COUNTS, and an fn that counts it once."""
    count = len(rows)
    missing = -count % max(1, positions // NUM_ROW_COUNTS)

    def question(dist: CleanDistribution, idx: Tensor) -> tuple[Tensor, ...]:
        prediction = fn(dist, idx.clamp(max=count - 1))
        first, *others = prediction if isinstance(prediction, tuple) else (prediction,)
        return torch.where(idx < count, first, 0.0), *others

    again = torch.arange(count + missing, device=rows.device).clamp(max=count - 1)
    return rows[again], node[again.to(node.device)], question


class DenoiserNetwork(CountingNetwork):
    """`ask` over a network: each ask(noisy) gives a visit that runs the network for the sequences it is asked about.

    No sequence is run twice in a visit, nor again while neither its ids nor, where the backbone reads them, its times
    have changed. `runs` [B] counts runs of each sequence, `calls` those over the batch (NFE). `cached=True` keeps the
    keys and values of settled blocks. `process` may be None where the law is read as it is. Dropout is whatever mode
    the denoiser is in: call `.eval()` first.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        process: ForwardProcess | None = None,
        context: Context = UNPADDED,
        cached: bool = False,
    ) -> None:
        super().__init__()
        if cached and not denoiser.caches:
            raise ArgumentError(
                f"Asking: cached=True needs a backbone that keeps keys and values; {type(denoiser.backbone).__name__} does "
                "not declare `caches = True`. Leave it out: the result is the same, only slower."
            )
        self.denoiser, self.process, self.context = denoiser, process, context
        self.cache = KeyValueCache() if cached else None
        self.predicts = denoiser.parameterization.predicts
        self.last: _Query | None = None

    def __call__(self, noisy: Noisy) -> _Query:
        return _Query(self, noisy)


class _Query:
    """One state of the sequences: the network's hidden states [B*L,width], as far as they have been asked for."""

    def __init__(self, as_network: DenoiserNetwork, noisy: Noisy) -> None:
        self.as_network, self.noisy = as_network, noisy
        self.hidden: Tensor | None = None
        self.known = torch.zeros(len(noisy.zt), dtype=torch.bool, device=noisy.zt.device)
        self.columns: Tensor | None = None  # which are known, where a cache leaves some out

    @torch.no_grad()
    def __call__(self, rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
        def on_chunk(prediction: Prediction, idx: Tensor) -> Any:
            return fn(prediction, *(value[idx] for value in per_row))

        question: HeadCallback = on_chunk
        hidden = self._hidden(rows).index_select(0, rows)
        self._check_within(rows)
        denoiser, process = self.as_network.denoiser, self.as_network.process
        if process is not None:
            parameterization, zt, t = (
                denoiser.parameterization,
                self.noisy.zt.flatten()[rows],
                self.noisy.t.flatten()[rows],
            )
            prepared = parameterization.prepare(process, zt, t)
            question = parameterization.wrap_callback(question, process, zt, t, prepared)
            node = parameterization.scope(node, process)
        return denoiser.read(hidden, node, question)

    def _hidden(self, rows: Tensor) -> Tensor:
        """Hidden states that hold at least those of the asked rows."""
        if self.hidden is None:
            self._reuse_hidden_states(self.as_network.last)
            self.as_network.last = self
        wanted = torch.zeros_like(self.known)
        wanted[rows // self.noisy.zt.shape[1]] = True
        missing = (wanted & ~self.known).nonzero().squeeze(-1)
        if len(missing):
            self._run(missing)
        assert self.hidden is not None
        return self.hidden

    def _reuse_hidden_states(self, last: _Query | None) -> None:
        """What is still true of the visit before."""
        if last is None or last.hidden is None or not _same_sight(last.noisy, self.noisy):
            return
        same = last.known & (last.noisy.zt == self.noisy.zt).all(-1)
        if self.as_network.denoiser.reads_time:
            same &= (last.noisy.t == self.noisy.t).all(-1)
        if (
            last.columns is not None
        ):  # a cached pass is over all sequences, and over the block that is open in any
            same &= same.all() & torch.equal(last.noisy.clean, self.noisy.clean)
        if bool(same.any()):
            self.hidden, self.known, self.columns = last.hidden.clone(), same, last.columns

    def _run(self, sequences: Tensor) -> None:
        as_network, (batch, length) = self.as_network, self.noisy.zt.shape
        columns = torch.arange(length, device=self.known.device)
        if as_network.cache is not None:
            hidden, columns = as_network.denoiser.extend_cache(
                self.noisy, as_network.context, as_network.cache
            )
            sequences, self.columns = torch.arange(batch, device=self.known.device), columns
        else:
            noisy, context = self.noisy, as_network.context
            if len(sequences) < batch:
                noisy, context = _some(noisy, sequences), context.rows(sequences)
            hidden = as_network.denoiser.hidden_states(noisy, context).unflatten(0, noisy.zt.shape)
        as_network._count(batch, sequences.cpu())
        if self.hidden is None:
            self.hidden = hidden.new_zeros(self.noisy.zt.numel(), hidden.shape[-1])
        self.hidden[(sequences.unsqueeze(-1) * length + columns).flatten()] = hidden.flatten(0, 1)
        self.known[sequences] = True

    def _check_within(self, rows: Tensor) -> None:
        if self.columns is None or not len(rows):
            return
        column, first, last = (
            rows % self.noisy.zt.shape[1],
            int(self.columns[0]),
            int(self.columns[-1]),
        )
        if bool(((column < first) | (column > last)).any()):
            raise ArgumentError(
                f"Asking: with cached=True only the first block that is not clean can be asked about, here positions "
                f"{first} to {last}; got positions {sorted(set(column.tolist()))}. Ask without the cache."
            )


def _shared_block(noisy: Noisy) -> Tensor:
    """[L] the blocks, which all sequences must share, in rising order."""
    block = noisy.block
    if (
        block is None
        or noisy.memory is not None
        or bool((block != block[:1]).any() or (block.diff(dim=-1) < 0).any())
    ):
        came = (
            "none"
            if block is None
            else "a memory beside it"
            if noisy.memory is not None
            else f"{block.tolist()}"
        )
        raise ArgumentError(
            "Denoiser.extend_cache: noisy.block must number the blocks of the sequence from left to right, the same in all "
            f"sequences, without a memory; got {came}. Without cached=True any numbers will do."
        )
    return block[0]


def _same_sight(first: Noisy, second: Noisy) -> bool:
    """Whether two visits show sequences of one shape to each other in the same way."""
    if first.zt.shape != second.zt.shape or first.memory is not None or second.memory is not None:
        return False
    if first.block is None or second.block is None:
        return first.block is second.block
    return torch.equal(first.block, second.block)


def _some(noisy: Noisy, sequences: Tensor) -> Noisy:
    pick = lambda value: value if value is None or len(value) == 1 else value[sequences]  # noqa: E731
    zt, t, clean = (value[sequences] for value in noisy[:3])
    memory = None if noisy.memory is None else noisy.memory[sequences]
    return Noisy(zt, t, clean, pick(noisy.block), memory)


def as_network(
    denoiser: Denoiser,
    process: ForwardProcess | None = None,
    context: Context = UNPADDED,
    cached: bool = False,
) -> DenoiserNetwork:
    """ask(noisy) -> visit, for samplers and evaluation."""
    return DenoiserNetwork(denoiser, process, context, cached)
