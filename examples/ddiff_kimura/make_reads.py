"""Write reads.txt: rows of 64 letters in which CG is rare and neighbours repeat, and print their entropy per letter."""

import math
import random

NEXT = {
    "A": (4, 2, 3, 1),
    "C": (3, 4, 0.5, 3),
    "G": (3, 2, 4, 1),
    "T": (1, 2, 3, 4),
}  # weights of A, C, G, T after it
ROWS, LENGTH, START = 3000, 64, 1000

source = random.Random(0)
letters = ["A"]
for _ in range(START + ROWS * LENGTH):
    letters += source.choices("ACGT", NEXT[letters[-1]])
text = "".join(letters[-ROWS * LENGTH :])
with open("reads.txt", "w", encoding="ascii") as file:
    file.writelines(text[i : i + LENGTH] + "\n" for i in range(0, len(text), LENGTH))

entropy = {y: -sum(w / sum(row) * math.log(w / sum(row)) for w in row) for y, row in NEXT.items()}
rate = sum(entropy[letter] for letter in text) / len(text)
print(
    f"{ROWS} reads; the chain's entropy rate is {rate:.4f} nats per letter, uniform is {math.log(4):.4f}"
)
