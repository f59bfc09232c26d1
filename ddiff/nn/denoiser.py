"""Denoiser: a backbone that computes hidden states, and a head that predicts clean tokens."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ddiff.core.prediction import CleanDistribution
from ddiff.core.times import Noisy
from ddiff.data.condition_forms import Form
from ddiff.errors import ArgumentError
from ddiff.nn.attention import (
    AttentionLayout,
    AttentionMask,
    KeyValueCache,
    PositionFacts,
    build_block_mask,
    build_dense_mask,
    has_flex_kernel,
    prepend_inputs,
)
from ddiff.nn.heads import Head
from ddiff.nn.neighbours import Neighbours, find_neighbours
from ddiff.nn.parameterization import (
    PARAMETERIZATIONS,
    HeadCallback,
    Parameterization,
    ParameterizationName,
)

if TYPE_CHECKING:
    from ddiff.nn.adapters import Adapters

NUM_ROW_COUNTS = 32

Inputs = Literal["own", "previous"]


class Context(NamedTuple):
    """Inputs of a backbone other than ids and times.

    Callers set the first three attributes, the denoiser sets the last two. With a cache, `valid`
    and `document` also include the cached inputs, which come first.

    Attributes:
        valid: [B,L] bool, False at padding. None: no padding.
        document: [B,L] long, the document number of each position. None: sequences are not packed.
        conditions: conditions by name. A condition is a tensor of labels [B] or [B,L] long (-1:
            absent) or of vectors [B,d] or [B,L,d] float (NaN: absent).
        layout: positions and blocks of the inputs. None: one input per position, and no blocks.
        cache: keys and values of earlier inputs. None: no cache.
    """

    valid: Tensor | None = None
    document: Tensor | None = None
    conditions: Mapping[str, Tensor] = {}
    layout: AttentionLayout | None = None
    cache: KeyValueCache | None = None

    def attention_mask(self) -> Tensor | None:
        """Return the attention mask [B or 1,1,L,m+L] bool of L inputs after m cached inputs.

        The result is None if every input attends to every input.
        """
        facts = self._position_facts()
        if facts is None:
            return None
        return build_dense_mask(facts, self.cache.length if self.cache else 0)

    def kernel_mask(self, x: Tensor, head_width: int, num_prefix: int = 0) -> AttentionMask:
        """Return the attention mask in the form that is fastest for hidden states x [B,L,d].

        `head_width` is the number of channels of an attention head. All layers can share the
        result, which is passed to `attend`. The result is a flex attention mask on a GPU for which
        flex attention has a kernel, else the mask of `attention_mask`. With a cache it is also the
        mask of `attention_mask`: L changes between passes, and flex attention would be compiled for
        every L.

        The first `num_prefix` inputs of x are extra inputs before the sequence: all inputs may
        attend to them, and they attend only to each other. They are not cached, and `valid` and the
        layout do not describe them. Raises ArgumentError if they come before packed documents.
        """
        facts = self._position_facts()
        cached = self.cache.length if self.cache else 0
        if num_prefix:
            length = cached + x.shape[1] - num_prefix
            facts = prepend_inputs(facts, num_prefix, length, x.device)
        if facts is None:
            return None
        if self.cache or not has_flex_kernel(x, head_width):
            return build_dense_mask(facts, cached, num_prefix)
        return build_block_mask(facts)

    def neighbours(self, x: Tensor, taps: int, num_prefix: int = 0) -> Neighbours:
        """Return the inputs that convolutions over positions with `taps` taps read.

        x are hidden states [B,L,d]. All convolutions can share the result. The rules are those of
        attention: a tap reads only an input to which its input may attend. The first `num_prefix`
        inputs of x are extra inputs before the sequence. They have no neighbours: they neither read
        nor are read.
        """
        found = find_neighbours(
            self._position_facts(),
            x.shape[1] - num_prefix,
            taps,
            x.dtype,
            cached=self.cache.length if self.cache else 0,
            is_paired=self.layout is not None and self.layout.noisy is not None,
        )
        return found._replace(num_prefix=num_prefix, cache=self.cache)

    def _position_facts(self) -> PositionFacts | None:
        """Return for all inputs the properties that determine attention, cached inputs first.

        The result is None if every input attends to every input.
        """
        block = self._blocks()
        noisy = None
        if self.layout is not None and self.layout.noisy is not None:
            noisy = self.layout.noisy.unsqueeze(0)
        known = [fact for fact in (self.valid, self.document, block) if fact is not None]
        if not known:
            return None
        index = torch.arange(known[0].shape[-1], device=known[0].device).unsqueeze(0)
        return PositionFacts(index, self.valid, self.document, block, noisy)

    def _blocks(self) -> Tensor | None:
        """Return the block numbers [1 or B,m+L] of the m cached and the L new inputs.

        All cached inputs get the number of the first new block, so that all new inputs attend to
        the cached ones. The result is None if there are no blocks, or if there is a cache and the
        new inputs are in one block.
        """
        if self.layout is None:
            return None
        block = self.layout.block
        if self.cache is None:
            return block
        first = block.amin(-1, keepdim=True)
        if bool((block == first).all()):
            return None
        return torch.cat([first.expand(-1, self.cache.length), block], -1)

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Return the position [L] long of each input in its sequence."""
        if self.layout is None:
            return torch.arange(length, device=device)
        return self.layout.position

    def select_sequences(self, sequences: Tensor) -> Context:
        """Return the context restricted to the sequences with the indices `sequences` [b]."""
        return self._replace(
            valid=None if self.valid is None else self.valid[sequences],
            document=None if self.document is None else self.document[sequences],
            conditions={name: value[sequences] for name, value in self.conditions.items()},
        )

    def select_positions(self, positions: Tensor, length: int) -> Context:
        """Return the context restricted to the positions `positions` [n].

        `length` is the number of positions before the restriction. It shows which conditions have a
        value per position.
        """
        conditions = {}
        for name, value in self.conditions.items():
            per_position = _is_per_position(value, length)
            conditions[name] = value[:, positions] if per_position else value
        return self._replace(
            valid=None if self.valid is None else self.valid[:, positions],
            document=None if self.document is None else self.document[:, positions],
            conditions=conditions,
        )


