"""Laws of a vocabulary: its tables say one tree. All counts; nothing is allowed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from ddiff.core.vocabulary import Vocabulary
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law


@law("vocabulary: ids run level by level", tolerance=0.0)
def ids_run_by_level(vocabulary: Vocabulary) -> Iterator[Gap]:
    """Words first, then each level's nodes, the root (= mask) alone and last."""
    levels = torch.repeat_interleave(
        torch.arange(vocabulary.num_levels + 1), torch.tensor(vocabulary.level_sizes)
    )
    ids = torch.arange(vocabulary.num_states)
    yield compare(vocabulary.level_of(ids), levels.double(), {"id": ids})
    yield compare(
        torch.tensor(sum(vocabulary.level_sizes)),
        float(vocabulary.num_states),
        {"sizes": vocabulary.level_sizes},
    )
    if vocabulary.num_levels:
        yield compare(torch.tensor(vocabulary.level_sizes[-1]), 1.0, {"size of": "the last level"})
        yield compare(
            torch.tensor(vocabulary.mask_id or -1),
            float(vocabulary.num_states - 1),
            {"mask_id": "the root"},
        )


@law("vocabulary: ancestors climb one parent at a time", tolerance=0.0)
def ancestors_climb(vocabulary: Vocabulary) -> Iterator[Gap]:
    """ancestor(id, own level) is the id, and ancestor(id, l+1) the parent of ancestor(id, l), a node of that level."""
    ids = torch.arange(vocabulary.num_states)
    own = vocabulary.level_of(ids)
    yield compare(vocabulary.ancestor(ids, own), ids.double(), {"id": ids})
    for level in range(vocabulary.num_levels):
        below = ids[own <= level]
        above = vocabulary.ancestor(below, level + 1)
        yield compare(
            above,
            vocabulary.parent(vocabulary.ancestor(below, level)).double(),
            {"id": below, "level": level},
        )
        yield compare(
            vocabulary.level_of(above),
            level + 1.0,
            {"id": below, "level of its ancestor at": level + 1},
        )


@law("vocabulary: in tree order every node owns a contiguous range", tolerance=0.0)
def ranges_are_contiguous(vocabulary: Vocabulary) -> Iterator[Gap]:
    """order(l) is a permutation with inverse position(l), and node_range(node, l) holds exactly what lies below the node;
    nodes without a word do not exist."""
    nodes = torch.arange(vocabulary.num_states)
    for level in range(vocabulary.num_levels + 1):
        order, position = vocabulary.order(level), vocabulary.position(level)
        ids = vocabulary.offsets[level] + torch.arange(vocabulary.level_sizes[level])
        yield compare(order.sort().values, ids.double(), {"order of level": level})
        yield compare(order[position], ids.double(), {"id": ids, "position at level": level})
        above = nodes[vocabulary.level_of(nodes) >= level]
        start, stop = vocabulary.node_range(above, level)
        place = torch.arange(len(order))
        inside = (place >= start.unsqueeze(-1)) & (place < stop.unsqueeze(-1))
        below = vocabulary.ancestor(
            order.unsqueeze(0), vocabulary.level_of(above).unsqueeze(-1)
        ) == above.unsqueeze(-1)
        yield compare(inside.double(), below.double(), {"node": above, "level": level})
        yield compare(inside.any(-1).double(), 1.0, {"something below node": above, "level": level})
        whole = vocabulary.node_range(torch.tensor(vocabulary.root), level)
        yield compare(
            torch.stack(whole),
            torch.tensor([0.0, len(order)]),
            {"range of the root at level": level},
        )


@law("vocabulary: children are those whose parent it is", tolerance=0.0)
def children_are_parents_inverse(vocabulary: Vocabulary) -> Iterator[Gap]:
    """children(node) lists the ids one level below whose parent is the node, num_children counts them."""
    ids = torch.arange(vocabulary.num_states)
    for node in ids.tolist():
        expected = ids[(vocabulary.parent(ids) == node) & (ids != node)]
        listed = vocabulary.children(node).sort().values
        count = vocabulary.num_children(torch.tensor(node))
        yield compare(count, float(len(expected)), {"num_children of": node})
        yield compare(torch.tensor(len(listed)), float(len(expected)), {"children of": node})
        if len(listed) == len(expected):
            yield compare(listed, expected.double(), {"children of": node})


@law("vocabulary: saved and loaded it is the same tree", tolerance=0.0)
def survives_saving(vocabulary: Vocabulary) -> Iterator[Gap]:
    """load(save) has the same fingerprints, levels and ancestors."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "vocabulary.safetensors")
        vocabulary.save(path)
        loaded = Vocabulary.load(path)
    same = (loaded.fingerprint, loaded.tokenizer_fingerprint) == (
        vocabulary.fingerprint,
        vocabulary.tokenizer_fingerprint,
    )
    yield compare(torch.tensor(float(same)), 1.0, {"fingerprint after loading": loaded.fingerprint})
    ids = torch.arange(vocabulary.num_states)
    yield compare(loaded.parent(ids), vocabulary.parent(ids).double(), {"parent of": ids})


VOCABULARY_LAWS: tuple[Law, ...] = (
    ids_run_by_level,
    ancestors_climb,
    ranges_are_contiguous,
    children_are_parents_inverse,
    survives_saving,
)


def check_vocabulary(vocabulary: Vocabulary) -> list[LawReport]:
    """Every law of a vocabulary; for small ones, since nodes are gone through one by one."""
    return evaluate_laws(vocabulary, VOCABULARY_LAWS)
