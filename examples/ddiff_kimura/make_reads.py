"""Write reads.txt with rows of 64 nucleotides from a Markov chain, and print its entropy.

In the chain, G rarely follows C, and equal neighbours are frequent.
"""

import math
import random

# Weights of A, C, G, T after each letter.
NEXT = {
    "A": (4, 2, 3, 1),
    "C": (3, 4, 0.5, 3),
    "G": (3, 2, 4, 1),
    "T": (1, 2, 3, 4),
}
ROWS = 3000
LENGTH = 64
BURN_IN = 1000  # letters that are dropped, so that the rest is stationary


def entropy_after(letter: str) -> float:
    """Return the entropy, in nats, of the next letter after `letter`."""
    total = sum(NEXT[letter])
    shares = [weight / total for weight in NEXT[letter]]
    return -sum(share * math.log(share) for share in shares)


source = random.Random(0)
letters = ["A"]
for _ in range(BURN_IN + ROWS * LENGTH):
    letters += source.choices("ACGT", NEXT[letters[-1]])
text = "".join(letters[-ROWS * LENGTH :])
with open("reads.txt", "w", encoding="ascii") as file:
    for start in range(0, len(text), LENGTH):
        file.write(text[start : start + LENGTH] + "\n")

entropies = {letter: entropy_after(letter) for letter in NEXT}
rate = sum(entropies[letter] for letter in text) / len(text)
print(f"{ROWS} reads; the chain's entropy rate is {rate:.4f} nats per letter")
print(f"uniform letters have {math.log(4):.4f}")