def _is_per_position(value: Tensor, length: int) -> bool:
    """Return whether the condition `value` has one label or vector per position.

    Labels are then [B,L], vectors [B,L,d], with L = `length`.
    """
    dimensions = 3 if value.is_floating_point() else 2
    return value.dim() == dimensions and value.shape[1] == length


UNPADDED = Context()


class Backbone(nn.Module):
    """Base class of backbones: noisy ids [B,L] and times t [B,L] -> hidden states [B,L,width].

    A subclass defines `forward`. It must take its attention mask from `context.kernel_mask` (for
    `attend`) or `context.attention_mask`, and its positions from `context.positions`. Attention
    then respects padding, documents and blocks.
    """

    width: int
    reads_time: bool = True
    """True if the hidden states depend on t; False if they depend on the ids only."""
    caches: bool = False
    """True if keys and values pass through `context.cache`."""
    reads_packed_rows: bool = True
    """False if a row may hold only one document; a run on packed rows is then refused."""
    is_pretrained: bool = False
    """True if the backbone is built with trained weights, to which adapters may be added."""
    library_prefix: str = ""
    """Beginning of the names, in the denoiser, of the modules of another library's model."""
    is_shifted: bool = False
    """True if the hidden state of a position is that of the position before it."""
    condition_dropout: Mapping[str, float] = MappingProxyType({})
    """Conditions by name, with the share of samples from which training withholds each."""
    condition_forms: Mapping[str, Form] = MappingProxyType({})
    """Form of each condition. Values of another form are rejected before the network is run."""

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        raise NotImplementedError

    @property
    def has_pretrained_output(self) -> bool:
        """True if the head starts with the output matrix of a pretrained model."""
        return False

    def pretrained_output(self) -> Tensor | None:
        """Return the output matrix of the pretrained model, with at least V rows.

        None if the head does not start with it.
        """
        return None


