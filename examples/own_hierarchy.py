"""Train the recipe hdlm_small on a tree of tokens whose groups are defined by a function.

    python examples/own_hierarchy.py [KEY=VALUE ...]

Arguments override keys of the recipe, for example train.steps=1000.
"""

import sys

import ddiff


def assign_groups(token: str) -> tuple[str, str]:
    """Return two groups of a token by its spelling: a narrow group, and the wide group above it."""
    word = token.removeprefix("Ġ")  # byte-level BPE spells a leading space as "Ġ"
    if token == "<|eos|>":
        return "end of document", "mark"
    if not word.isalpha():
        return "punctuation", "mark"
    place = "word" if token.startswith("Ġ") else "middle"
    if word[0].isupper():
        size = "capital"
    elif len(word) < 4:
        size = "short"
    else:
        size = "long"
    return f"{size} {place}", place


settings = ["name=own_hierarchy", "tokenizer.size=512", "train.steps=200", *sys.argv[1:]]
recipe = ddiff.read_recipe("hdlm_small", settings)
documents = recipe.data.build(length=recipe.length, seed=recipe.seed, cache=None)
tokenizer = recipe.tokenizer.build(documents=documents, cache=None)

vocabulary = ddiff.HierarchicalVocabulary.from_labels(
    tokenizer.tokens(), assign_groups, tokenizer.fingerprint
)
# Rates of leaving the tokens, the finer groups and the coarser groups; the mask is on top.
process = ddiff.TreeProcess(vocabulary, ddiff.LogTimeClock((1.0, 1.0, 1.0)))
run = ddiff.run(recipe, vocabulary=vocabulary, process=process)

evaluation = run.nelbo(["It is a truth universally acknowledged"])
print(f"{vocabulary}: {evaluation.nelbo_nats_per_token:.2f} nats per token of a sentence")
print(run.sample(1, steps=64, seed=1)[0]["text"])
