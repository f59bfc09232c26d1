"""Core with a network of one's own: no recipe, no trainer. It learns to count; its bound in nats says how well."""

import torch
from torch import Tensor, nn

import ddiff

WORDS, LENGTH, BATCH = 8, 6, 64
vocabulary = ddiff.HierarchicalVocabulary(
    [[word // 2 for word in range(WORDS)]]
)  # four pairs of words and a mask
process = ddiff.TreeProcess(vocabulary, ddiff.LogTimeClock((1.0, 1.0)))
slots, scored = torch.arange(BATCH), torch.ones(BATCH, LENGTH, dtype=torch.bool)

torch.manual_seed(0)
network = nn.Sequential(  # noisy ids [B,L] -> logits [B,L*V]
    nn.Embedding(vocabulary.num_states, 32),
    nn.Flatten(),
    nn.Linear(32 * LENGTH, 512),
    nn.GELU(),
    nn.Linear(512, LENGTH * WORDS),
)
# anything that gives log_p [B,L,V] will do
network = ddiff.network_from_table(
    lambda zt, t: network(zt).reshape(*zt.shape, WORDS).log_softmax(-1), vocabulary
)


def bound(step: int) -> Tensor:
    """[B] nats of sequences that count up from a random start: ln 8 = 2.08 each, and no honest bound is below."""
    rng = ddiff.CounterRng(0, step, slots, LENGTH)
    x0 = ((rng.uniform("start")[:, :1] * WORDS).long() + torch.arange(LENGTH)) % WORDS
    return ddiff.nelbo(process, network, x0, scored, ddiff.FlatTimes(0.1), rng, slots, BATCH).total


optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
for step in range(400):
    bound(step).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
nats = torch.cat([bound(step).detach() for step in range(400, 440)]).mean()
print(f"{nats:.3f} nats per sequence; the source has 2.079")
print(
    ddiff.generate(
        ddiff.AncestralSampler(16), process, network, index=slots[:4], length=LENGTH, seed=1
    ).ids
)
