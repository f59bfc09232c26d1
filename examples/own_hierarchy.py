"""A hierarchy written by hand, under the trainer, evaluation and samplers of a shipped recipe.

    python examples/own_hierarchy.py [KEY=VALUE ...]

The arguments are settings that go over the recipe, such as train.steps=1000.
"""

import sys

import ddiff


def groups(token: str) -> tuple[str, str]:
    """The finer and the coarser group of a token, by its looks; "Ġ" is how byte pairs spell the space before a word."""
    word = token.removeprefix("Ġ")
    if not word.isalpha():
        return "end of document" if token == "<|eos|>" else "punctuation", "mark"
    place = "word" if token.startswith("Ġ") else "middle"
    size = "capital" if word[0].isupper() else "short" if len(word) < 4 else "long"
    return f"{size} {place}", place


settings = ["name=own_hierarchy", "tokenizer.size=512", "train.steps=200", *sys.argv[1:]]
recipe = ddiff.read_recipe("hdlm_small", settings)
documents = recipe.data.build(length=recipe.length, seed=recipe.seed, cache=None)
tokenizer = recipe.tokenizer.build(documents=documents, cache=None)

vocabulary = ddiff.HierarchicalVocabulary.from_labels(
    tokenizer.tokens(), groups, tokenizer.fingerprint
)
process = ddiff.TreeProcess(
    vocabulary, ddiff.LogTimeClock((1.0, 1.0, 1.0))
)  # a rate per level: finer, coarser, mask
run = ddiff.run(recipe, vocabulary=vocabulary, process=process)

evaluation = run.nelbo(["It is a truth universally acknowledged"])
print(f"{vocabulary}: {evaluation.nelbo_nats_per_token:.2f} nats per token of a sentence")
print(run.sample(1, steps=64, seed=1)[0]["text"])
