"""The denoiser: a backbone that makes hidden states, a head that reads them as laws, and how the engine asks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from ddiff.core.law import CleanLaw, DenseLaw, drop_own_evidence
from ddiff.core.times import Noisy
from ddiff.errors import ArgumentError
from ddiff.nn.heads import Head, Question

if TYPE_CHECKING:
    from ddiff.core.process import ForwardProcess

Given = Literal["rest", "all"]


class Context(NamedTuple):
    """What a backbone knows beside ids and times.

    valid [B,L] bool, False at padding (None: no padding); document [B,L] long, which document each position belongs to
    (None: nothing is packed); conditions by name. None rather than a tensor of ones lets attention go without a mask.
    """

    valid: Tensor | None = None
    document: Tensor | None = None
    conditions: Mapping[str, Tensor] = {}

    def attention_mask(self) -> Tensor | None:
        """[B,1,L,L] bool, who may look at whom: valid positions of one's own document; None when everybody at all.

        A position always sees itself, so that no row of the softmax is empty.
        """
        if self.valid is None and self.document is None:
            return None
        visible: Tensor | bool = True
        if self.document is not None:
            visible = self.document.unsqueeze(-1) == self.document.unsqueeze(-2)
        if self.valid is not None:
            visible = self.valid.unsqueeze(-2) & visible
        assert isinstance(visible, Tensor)
        return (visible | torch.eye(visible.shape[-1], dtype=torch.bool, device=visible.device)).unsqueeze(1)


UNPADDED = Context()


class Backbone(Protocol):
    """An nn.Module from noisy ids [B,L] and their times t [B,L] to hidden states [B,L,width]."""

    width: int

    def __call__(self, ids: Tensor, t: Tensor, context: Context) -> Tensor: ...


class Denoiser(nn.Module):
    """backbone + head. `given` says what its law conditions on: "rest" (own evidence excluded) or "all" (plain
    cross-entropy at visible rows), in which case every question goes through `rest_law`.
    """

    forward_methods = ("trunk", "read", "visit")  # what a sharding backend must register besides forward

    def __init__(self, backbone: nn.Module, head: Head, given: Given = "rest") -> None:
        super().__init__()
        if given not in get_args(Given):
            raise ArgumentError(f'Denoiser: given must be "rest" or "all"; got {given!r}.')
        if backbone.width != head.width:
            raise ArgumentError(
                f"Denoiser: head must be as wide as backbone; got {head.width} for a backbone of {backbone.width}."
            )
        self.backbone = backbone
        self.head = head
        self.given = given

    def trunk(self, zt: Tensor, t: Tensor, context: Context) -> Tensor:
        """Hidden states [B*L, width] of flat positions."""
        return self.backbone(zt, t, context).flatten(0, 1)

    def read(self, hidden: Tensor, node: Tensor, fn: Question) -> Tensor | tuple[Tensor, ...]:
        """fn's results for hidden rows [k,width] that ask below node [k]; no gradients."""
        return self.head.visit(hidden, node, fn)

    def forward(
        self, zt: Tensor, t: Tensor, context: Context, rows: Tensor, node: Tensor, fn: Question
    ) -> tuple[Tensor, ...]:
        """One training step's pass: (sum of fn's first result over flat positions `rows` [k], *results detached)."""
        return self.head.total(self.trunk(zt, t, context).index_select(0, rows), node, fn)

    @torch.no_grad()
    def visit(
        self, zt: Tensor, t: Tensor, context: Context, rows: Tensor, node: Tensor, fn: Question
    ) -> Tensor | tuple[Tensor, ...]:
        """fn's results for flat positions `rows` [k] that ask below node [k], in row order; no gradients."""
        return self.read(self.trunk(zt, t, context).index_select(0, rows), node, fn)


class Asking:
    """`ask` over a network: each ask(noisy) gives a visit that runs the network at its first call and never again.

    `calls` counts runs of the network (NFE). Dropout is whatever mode the denoiser is in: call `.eval()` first.
    """

    def __init__(self, denoiser: Denoiser, process: ForwardProcess, context: Context = UNPADDED) -> None:
        self.denoiser = denoiser
        self.process = process
        self.context = context
        self.calls = 0

    def __call__(self, noisy: Noisy) -> _Visit:
        return _Visit(self, noisy)


class _Visit:
    """One state of the sequences: the network's hidden states, once they are there."""

    def __init__(self, asking: Asking, noisy: Noisy) -> None:
        self.asking, self.zt, self.t = asking, noisy.zt, noisy.t
        self.hidden: Tensor | None = None

    @torch.no_grad()
    def __call__(self, rows: Tensor, node: Tensor, fn: Question) -> Tensor | tuple[Tensor, ...]:
        denoiser, process = self.asking.denoiser, self.asking.process
        if self.hidden is None:
            self.hidden = denoiser.trunk(self.zt, self.t, self.asking.context)
            self.asking.calls += 1
        if denoiser.given == "all":
            fn = rest_law(fn, process, self.zt.flatten()[rows], self.t.flatten()[rows])
            node = torch.full_like(node, process.vocabulary.root)
        return denoiser.read(self.hidden.index_select(0, rows), node, fn)


def asking(denoiser: Denoiser, process: ForwardProcess, context: Context = UNPADDED) -> Asking:
    """ask(noisy) -> visit, for samplers and evaluation."""
    return Asking(denoiser, process, context)


def rest_law(fn: Question, process: ForwardProcess, zt: Tensor, t: Tensor) -> Question:
    """`fn` for a network that gives the full conditional: the same question about p(x) / q_t(zt | x).

    zt, t [k] are those of the asked rows, which must ask at the root: the evidence spans the vocabulary.
    """

    def question(law: CleanLaw, idx: Tensor) -> Tensor | tuple[Tensor, ...]:
        log_p = drop_own_evidence(law.log_mass(0), process.log_likelihood(zt[idx], t[idx]))
        return fn(DenseLaw(log_p, process.vocabulary), idx)

    return question
