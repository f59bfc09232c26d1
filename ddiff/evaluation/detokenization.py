"""Rules that undo the tokenization of public test sets.

Every data set has two lists of rules. Those without the prefix PUBLISHED are ours. Those with the
prefix have the effect of the published programs (arXiv 2310.16834, 2406.07524 and their
successors), their errors included, so that a figure can be compared with that of a paper.
`docs/evaluation.md` lists the differences.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Rule = tuple[str, str]
"""Regular expression, and the text that replaces its matches."""

Rules = tuple[Rule, ...]


def apply_rules(text: str, rules: Rules) -> str:
    """Apply rules in order, each to the result of the rules before it."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _literal(old: str, new: str) -> Rule:
    """Return the rule that replaces the text `old` by the text `new`."""
    return re.escape(old), new.replace("\\", r"\\")


def _join_left(marks: Iterable[str]) -> Rules:
    """Return rules that remove the space before a mark which has spaces at both sides.

    One rule per mark, in this order: the order matters for marks that follow each other.
    """
    return tuple(_literal(f" {mark} ", f"{mark} ") for mark in marks)


def _trim_inside(pairs: Iterable[tuple[str, str]]) -> Rules:
    """Return rules that remove white space next to the inner sides of a pair of marks."""
    rules = []
    for opening, closing in pairs:
        inside = rf"([^{re.escape(closing)}]*?)"
        pattern = rf"{re.escape(opening)}\s*{inside}\s*{re.escape(closing)}"
        rules.append((pattern, rf"{opening}\1{closing}"))
    return tuple(rules)


# ---------------------------------------------------------------------- our rules

# Penn Treebank writes "do n't", the tokenizer of Moses writes "don 't".
_CONTRACTIONS: Rules = (
    (r" (n't|'(?:s|S|re|ve|ll|d|m))\b", r"\1"),
    (r"n 't\b", "n't"),
)
_PUNCTUATION: Rules = (
    (r" +([.,:;!?%)\]}])", r"\1"),
    (r"([(\[{$£#]) +", r"\1"),
)
_PENN_QUOTES: Rules = ((r"``\s?", '"'), (r"\s?''", '"'))
_PAIRED_QUOTES: Rules = (
    (r'" ([^"\n]*?) "', r'"\1"'),
    (r"(?<!\w)' ([^'\n]*?) '(?!\w)", r"'\1'"),
)

PENN_TREEBANK: Rules = (
    *_PENN_QUOTES,
    *_CONTRACTIONS,
    (r"s '(?= |$)", "s'"),  # this text has no quotation marks, so this is a possessive
    (r"\\/", "/"),
    (r"\$ N\b", "$N"),
    *_PUNCTUATION,
)
WIKITEXT: Rules = (
    (r" @([-,.])@ ", r"\1"),  # 1 @,@ 000 -> 1,000
    *_CONTRACTIONS,
    *_PUNCTUATION,
    *_PAIRED_QUOTES,
    (r"(?<==) (?==)", ""),  # = = Career = = -> == Career ==
    (r"(?m)^ +| +$", ""),
    (r" ([°′″])", r"\1"),
)
ONE_BILLION_WORDS: Rules = (
    (r"\bhttp : / / ", "http://"),
    (r"\bhttps : / / ", "https://"),
    *_PENN_QUOTES,
    *_CONTRACTIONS,
    *_PUNCTUATION,
    *_PAIRED_QUOTES,
)
LAMBADA: Rules = (("[“”]", '"'), ("[‘’]", "'"))
AG_NEWS: Rules = (
    (r"\\", " "),  # a backslash stands for a line end
    (r"&?#39;", "'"),
    (r"&?#36;", "$"),
    (r"&?quot;", '"'),
    (r" {2,}", " "),
)
ARTICLES: Rules = (
    (r"\\n", "\n"),
    *_PENN_QUOTES,
    *_CONTRACTIONS,
    *_PUNCTUATION,
)

# ---------------------------------------------------------------------- published rules

PUBLISHED_WIKITEXT: Rules = (
    _literal("s '", "s'"),
    # The slashes are part of the pattern, so this rule does not apply to ordinary text.
    (r"/' [0-9]/", "/'[0-9]/"),
    *(_literal(f" @{mark}@ ", mark) for mark in "-,."),
    *_join_left(":;.!?,"),
    # Apostrophes count as a pair of quotation marks, also those of contractions.
    *_trim_inside((("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))),
    _literal("= = = =", "===="),
    _literal("= = =", "==="),
    _literal("= =", "=="),
    _literal(" ° ", "°"),
    _literal(" \n", "\n"),
    _literal("\n ", "\n"),
    _literal(" N ", " 1 "),
    _literal(" 's", "'s"),
)
PUBLISHED_PENN_TREEBANK: Rules = (
    _literal(" 's", "'s"),
    _literal("s ' ", "s' "),
    _literal(" n't", "n't"),
    _literal(" \n ", "\n"),
    _literal("\\/", "/"),
    # A number at the start or the end of a line has a space at one side only, and stays "N".
    (r"(?<= )N(?= )", "1"),
    _literal("$ 1", "$1"),
    _literal("# 1", "#1"),
    _literal("<unk>", "?"),
)
PUBLISHED_ONE_BILLION_WORDS: Rules = (
    _literal("http : / / ", "http://"),
    _literal("https : / / ", "https://"),
    (r" '(\w+)", r"'\1"),
    (r" (\w+) \. ", r" \1. "),
    (r" (\w+) \.$", r" \1."),
    _literal(" ? ", "? "),
    (r" \?$", "?"),
    _literal(" ! ", "! "),
    (r" !$", "!"),
    *_join_left(",:;"),
    _literal(" / ", "/"),
    (r'" ([^"]+) "', r'"\1"'),
    (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"),
    _literal("$ ", "$"),
    _literal("£ ", "£"),
)
PUBLISHED_LAMBADA: Rules = (
    ("[“”]", '"'),
    (r"\A\s+|\s+\Z", ""),
    (r"\A", "\n"),
)
PUBLISHED_ARTICLES: Rules = (*PUBLISHED_WIKITEXT, *PUBLISHED_ONE_BILLION_WORDS)
