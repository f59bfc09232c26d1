"""Small instances of components that read data, for `ddiff check`.

These are tokenizers, vocabularies, data sets, encoders, normalizers, judges and paths of fields. A
component that needs texts is built on each of the small corpora in CORPORA that it accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ddiff.core.normalizer import Normalizer
from ddiff.core.training_paths import require_path
from ddiff.data.documents import Documents, documents_from_texts
from ddiff.data.packing import pack_texts
from ddiff.data.tokenizer import AlphabetTokenizer, Tokenizer, load_tokenizer
from ddiff.errors import ArgumentError, DataError
from ddiff.evaluation.judges import TEXT_FIELD, DrawnField, DrawnFields
from ddiff.plugin.registry import Component
from ddiff.recipe.component import ComponentSpec
from ddiff.testing.dataset import check_dataset, require_in_memory
from ddiff.testing.encoder import check_encoder
from ddiff.testing.instance import Instance
from ddiff.testing.joint import check_path
from ddiff.testing.judge import check_judge
from ddiff.testing.normalizer import check_normalizer
from ddiff.testing.report import LawReport
from ddiff.testing.tokenizer import check_tokenizer
from ddiff.testing.vocabulary import check_vocabulary

LENGTH = 16  # symbols of a row, also of checked data sets
SEED = 0
FIELDS = ("first", "second")  # fields of a checked path

CORPORA: Mapping[str, tuple[str, ...]] = {
    "sentences": (
        "the quick brown fox jumps over the lazy dog",
        "a dog and a fox sleep in the sun",
        "the sun is warm and the day is long",
        "over the hill the lazy fox jumps again",
    ),
    "nucleotides": ("ACGTTGCATGCA", "TTGACCATGGCA", "GATTACAGATTA", "CCGGAATTCCGG"),
    "digits": ("012345678901", "314159265358", "271828182845", "112358132134"),
    "names": ("anna        ", "bob         ", "charlotte   ", "dora        "),
}
"""Small corpora by name. All texts are for training, and the second half is for validation too."""

Made = TypeVar("Made")


def make_documents(name: str) -> Documents:
    """Build the documents of a corpus in CORPORA. Names are filled up with spaces."""
    texts = CORPORA[name]
    half = len(texts) // 2
    fill = " " if name == "names" else None
    # a tokenizer of the words of the training texts must know the words of all texts
    train = documents_from_texts(texts)
    return Documents(train, documents_from_texts(texts[half:]), fill=fill)


def _try_corpora(component: Component, make: Callable[[str], Made]) -> dict[str, Made]:
    """Call `make` with the name of each corpus, and return the results of the accepted ones.

    Raises ArgumentError if every corpus is rejected by an ArgumentError or a DataError.
    """
    made = {}
    rejection: Exception | None = None
    for name in CORPORA:
        try:
            made[name] = make(name)
        except (ArgumentError, DataError) as error:
            rejection = error
    if made:
        return made
    raise ArgumentError(
        f"ddiff check: the {component} accepts none of the small corpora {', '.join(CORPORA)} with "
        f"these settings, so nothing can be checked. The last error was: {rejection}"
    )


def make_tokenizers(component: Component, spec: ComponentSpec, configured: bool) -> list[Instance]:
    """Build a tokenizer on each corpus whose texts it encodes. `configured` is not used."""

    def build(name: str) -> Tokenizer:
        tokenizer: Tokenizer = spec.build(documents=make_documents(name), cache=None)
        tokenizer.encode(CORPORA[name])  # raises DataError for texts that are not in its alphabet
        return tokenizer

    def load(path: str) -> Tokenizer:
        found: Tokenizer = spec.load(path=path)
        return found

    restore = load_tokenizer if spec.members.load is None else load
    instances = []
    for name, tokenizer in _try_corpora(component, build).items():
        check = partial(check_tokenizer, tokenizer, CORPORA[name], restore)
        instances.append(Instance(f"{component.name} on {name}", check))
    return instances


def make_vocabularies(
    component: Component, spec: ComponentSpec, configured: bool
) -> list[Instance]:
    """Build a vocabulary of the characters of each corpus. `configured` is not used."""

    def build(name: str) -> Any:
        text = "".join(CORPORA[name])
        tokenizer = AlphabetTokenizer(sorted(set(text)))
        # rows of symbols have one length; the last, shorter row is left out
        starts = range(0, len(text) - LENGTH + 1, LENGTH)
        rows = pack_texts([text[start : start + LENGTH] for start in starts], tokenizer, LENGTH)
        return spec.build(tokenizer=tokenizer, rows=rows, cache=None)

    instances = []
    for name, vocabulary in _try_corpora(component, build).items():
        label = f"{component.name} on the characters of {name}"
        instances.append(Instance(label, partial(check_vocabulary, vocabulary)))
    return instances


def make_datasets(component: Component, spec: ComponentSpec, configured: bool) -> list[Instance]:
    """Make a data set of texts, or of fields, with its settings. `configured` is not used."""

    inputs: dict[str, Any] = {"seed": SEED, "cache": None}
    if component.kind == "dataset":
        inputs["length"] = LENGTH
    build = partial(spec.build, **inputs)
    shapes = None if component.kind == "dataset" else spec.preview()
    # A data set that needs files or other settings raises an error here, before any check.
    first = build()
    require_in_memory(first)
    return [Instance(component.name, partial(check_dataset, build, shapes, first))]


def make_encoders(component: Component, spec: ComponentSpec, configured: bool) -> list[Instance]:
    """Build an encoder on each corpus. `configured` is not used.

    Raises ArgumentError for an encoder that needs the tokenizer of a recipe.
    """
    for name in ("tokenizer", "rows"):
        if spec.takes_input(name):
            raise ArgumentError(
                f"ddiff check: the {component} needs the {name} of a recipe, and cannot be checked "
                "without one."
            )

    def build(name: str) -> Any:
        device = torch.device("cpu")
        return spec.build(documents=make_documents(name), device=device, cache=None)

    instances = []
    for name, encoder in _try_corpora(component, build).items():
        check = partial(check_encoder, encoder, CORPORA[name])
        instances.append(Instance(f"{component.name} on {name}", check))
    return instances


def make_normalizers(component: Component, spec: ComponentSpec, configured: bool) -> list[Instance]:
    """Fit a normalizer to vectors with a mean and correlations. `configured` is not used."""
    instances = []
    for width in (2, 5):
        data = example_vectors(width)
        normalizer: Normalizer = spec.build(chunks=list(data.split(16)), width=width)
        load = partial(_load_normalizer, spec, width)
        check = partial(check_normalizer, normalizer, data, load)
        instances.append(Instance(f"{component.name}, vectors of {width} numbers", check))
    return instances


def _load_normalizer(spec: ComponentSpec, width: int, tensors: Mapping[str, Tensor]) -> Normalizer:
    loaded: Normalizer = spec.load(tensors=tensors, width=width)
    return loaded


def example_vectors(width: int) -> Tensor:
    """Return 64 correlated vectors [64,width] float64 with a mean, the same at every call."""
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(64, width, generator=generator, dtype=torch.float64)
    mixing = torch.eye(width, dtype=torch.float64)
    mixing[0] += 0.3
    return noise @ mixing + 0.5


def make_judges(component: Component, spec: ComponentSpec, configured: bool) -> list[Instance]:
    """Build a judge of texts on each corpus, with the validation texts as samples.

    `configured` is not used.
    """

    def build(name: str) -> Callable[[], list[LawReport]]:
        judge = spec.build(documents=make_documents(name))
        half = len(CORPORA[name]) // 2
        texts = list(CORPORA[name][half:])
        drawn = DrawnFields(TEXT_FIELD, [TEXT_FIELD], [], {TEXT_FIELD: DrawnField(texts)})
        judge.judge(drawn)  # a judge of other data raises an error here, if not in `build`
        return partial(check_judge, judge, drawn)

    checks = _try_corpora(component, build)
    return [Instance(f"{component.name} on {name}", check) for name, check in checks.items()]


def make_paths(component: Component, spec: ComponentSpec, configured: bool) -> list[Instance]:
    """Make the path of two fields that a rule gives. `configured` is not used."""
    path = require_path(spec.build(names=list(FIELDS)), f"ddiff check {component.name}")
    return [Instance(f"{component.name} of two fields", partial(check_path, path))]