class Denoiser(nn.Module):
    """Network that predicts clean tokens: a backbone, then a head on its hidden states.

    Args:
        backbone: maps noisy ids and times to hidden states.
        head: maps hidden states to predictions.
        parameterization: "rest" if the head predicts P(x_i | z without z_i), or "all" if it
            predicts the full conditional P(x_i | z). Cross-entropy at positions that are not
            masked trains the full conditional. A head that defines another parameterization, such
            as the score head, needs "rest".
        inputs: "own" if the input at position i is the state z_i. "previous" makes the denoiser
            autoregressive: the input at position i is the token at i - 1 (the mask at the start of
            a document), and position i attends to no later position. The denoiser then predicts
            P(x_i | x_<i).
    """

    precision: torch.dtype | None = None
    """Dtype of matrix products; None: that of the weights. Distributions are at least float32."""

    adapters: Adapters | None = None
    """Adapters next to frozen weights (`ddiff.nn.adapters`); None: every weight is trained."""

    fixed_shapes = False
    """Pad the rows of a step to one of `NUM_ROW_COUNTS` counts: torch.compile sees few shapes."""

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
                'Denoiser: parameterization must be "rest" or "all"; '
                f"got {parameterization!r}. In a recipe, this is the key `given`."
            )
        if backbone.width != head.width:
            raise ArgumentError(
                "Denoiser: head must be as wide as backbone; "
                f"got {head.width} for a backbone of {backbone.width}."
            )
        if inputs == "previous" and backbone.is_shifted:
            raise ArgumentError(
                'Denoiser: inputs="previous" already shifts the inputs by one position, so that a '
                "backbone that also shifts its outputs would predict from two positions before. "
                "Set shift = false in [denoiser], or use an objective of diffusion."
            )
        if head.parameterization is not None and parameterization != "rest":
            raise ArgumentError(
                f'Denoiser: parameterization="{parameterization}" applies to a distribution, and '
                f"the head {type(head).__name__} defines another parameterization. Leave out the "
                "argument (in a recipe, the key `given`), or use a head that predicts a "
                "distribution."
            )
        self.backbone = backbone
        self.head = head
        self.parameterization: Parameterization = (
            head.parameterization or PARAMETERIZATIONS[parameterization]
        )
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
        """Run the backbone, and return the hidden states [B*L,width] of all positions."""
        with self._autocast(noisy.zt.device):
            if self.inputs == "previous":
                return self._autoregressive_states(noisy, context)
            if noisy.block is None:
                return self.backbone(noisy.zt, noisy.t, context).flatten(0, 1)
            if noisy.memory is None:
                position = torch.arange(noisy.zt.shape[1], device=noisy.zt.device)
                context = context._replace(layout=AttentionLayout(position, noisy.block))
                return self.backbone(noisy.zt, noisy.t, context).flatten(0, 1)
            return self._paired_states(noisy, context, noisy.block, noisy.memory)

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.precision, enabled=self.precision is not None)

    def _paired_states(
        self, noisy: Noisy, context: Context, block: Tensor, memory: Tensor
    ) -> Tensor:
        """Run the backbone on clean and noisy tokens side by side.

        The input of the backbone is `memory` [B,L], the clean tokens, followed by the noisy
        sequence. `block` [1 or B,L] are the block numbers of both halves. Returns the hidden states
        [B*L,width] of the noisy half.
        """
        length = noisy.zt.shape[1]
        position = torch.arange(length, device=noisy.zt.device)
        twice = torch.cat([position, position])
        is_noisy = torch.arange(2 * length, device=position.device) >= length
        layout = AttentionLayout(twice, torch.cat([block, block], -1), is_noisy)
        context = context.select_positions(twice, length)._replace(layout=layout)
        ids = torch.cat([memory, noisy.zt], 1)
        t = torch.cat([torch.zeros_like(noisy.t), noisy.t], 1)
        return self.backbone(ids, t, context)[:, length:].flatten(0, 1)

    def _autoregressive_states(self, noisy: Noisy, context: Context) -> Tensor:
        """Run the backbone with the previous token as input at each position.

        Every position is a separate block, so that it attends to itself and to earlier positions.
        """
        position = torch.arange(noisy.zt.shape[1], device=noisy.zt.device)
        layout = AttentionLayout(position, position.unsqueeze(0))
        ids = noisy.zt if noisy.memory is None else noisy.memory
        ids = self._shift_right(ids, context.document)
        context = context._replace(layout=layout)
        return self.backbone(ids, torch.zeros_like(noisy.t), context).flatten(0, 1)

    def _shift_right(self, ids: Tensor, document: Tensor | None) -> Tensor:
        """Shift `ids` [B,L] to the right by one position; insert the mask where a document starts.

        `document` [B,L] are document numbers, or None if every sequence is one document.
        """
        start = self.head.vocabulary.root
        before = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)
        if document is None:
            return before
        first = torch.ones_like(document[:, :1], dtype=torch.bool)
        same_document = torch.cat([first, document[:, 1:] == document[:, :-1]], 1)
        return torch.where(same_document, before, start)

    @torch.no_grad()
    def extend_cache(
        self, noisy: Noisy, context: Context, cache: KeyValueCache
    ) -> tuple[Tensor, Tensor]:
        """Run the backbone on the first block that is not clean, with a cache of earlier blocks.

        The block numbers must rise from left to right and be the same in all sequences. Earlier
        positions that are not in `cache` yet are run too, and then cached. Later blocks are not
        run. Returns two tensors for the n positions of the block:

        - hidden states [B,n,width], equal to those of `hidden_states`,
        - positions [n].

        Raises ArgumentError if there are no blocks, or if sequences have different blocks.
        """
        block = _shared_blocks(noisy)
        is_open = (~noisy.clean).any(0)
        # If all positions are clean, the last block takes the role of the first unclean block.
        first_open = int(is_open.int().argmax()) if bool(is_open.any()) else len(block) - 1
        start = int((block < block[first_open]).sum())
        stop = int((block <= block[first_open]).sum())
        ids = noisy.zt
        t = noisy.t
        cache_block = block
        num_final = start
        if self.inputs == "previous":
            # The input of the first unclean position is the clean token before it, so it is final.
            ids = self._shift_right(noisy.zt, context.document)
            t = torch.zeros_like(t)
            num_final = first_open + 1
            cache_block = torch.arange(len(block), device=block.device)
        length = cache.crop(ids, cache_block, num_final)
        new = torch.arange(length, stop, device=block.device)
        up_to_stop = torch.arange(stop, device=block.device)
        if len(new):
            cache.begin_update(num_final - length)
            # valid and document cover the cached positions, conditions only the new ones.
            new_context = context.select_positions(up_to_stop, len(block))._replace(
                conditions=context.select_positions(new, len(block)).conditions,
                layout=AttentionLayout(new, cache_block[new].unsqueeze(0)),
                cache=cache,
            )
            with self._autocast(block.device):
                computed = self.backbone(ids[:, new], t[:, new], new_context)
            hidden = cache.finish_update(ids[:, :stop], cache_block[:stop], computed)
        else:
            assert cache.hidden is not None
            hidden = cache.hidden
        return hidden[:, start:stop], up_to_stop[start:]

    def query_head(
        self, hidden: Tensor, node: Tensor, fn: HeadCallback
    ) -> Tensor | tuple[Tensor, ...]:
        """Run the head on hidden states [k,width], and return the results of `fn` for all rows.

        `node` [k] is the query node of each row, the node of the tree below which the row needs the
        predicted distribution. `fn` is called as fn(prediction, idx) for chunks of the rows (see
        `HeadCallback`). No gradients are computed.
        """
        with self._autocast(hidden.device):
            return self.head.query(hidden, node, fn)

    def forward(
        self, noisy: Noisy, context: Context, rows: Tensor, node: Tensor, fn: HeadCallback
    ) -> tuple[Tensor, ...]:
        """Run backbone and head, and evaluate a function of the prediction, with gradients.

        Args:
            rows: [k] flat positions b * L + i at which the prediction is needed.
            node: [k] query nodes. The query node of a row is the node of the tree below which the
                row needs the predicted distribution.
            fn: called as fn(prediction, idx) for chunks of the rows (see `HeadCallback`).

        Returns a tuple: first the sum of the first result of `fn` over all rows, with gradients;
        then every result of `fn` for all rows, without gradients.
        """
        count = len(rows)
        if self.fixed_shapes and count:
            rows, node, fn = _pad_rows(rows, node, fn, noisy.zt.numel())
        hidden = self.hidden_states(noisy, context).index_select(0, rows)
        with self._autocast(hidden.device):
            total, *results = self.head.total(hidden, node, fn)
        return total, *(result[:count] for result in results)

    @torch.no_grad()
    def query(
        self, noisy: Noisy, context: Context, rows: Tensor, node: Tensor, fn: HeadCallback
    ) -> Tensor | tuple[Tensor, ...]:
        """Run backbone and head, and return the results of `fn` for all rows, without gradients.

        `rows` [k] are indices of positions in the flattened batch, `node` [k] their query nodes,
        and `fn` a callback that gets the predictions, as in `forward`.
        """
        hidden = self.hidden_states(noisy, context).index_select(0, rows)
        return self.query_head(hidden, node, fn)


