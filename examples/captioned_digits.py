"""Train one network on images of digits and their number words, and sample in all directions.

    python examples/captioned_digits.py --steps 1200

A sample has two fields: an image of 8 x 8 pixels with 17 levels, and a caption of one word. Both
fields are noised by masking. The script prints the bounds of the held-out digits along several
paths, and counts right images and captions. `--images FILE.png` saves drawn digits.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from ddiff_dit.mmdit import MMDiT, StreamSpec
from torch import Tensor

import ddiff

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WIDTH = 96
BATCH = 32


class Digits:
    """Levels [n,64] and word numbers [n,1] of one part of the digits."""

    def __init__(self, images: ddiff.CaptionedImages) -> None:
        self.levels = torch.from_numpy(images.levels)
        self.words = torch.tensor([[WORDS.index(word)] for (word,) in images.captions])

    def batch(self, numbers: Tensor, index: Tensor) -> ddiff.FieldsBatch:
        fields = {
            "image": ddiff.token_field(self.levels[numbers]),
            "text": ddiff.token_field(self.words[numbers]),
        }
        return ddiff.FieldsBatch(fields, index)


def build_objective() -> ddiff.FieldsObjective:
    """Build fields, network and training paths."""
    image = ddiff.FlatVocabulary(17)
    text = ddiff.FlatVocabulary(len(WORDS))
    masking = ddiff.LogTimeClock((1.0,))
    fields = {
        "image": ddiff.Field(ddiff.TreeProcess(image, masking), ddiff.FlatTimes(), 64),
        "text": ddiff.Field(ddiff.TreeProcess(text, masking), ddiff.FlatTimes(), 1),
    }
    streams = {
        "image": StreamSpec(WIDTH, vocabulary=image, grid=(8, 8)),
        "text": StreamSpec(WIDTH, vocabulary=text),
    }
    backbone = MMDiT(streams, layers=4, heads=4, head_width=24, qk_norm=True)
    heads = {"image": ddiff.TokenHead(image, WIDTH), "text": ddiff.TokenHead(text, WIDTH)}
    denoiser = ddiff.JointDenoiser(backbone, heads)
    shared = ddiff.shared_path(["image", "text"])
    # Each training sample gets one of these paths: both fields, the image given the word, the word
    # given the image, or the word while the image is noise (for joint samples, word first).
    path = ddiff.MixedPaths(
        [
            (shared, 0.2),
            (ddiff.given_path(shared, {"text": "clean"}), 0.5),
            (ddiff.given_path(shared, {"image": "clean"}), 0.2),
            (ddiff.given_path(shared, {"image": "prior"}), 0.1),
        ]
    )
    losses = {"image": ddiff.ElboLoss(), "text": ddiff.ElboLoss()}
    return ddiff.FieldsObjective(fields, denoiser, path, losses, {"text": 0.3})


def train(objective: ddiff.FieldsObjective, digits: Digits, steps: int) -> None:
    optimizer = torch.optim.AdamW(objective.denoiser.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        numbers = torch.randint(len(digits.words), (BATCH,), generator=generator)
        batch = digits.batch(numbers, torch.arange(BATCH))
        counts = {name: count.double() for name, count in objective.counts(batch).items()}
        rng = ddiff.CounterRng(0, step, batch.index, 1)
        loss = objective(batch, rng, counts, BATCH).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}  loss {float(loss.detach()):.3f}", flush=True)


def report_bounds(objective: ddiff.FieldsObjective, digits: Digits, draws: int) -> None:
    """Print the bounds of the held-out digits in nats per digit, with 95 % intervals."""
    shared = ddiff.shared_path(["image", "text"])
    paths = {
        "image and word, together": shared,
        "image and word, word first": ddiff.first_path(["text", "image"]),
        "image given the word": ddiff.given_path(shared, {"text": "clean"}),
        "word given the image": ddiff.given_path(shared, {"image": "clean"}),
    }

    def batch_of(numbers: np.ndarray) -> ddiff.FieldsBatch:
        index = torch.from_numpy(numbers)
        return digits.batch(index, index)

    for name, path in paths.items():
        found = ddiff.evaluate_fields(objective, batch_of, len(digits.words), path, draws=draws)
        low, high = found.interval or (math.nan, math.nan)
        print(f"{name}: {found.nats_per_sample:.2f} nats [{low:.2f}, {high:.2f}]")


def nearest_digit(levels: Tensor, known: Digits) -> Tensor:
    """Classify images by the majority of the three nearest held-out images."""
    distance = torch.cdist(levels.double(), known.levels.double())
    nearest = distance.topk(3, largest=False).indices
    return known.words[nearest, 0].mode(-1).values


def format_share(right: Tensor) -> str:
    """Format a share of right samples with its 95 % interval (Wilson)."""
    n = len(right)
    share = float(right.double().mean())
    z = 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low = max(0.0, centre - half)
    return f"{share:.2f} [{low:.2f}, {centre + half:.2f}] of {n}; chance 0.10"


def sample(objective: ddiff.FieldsObjective, digits: Digits, count: int) -> Tensor:
    """Sample in three directions, print the shares of right samples, and return drawn images."""
    index = torch.arange(count)
    fields = objective.sized_fields(digits.batch(index[:1], index[:1]))
    network = ddiff.JointDenoiserNetwork(objective.denoiser, fields)
    samplers = {"image": ddiff.AncestralSampler(32), "text": ddiff.AncestralSampler(1)}
    word_first = ddiff.JointSampler(samplers, ddiff.first_path(["text", "image"]))
    wanted = (index % len(WORDS)).unsqueeze(-1)
    given = {"text": (wanted, None)}
    drawn = ddiff.generate_fields(word_first, fields, network, index=index, seed=0, given=given)
    images = drawn.states["image"]
    print(
        "image given the word, right:", format_share(nearest_digit(images, digits) == wanted[:, 0])
    )

    count = min(count, len(digits.words))
    given = {"image": (digits.levels[:count], None)}
    drawn = ddiff.generate_fields(
        word_first, fields, network, index=index[:count], seed=1, given=given
    )
    right = (drawn.states["text"] == digits.words[:count])[:, 0]
    print("word given the image, right:", format_share(right))

    drawn = ddiff.generate_fields(word_first, fields, network, index=index, seed=2)
    agrees = nearest_digit(drawn.states["image"], digits) == drawn.states["text"][:, 0]
    print("image and word agree:", format_share(agrees))
    return images


def save_images(images: Tensor, path: Path) -> None:
    """Save a grid with one column per digit, four times enlarged."""
    from PIL import Image

    columns = len(WORDS)
    rows = len(images) // columns
    grid = images[: rows * columns].reshape(rows, columns, 8, 8).transpose(1, 2)
    levels = (grid.reshape(rows * 8, columns * 8).double() * (255.0 / 16.0)).byte().numpy()
    Image.fromarray(levels).resize((columns * 32, rows * 32), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200, help="training steps")
    parser.add_argument("--samples", type=int, default=200, help="samples per direction")
    parser.add_argument("--draws", type=int, default=4, help="draws of the evaluation")
    parser.add_argument("--images", type=Path, help="PNG file for drawn images")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    training, held_out = (Digits(part) for part in ddiff.load_digits())
    objective = build_objective()
    train(objective, training, chosen.steps)
    objective.denoiser.eval()
    report_bounds(objective, held_out, chosen.draws)
    images = sample(objective, held_out, chosen.samples)
    if chosen.images:
        save_images(images, chosen.images)


if __name__ == "__main__":
    main()
