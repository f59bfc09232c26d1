"""Plain reference implementation of each model family, in the style of paper code.

It uses ddiff's backbone. The output head is evaluated at every position. Tokens are one-hot
vectors, and the distribution of the noisy state z_t is a tensor [B,L,S] over S states. A sampler
draws a state from the whole vocabulary at every position of every step, by an exponential race in
float64. The code is not made slower on purpose: all operations are torch operations on whole
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from models import (
    P_UNIFORM,
    Case,
    backbone_of,
    clusters_of,
    fill_zero_parameters,
    tokens_of,
    vocabulary_of,
)
from torch import Tensor, nn

from ddiff import Context, Denoiser, TokenHead, Vocabulary
from ddiff.core.times import Noisy


class PlainModel(nn.Module):
    """Network of a reference implementation: a backbone, and a linear layer to `outputs` logits."""

    def __init__(self, case: Case, vocabulary: Vocabulary, outputs: int) -> None:
        super().__init__()
        self.backbone = backbone_of(case, vocabulary)
        self.head = nn.Linear(case.size.width, outputs)

    def forward(self, zt: Tensor, t: Tensor) -> Tensor:
        return self.head(self.backbone(zt, t.unsqueeze(-1).expand(zt.shape), Context()))


def stratified(batch: int) -> Tensor:
    """Draw a noise time in (0.001, 1) for each of `batch` sequences, stratified over the batch."""
    return 1e-3 + (1.0 - 1e-3) * (torch.rand(1) + torch.arange(batch) / batch) % 1.0


def gumbel_draw(probs: Tensor) -> Tensor:
    """Draw indices from `probs` (last dimension) as the arg-max of probs / exponential noise.

    The noise is float64, so that rare tokens are drawn with their probability.
    """
    noise = -(torch.rand_like(probs, dtype=torch.float64) + 1e-30).log()
    return (probs / noise).argmax(-1)


def categorical(probs: Tensor) -> Tensor:
    """Draw indices from `probs` (last dimension) by the inverse CDF."""
    cdf = probs.cumsum(-1)
    return (
        (cdf < torch.rand(*probs.shape[:-1], 1) * cdf[..., -1:])
        .sum(-1)
        .clamp(max=probs.shape[-1] - 1)
    )


class Masked:
    """Reference implementation of masked diffusion.

    The loss of a position is -ln p(x) / t, from a log-softmax over all states.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.vocabulary = case, vocabulary_of(case)
        self.mask = self.vocabulary.root
        self.model = PlainModel(case, self.vocabulary, self.vocabulary.num_states)

    def add_noise(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.where(torch.rand(x0.shape) < t.unsqueeze(-1), self.mask, x0), None

    def log_p(self, logits: Tensor, zt: Tensor) -> Tensor:
        logits[..., self.mask] = -1e6
        log_p = logits - logits.logsumexp(-1, keepdim=True)
        seen = zt != self.mask
        log_p[seen] = -1e6
        log_p[seen, zt[seen]] = 0.0
        return log_p

    def loss(self, logits: Tensor, x0: Tensor, zt: Tensor, t: Tensor, q: Tensor | None) -> Tensor:
        """Return the loss of each position [B,L] in nats. The argument `q` is not used."""
        return -self.log_p(logits, zt).gather(-1, x0.unsqueeze(-1)).squeeze(-1) / t.unsqueeze(-1)

    def start(self, shape: tuple[int, int]) -> Tensor:
        return torch.full(shape, self.mask)

    def move(self, logits: Tensor, zt: Tensor, t: float, s: float) -> Tensor:
        probs = self.log_p(logits, zt).exp() * (t - s)
        probs[..., self.mask] = s
        return torch.where(zt == self.mask, gumbel_draw(probs), zt)


class Mixed:
    """Reference implementation of GIDD (arXiv 2503.04482).

    q_t(. | x) for the token x and q_t(. | x_hat) for the predicted distribution x_hat are tensors
    over all states, and the loss contains their KL divergence.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.vocabulary = case, vocabulary_of(case)
        self.mask, self.states = self.vocabulary.root, self.vocabulary.num_states
        self.height = 2.0 * P_UNIFORM / (1.0 - P_UNIFORM)
        self.model = PlainModel(case, self.vocabulary, self.states)

    def marginal(self, p: Tensor, t: Tensor) -> Tensor:
        """Return the distribution of z_t [B,L,S] if the clean token has the distribution p [B,L,S].

        t: noise time [B] of each sequence.
        """
        hump = self.height * (t * (1.0 - t)).sqrt()
        noise = (
            (hump / (1.0 + hump) / (self.states - 1)).unsqueeze(-1).expand(-1, self.states).clone()
        )
        noise[:, self.mask] = t / (1.0 + hump)
        return ((1.0 - t) / (1.0 + hump))[:, None, None] * p + noise.unsqueeze(1)

    def weight(self, zt: Tensor, t: Tensor) -> Tensor:
        """Return the rate [B,L] at which the forward process at time t jumps to the state zt."""
        root, t = (t * (1.0 - t)).sqrt().unsqueeze(-1), t.unsqueeze(-1)
        each = self.height / (2.0 * root * (1.0 + self.height * root) * (self.states - 1))
        return torch.where(zt == self.mask, 1.0 / ((1.0 + self.height * root) * (1.0 - t)), each)

    def x_hat(self, logits: Tensor) -> Tensor:
        logits[..., self.mask] = -1e6
        return logits.softmax(-1)

    def add_noise(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        hump = self.height * (t * (1.0 - t)).sqrt()
        clean, masked = ((part / (1.0 + hump)).unsqueeze(-1) for part in (1.0 - t, t))
        u = torch.rand(x0.shape)
        noise = torch.where(u < clean + masked, self.mask, torch.randint(self.states - 1, x0.shape))
        return torch.where(u < clean, x0, noise), self.marginal(
            F.one_hot(x0, self.states).to(t.dtype), t
        )

    def loss(self, logits: Tensor, x0: Tensor, zt: Tensor, t: Tensor, q: Tensor | None) -> Tensor:
        """Return the loss of each position [B,L] in nats; q [B,L,S] is q_t(. | x0)."""
        assert q is not None
        q_hat = self.marginal(self.x_hat(logits), t)
        kl = F.kl_div(q_hat.log(), q, reduction="none").sum(-1)
        at = zt.unsqueeze(-1)
        here, there = q.gather(-1, at).squeeze(-1), q_hat.gather(-1, at).squeeze(-1)
        ratio = here / there
        return self.weight(zt, t) / here * (kl + ratio - 1.0 - ratio.log())

    def start(self, shape: tuple[int, int]) -> Tensor:
        return torch.full(shape, self.mask)

    def move(self, logits: Tensor, zt: Tensor, t: float, s: float) -> Tensor:
        x_hat, now, then = self.x_hat(logits), torch.full((len(zt),), t), torch.full((len(zt),), s)
        stay = (1.0 - t) / (1.0 - s) * (1.0 + self.height * (s * (1.0 - s)) ** 0.5)
        stay = stay / (1.0 + self.height * (t * (1.0 - t)) ** 0.5) if s < 1.0 else 0.0
        nothing = torch.zeros_like(x_hat[:, :1])
        arrive = self.marginal(nothing, now) - stay * self.marginal(nothing, then)
        at = F.one_hot(zt, self.states)
        joint = self.marginal(x_hat, then) * (
            stay * at + arrive.expand_as(at).gather(-1, zt.unsqueeze(-1))
        )
        return gumbel_draw(joint / joint.sum(-1, keepdim=True))


class Clustered:
    """Reference implementation of hierarchical diffusion (HDLM) with one level of clusters.

    A matrix `members` [tokens, clusters] assigns tokens to clusters. The next state of a
    position has the predicted marginal distribution at time t, restricted to the states one level
    below z_t.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.vocabulary = case, vocabulary_of(case)
        self.tokens, self.clusters = case.size.vocabulary, clusters_of(case.size.vocabulary)
        self.mask = self.vocabulary.root
        self.cluster_of = self.vocabulary.ancestor(torch.arange(self.tokens), 1) - self.tokens
        self.members = F.one_hot(self.cluster_of, self.clusters).float()
        self.model = PlainModel(case, self.vocabulary, self.tokens)

    def marginal(self, p: Tensor, t: Tensor) -> Tensor:
        """Return the distribution of z_t [B,L,S] if the clean token has the distribution p [B,L,V].

        t: noise time [B] of each sequence.
        """
        clean, cluster = (1.0 - t)[:, None, None], (-(1.0 - t) * torch.log1p(-t))[:, None, None]
        mask = (1.0 - clean - cluster).expand(*p.shape[:2], 1)
        return torch.cat([clean * p, cluster * (p @ self.members.to(p)), mask], -1)

    def add_noise(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        q = self.marginal(F.one_hot(x0, self.tokens).to(t.dtype), t)
        return categorical(q), q

    def child_distribution(self, q: Tensor, zt: Tensor) -> Tensor:
        """Restrict the distributions q [B,L,S] to the states one level below zt, and normalize.

        Returns a tensor [B,L,V+n] over V tokens and n clusters.
        """
        at_mask, cluster = (zt == self.mask).unsqueeze(-1), (zt - self.tokens).unsqueeze(-1)
        open_ = torch.cat(
            [self.cluster_of == cluster, at_mask.expand(*zt.shape, self.clusters)], -1
        )
        inside = q[..., : self.mask].masked_fill(~open_, 0.0)
        return inside / inside.sum(-1, keepdim=True).clamp(min=1e-30)

    def loss(self, logits: Tensor, x0: Tensor, zt: Tensor, t: Tensor, q: Tensor | None) -> Tensor:
        """Return the loss of each position [B,L] in nats. The argument `q` is not used."""
        below = torch.where(zt == self.mask, self.tokens + self.cluster_of[x0], x0)
        predicted = self.child_distribution(self.marginal(logits.softmax(-1), t), zt)
        nll = -predicted.gather(-1, below.unsqueeze(-1)).squeeze(-1).clamp(min=1e-30).log()
        t = t.unsqueeze(-1)
        cluster = -(1.0 - t) * torch.log1p(-t)
        weight = torch.where(zt == self.mask, -torch.log1p(-t) / (t - cluster), 1.0 / cluster)
        return torch.where(zt < self.tokens, 0.0, weight * nll)

    def start(self, shape: tuple[int, int]) -> Tensor:
        return torch.full(shape, self.mask)

    def move(self, logits: Tensor, zt: Tensor, t: float, s: float) -> Tensor:
        """Move each position from time t to s, at most one level down, as HDLM's sampler does."""
        p = logits.softmax(-1)
        cluster = self.tokens + gumbel_draw(p @ self.members)
        inside = self.cluster_of == (zt - self.tokens).unsqueeze(-1)
        word = gumbel_draw(p.masked_fill(~inside, 0.0))
        kappa_t, kappa_s = (
            -(1.0 - torch.tensor(r)) * torch.log1p(-torch.tensor(min(r, 1.0 - 1e-7)))
            for r in (t, s)
        )
        leave_mask = 1.0 - (s - kappa_s) / (t - kappa_t)
        leave_cluster = (t - s) / kappa_t if kappa_t > 0 else torch.zeros(())
        u = torch.rand(zt.shape)
        zt = torch.where((zt >= self.tokens) & (zt != self.mask) & (u < leave_cluster), word, zt)
        return torch.where((zt == self.mask) & (u < leave_mask), cluster, zt)


class Autoregressive:
    """Reference implementation of an autoregressive model.

    Sampling evaluates the whole prefix again for every token.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.vocabulary = case, vocabulary_of(case)
        backbone = backbone_of(case, self.vocabulary)
        unused = TokenHead(
            self.vocabulary, case.size.width
        )  # required by Denoiser and not used: the linear head below is measured
        self.denoiser = Denoiser(backbone, unused, inputs="previous")
        self.model = nn.ModuleDict(
            {"backbone": backbone, "head": nn.Linear(case.size.width, self.vocabulary.num_tokens)}
        )

    def hidden(self, ids: Tensor) -> Tensor:
        noisy = Noisy(ids, torch.zeros(ids.shape), torch.ones_like(ids, dtype=torch.bool))
        return self.denoiser.hidden_states(noisy, Context())

    def training_loss(self, x0: Tensor) -> Tensor:
        return F.cross_entropy(self.model["head"](self.hidden(x0)), x0.reshape(-1))

    def draw_next(self, ids: Tensor) -> Tensor:
        """Draw the tokens [B] at the last position of `ids` [B,n], given all earlier positions."""
        last = self.hidden(ids).reshape(*ids.shape, -1)[:, -1]
        return gumbel_draw(self.model["head"](last).softmax(-1))


Diffusing = Masked | Mixed | Clustered


def plain_family(case: Case) -> Diffusing | Autoregressive:
    kind = {"mdlm": Masked, "gidd": Mixed, "hdlm": Clustered, "ar": Autoregressive}[
        case.family.split("-")[0]
    ]
    side = kind(case)
    fill_zero_parameters(side.model)
    return side


def plain_training_step(case: Case, device: str = "cpu") -> Callable[[], float]:
    """Return a function that trains the reference model of `case` for one step.

    The returned function returns the loss. `device` must be the default device of torch when the
    step is called.
    """
    side, x0 = plain_family(case), tokens_of(case).to(device)
    side.model.to(device)
    if isinstance(side, Clustered):
        side.cluster_of, side.members = side.cluster_of.to(device), side.members.to(device)

    def diffusion_loss() -> Tensor:
        t = stratified(len(x0))
        zt, q = side.add_noise(x0, t)
        return side.loss(side.model(zt, t), x0, zt, t, q).mean()

    def step() -> float:
        side.model.zero_grad()
        loss = side.training_loss(x0) if isinstance(side, Autoregressive) else diffusion_loss()
        loss.backward()
        return float(loss.detach())

    return step


def plain_sampling(case: Case) -> Iterator[None]:
    """Sample forever with the reference implementation; yield after each step, to be timed."""
    side = plain_family(case)
    side.model.eval()
    while True:
        yield from _run(side, case)


def _run(side: Diffusing | Autoregressive, case: Case) -> Iterator[None]:
    shape, steps = (case.size.samples, case.size.length), case.size.steps
    if isinstance(side, Autoregressive):
        ids = torch.zeros(shape, dtype=torch.long)
        for i in range(shape[1]):
            with torch.no_grad():
                ids[:, i] = side.draw_next(ids[:, : i + 1])
            yield
        return
    zt = side.start(shape)
    for k in range(steps):
        t, s = 1.0 - k / steps, 1.0 - (k + 1) / steps
        with torch.no_grad():
            zt = side.move(side.model(zt, torch.full((shape[0],), t)), zt, t, s)
        yield
