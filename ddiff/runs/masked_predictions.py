"""Check that a masked model predicts the masked tokens of a text better than a constant guess.

A wrong mask id, or logits that are read one position too early or too late, give fluent nonsense
and no error. The check also reads the output of the positions before and after, and tries other
mask tokens, so that its message names the mistake.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddiff.core.prediction import CleanDistribution
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy
from ddiff.data.documents import load_bundled_novels
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import UNPADDED, Denoiser
from ddiff.nn.embedding import StateEmbedding

if TYPE_CHECKING:
    from ddiff.runs.run import Run

SHARE = 0.15  # of the tokens that are masked, as in the training of BERT (arXiv 1810.04805)
LONGEST = 256  # tokens of the text; long enough for context, short enough for large models on a CPU
SHORTEST = 16
SPECIAL_TOKENS = 16  # largest number of other mask tokens that are tried
# An accuracy counts as higher than another one if it exceeds it by 3 standard deviations of the
# share of correct guesses. If guesses are independent, a model without knowledge then passes with a
# probability of about 0.1 %.
DEVIATIONS = 3.0
_PLACES = {-1: "before", 1: "after"}


@dataclass(frozen=True)
class MaskedPredictions:
    """Top-1 accuracies of the predictions of masked tokens.

    Attributes:
        accuracy: share of the masked tokens that are the most likely token of the prediction.
        unigram: accuracy of the best constant guess: the share of the most frequent token among all
            tokens of the text, including the masked ones.
        count: number of masked tokens, over all draws.
        shifted: accuracy if the output of another position is read: -1 is the position before, 1
            the position after.
        masks: accuracy with the embedding of another token as mask, by the text of the token.
        mask_ids: ids of the tokens in `masks`.
        shift: value of [denoiser] shift of the run; None if its backbone has no such key.
    """

    accuracy: float
    unigram: float
    count: int
    shifted: Mapping[int, float] = field(default_factory=dict)
    masks: Mapping[str, float] = field(default_factory=dict)
    mask_ids: Mapping[str, int] = field(default_factory=dict)
    shift: bool | None = None

    @property
    def better_shift(self) -> int | None:
        """Offset, -1 or 1, of an output that predicts clearly better; None if there is none."""
        best = max(self.shifted, key=lambda offset: self.shifted[offset], default=None)
        if best is not None and self._is_better(self.shifted[best], self.accuracy):
            return best
        return None

    @property
    def needed_shift(self) -> bool | None:
        """Other value of [denoiser] shift that reads the better output; None if no value does."""
        if self.better_shift is None or self.shift is None:
            return None
        needed = self.better_shift < 0
        return None if needed == self.shift else needed

    @property
    def better_mask(self) -> str | None:
        """Token that is a clearly better mask; None if there is none."""
        best = max(self.masks, key=lambda token: self.masks[token], default=None)
        if best is not None and self._is_better(self.masks[best], self.accuracy):
            return best
        return None

    @property
    def problem(self) -> str | None:
        """Sentences that explain what is wrong; None if nothing is."""
        shift = self.better_shift
        mask = self.better_mask
        if shift is None and mask is None and self._is_better(self.accuracy, self.unigram):
            return None
        found = (
            f"The model predicts {self.accuracy:.0%} of {self.count} masked tokens; always "
            f"guessing the most frequent token gives {self.unigram:.0%}."
        )
        if shift is not None:
            return (
                f"{found} The output of the position {_PLACES[shift]} the masked token predicts "
                f"{self.shifted[shift]:.0%}: {self._explain_shift()}"
            )
        if mask is not None:
            return (
                f"{found} With the token {mask!r} (id {self.mask_ids[mask]}) as the mask, the "
                f"model predicts {self.masks[mask]:.0%}: the mask id is wrong."
            )
        others = [
            f"{value:.0%} from the output of the position {_PLACES[offset]}"
            for offset, value in self.shifted.items()
        ]
        others += [f"{value:.0%} with {token!r} as mask" for token, value in self.masks.items()]
        return (
            f"{found} No other position or mask is better: {', '.join(others)}. The mask id, the "
            "tokenizer or the weights are wrong, or the text is unlike that of the training."
        )

    def _explain_shift(self) -> str:
        """Return a clause about the key that must be changed, if another position is better."""
        if self.needed_shift is not None:
            return f"the shift is wrong, and must be {str(self.needed_shift).lower()}."
        if self.shift is None:
            return "its logits belong to another position, and its backbone has no key shift."
        return (
            "its logits belong to another position, although the shift is "
            f"{str(self.shift).lower()} already. No value of shift reads this position."
        )

    def _is_better(self, accuracy: float, other: float) -> bool:
        """Return whether an accuracy exceeds another one by more than chance explains."""
        variance = max(other * (1.0 - other), 1.0 / self.count) / self.count
        return accuracy > other + DEVIATIONS * math.sqrt(variance)


@torch.no_grad()
def check_masked_predictions(
    run: Run, text: str | None = None, *, draws: int = 4, seed: int = 0
) -> MaskedPredictions:
    """Mask 15 % of the tokens of a text, and measure how many of them the model predicts.

    The masked positions are drawn without replacement. If the run has a time rule with blocks, a
    block attends to the clean tokens of earlier blocks, as in training.

    Args:
        run: run with a process whose noise is the mask.
        text: text in the language of the training, of which at most 256 tokens are used; None: the
            first paragraphs of *Pride and Prejudice*.
        draws: number of independent draws of the masked positions.
        seed: seed of the draws.

    Raises ArgumentError if the run has no mask, or if the text is too short.
    """
    ids = _encode(run, load_paragraphs() if text is None else text)
    masked = _draw_positions(len(ids), draws, seed)
    noisy, x0 = _mask(run, ids, masked)
    hidden_states = run.denoiser.eval().hidden_states(noisy, UNPADDED)
    rows = masked.flatten().nonzero().squeeze(-1)
    truth = x0.flatten()[rows]
    accuracies = {
        offset: _measure(run.denoiser, hidden_states[rows + offset], truth) for offset in (-1, 0, 1)
    }
    accuracy = accuracies.pop(0)
    counts = torch.bincount(ids)
    found = MaskedPredictions(
        accuracy,
        float(counts.max() / len(ids)),
        len(rows),
        shifted=accuracies,
        shift=run.recipe.denoiser.to_dict().get("shift"),
    )
    candidates = _list_masks(run, has_failed=found.problem is not None)
    masks = {}
    for token, number in candidates.items():
        with _ReplacedMask(run, number):
            states = run.denoiser.hidden_states(noisy, UNPADDED)
        masks[token] = _measure(run.denoiser, states[rows], truth)
    return replace(found, masks=masks, mask_ids=candidates)


def load_paragraphs() -> str:
    """Return the first chapter of *Pride and Prejudice*, the text of the check."""
    documents = load_bundled_novels().train
    for name, text in zip(documents["name"], documents["text"]):
        if name == "pride_and_prejudice 1":
            return text
    raise AssertionError("the bundled novels have no chapter 'pride_and_prejudice 1'")


def _encode(run: Run, text: str) -> Tensor:
    """Return the token ids [n] of the beginning of a text. Raises ArgumentError if it is short."""
    process = run.process
    mask_id = run.vocabulary.mask_id
    if process is None or mask_id is None or float(process.prior.log_prob[mask_id]) < 0.0:
        raise ArgumentError(
            "check_masked_predictions: the process must mask tokens; got "
            f"{process or 'a run without a process'}. Leave out the check of this run."
        )
    ids = torch.tensor(run.tokenizer.encode([text])[0][: min(LONGEST, run.recipe.length)])
    if len(ids) < SHORTEST:
        raise ArgumentError(
            f"check_masked_predictions: the text and the rows of the run must have at least "
            f"{SHORTEST} tokens; got {len(ids)} tokens of the text, and rows of "
            f"{run.recipe.length}. Use a longer text (--check-text FILE), or leave out the check "
            "(--unchecked)."
        )
    return ids


def _draw_positions(length: int, draws: int, seed: int) -> Tensor:
    """Draw which positions are masked, bool [draws,length].

    The first and the last position are never masked, so that every masked position has a position
    before and after it.
    """
    rng = CounterRng(seed, 0, torch.arange(draws), length, purpose="masked predictions")
    order = rng.uniform("position")
    order[:, 0] = 2.0
    order[:, -1] = 2.0
    count = max(1, round(SHARE * length))
    masked = torch.zeros(draws, length, dtype=torch.bool)
    return masked.scatter(1, order.argsort(-1)[:, :count], True)


def _mask(run: Run, ids: Tensor, masked: Tensor) -> tuple[Noisy, Tensor]:
    """Return the masked batch, and its clean tokens [B,L]."""
    mask_id = run.vocabulary.mask_id
    process = run.process
    assert mask_id is not None
    assert process is not None
    x0 = ids.expand(masked.shape)
    zt = torch.where(masked, mask_id, x0)
    clock = process.information_time
    tau = torch.full((len(masked),), SHARE, dtype=torch.float64)
    t = clock.at(tau)[0].unsqueeze(-1).expand(masked.shape).masked_fill(~masked, 0.0)
    device = run.device
    noisy = Noisy(zt.to(device), t.to(device), ~masked.to(device))
    rule = run.objective.times
    block = None if rule is None else rule.at(clock, tau, len(ids)).block
    if block is not None:
        noisy = noisy._replace(block=block.to(device), memory=x0.to(device))
    return noisy, x0


def _measure(denoiser: Denoiser, hidden: Tensor, truth: Tensor) -> float:
    """Return the share of the rows whose most likely token is the true one."""
    node = torch.full((len(hidden),), denoiser.head.vocabulary.root)

    def most_likely(prediction: CleanDistribution, idx: Tensor) -> Tensor:
        return prediction.log_mass(0).argmax(-1)

    found = denoiser.query_head(hidden, node.to(hidden.device), most_likely)
    assert isinstance(found, Tensor)
    return float((found.cpu() == truth.cpu()).double().mean())


def _list_masks(run: Run, *, has_failed: bool) -> dict[str, int]:
    """Return ids of tokens that could be the mask, by the text of the token.

    These are the tokens whose text contains "mask". If the check failed (`has_failed`), they are
    followed by other special tokens.
    """
    if not _embeddings(run):
        return {}
    tokens = run.tokenizer.tokens()
    special: Sequence[int] = run.tokenizer.special_ids
    named = [number for number in special if "mask" in tokens[number].lower()]
    others = [number for number in special if number not in named] if has_failed else []
    mask_id = run.vocabulary.mask_id
    chosen = {}
    for number in (named + others)[:SPECIAL_TOKENS]:
        is_same = all(
            torch.equal(table.weight[number], table.weight[mask_id]) for table in _embeddings(run)
        )
        if not is_same:
            chosen[tokens[number]] = number
    return chosen


def _embeddings(run: Run) -> list[StateEmbedding]:
    modules = run.denoiser.backbone.modules()
    return [module for module in modules if isinstance(module, StateEmbedding)]


class _ReplacedMask:
    """Context manager in which the mask has the embedding of a token."""

    def __init__(self, run: Run, token: int) -> None:
        self._tables = _embeddings(run)
        self._mask_id = run.vocabulary.mask_id
        self._token = token
        self._saved: list[Tensor] = []

    def __enter__(self) -> None:
        for table in self._tables:
            self._saved.append(table.weight[self._mask_id].detach().clone())
            table.weight[self._mask_id] = table.weight[self._token]

    def __exit__(self, *error: object) -> None:
        for table, saved in zip(self._tables, self._saved):
            table.weight[self._mask_id] = saved
