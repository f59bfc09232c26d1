"""Train a plain torch network on a ddiff process, without a recipe or the trainer.

The data are sequences that count from a random start, such as 5 6 7 0 1 2. The script prints the
NELBO of the network, and four samples.
"""

import torch
from torch import Tensor, nn

import ddiff

TOKENS = 8
LENGTH = 6
BATCH = 64

# Four pairs of tokens below a mask.
vocabulary = ddiff.HierarchicalVocabulary([[token // 2 for token in range(TOKENS)]])
process = ddiff.TreeProcess(vocabulary, ddiff.LogTimeClock((1.0, 1.0)))
slots = torch.arange(BATCH)
scored = torch.ones(BATCH, LENGTH, dtype=torch.bool)

torch.manual_seed(0)
model = nn.Sequential(  # noisy ids [B,L] -> logits [B,L*V]
    nn.Embedding(vocabulary.num_states, 32),
    nn.Flatten(),
    nn.Linear(32 * LENGTH, 512),
    nn.GELU(),
    nn.Linear(512, LENGTH * TOKENS),
)


def predict(zt: Tensor, t: Tensor) -> Tensor:
    """Return log-probabilities [B,L,V] of the clean tokens, given noisy ids zt [B,L].

    The network does not use the times t [B,L].
    """
    return model(zt).reshape(*zt.shape, TOKENS).log_softmax(-1)


network = ddiff.network_from_table(predict, vocabulary)


def compute_bound(step: int) -> Tensor:
    """Return the NELBO [B], in nats, of B sequences that count from a random start.

    `step` selects the random numbers. The entropy of a sequence is ln 8 = 2.08 nats, because
    its first token determines all others.
    """
    rng = ddiff.CounterRng(0, step, slots, LENGTH)
    start = (rng.uniform("start")[:, :1] * TOKENS).long()
    x0 = (start + torch.arange(LENGTH)) % TOKENS
    times = ddiff.FlatTimes(0.1)
    return ddiff.nelbo(process, network, x0, scored, times, rng, slots, BATCH).total


optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(400):
    compute_bound(step).mean().backward()
    optimizer.step()
    optimizer.zero_grad()

nats = torch.cat([compute_bound(step).detach() for step in range(400, 440)]).mean()
print(f"{nats:.3f} nats per sequence; the entropy of the source is 2.079")
sampler = ddiff.AncestralSampler(16)
samples = ddiff.generate(sampler, process, network, index=slots[:4], length=LENGTH, seed=1)
print(samples.ids)