def _pad_rows(
    rows: Tensor, node: Tensor, fn: HeadCallback, positions: int
) -> tuple[Tensor, Tensor, HeadCallback]:
    """Pad rows by repeating the last row, so that few different numbers of rows occur.

    The new number of rows is a multiple of `positions` / NUM_ROW_COUNTS, where `positions` is B*L.
    Returns the padded `rows`, their query nodes, and a callback that replaces `fn` and returns 0
    as first result for the padding.
    """
    count = len(rows)
    missing = -count % max(1, positions // NUM_ROW_COUNTS)

    def ignore_padding(dist: CleanDistribution, idx: Tensor) -> tuple[Tensor, ...]:
        prediction = fn(dist, idx.clamp(max=count - 1))
        first, *others = prediction if isinstance(prediction, tuple) else (prediction,)
        return torch.where(idx < count, first, 0.0), *others

    padded = torch.arange(count + missing, device=rows.device).clamp(max=count - 1)
    return rows[padded], node[padded.to(node.device)], ignore_padding


def _shared_blocks(noisy: Noisy) -> Tensor:
    """Return the block numbers [L] that all sequences share.

    Raises ArgumentError if `noisy` has no block numbers, if sequences have different block numbers,
    if block numbers fall from left to right, or if `noisy` has a memory (the clean sequence).
    """
    block = noisy.block
    if block is None:
        got = "none"
    elif noisy.memory is not None:
        got = "a memory in addition to it"
    elif bool((block != block[:1]).any() or (block.diff(dim=-1) < 0).any()):
        got = f"{block.tolist()}"
    else:
        return block[0]
    raise ArgumentError(
        "Denoiser.extend_cache: noisy.block must number the blocks of the sequence from left to "
        f"right, the same in all sequences, without a memory; got {got}. "
        "Without cached=True any block numbers are allowed."
    )


def resolve_precision(precision: str, device: str) -> torch.dtype | None:
    """Return the dtype of matrix products, or None for the dtype of the weights.

    Args:
        precision: "bfloat16", "float32", "auto" for bfloat16 on GPUs, or "native" for bfloat16 on
            GPUs and on CPUs with bfloat16 units.
        device: name of a torch device, or "auto" for CUDA if available and otherwise the CPU.
    """
    if precision == "bfloat16":
        return torch.bfloat16
    on_gpu = device.startswith("cuda")
    if device == "auto":
        on_gpu = torch.cuda.is_available()
    if on_gpu and precision in ("auto", "native"):
        return torch.bfloat16
    if precision == "native" and has_bfloat16_units():
        return torch.bfloat16
    return None


def count_parameters(module: nn.Module | None, *, only_trained: bool = False) -> int:
    """Return the number of (trained) parameters, or 0 if the module is not known."""
    if module is None:
        return 0
    return sum(
        parameter.numel()
        for parameter in module.parameters()
        if parameter.requires_grad or not only_trained
    )


def has_bfloat16_units() -> bool:
    """Return whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX).

    Other CPUs emulate bfloat16, and a matrix product takes longer than in float32.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
