"""Heads of the engine as recipe components."""

from __future__ import annotations

from ddiff import ComponentConfig, TokenHead, TreeHead, Vocabulary


class Tokens:
    """One logit per token; P(node) sums over its tokens, and every row computes all logits."""

    class Config(ComponentConfig):
        """No keys."""

    @staticmethod
    def build(config: Config, *, vocabulary: Vocabulary, width: int) -> TokenHead:
        return TokenHead(vocabulary, width)


class Tied:
    """One logit per token; P(node) sums over its tokens.

    A row computes only the logits of the tokens below its query node.
    """

    class Config(ComponentConfig):
        """No keys."""

    @staticmethod
    def build(config: Config, *, vocabulary: Vocabulary, width: int) -> TreeHead:
        return TreeHead(vocabulary, width, "tied")


class Levelwise:
    """Logits among siblings at every level of the tree, a hierarchical softmax.

    A row computes only the logits of the children of its query node.
    """

    class Config(ComponentConfig):
        """No keys."""

    @staticmethod
    def build(config: Config, *, vocabulary: Vocabulary, width: int) -> TreeHead:
        return TreeHead(vocabulary, width, "levelwise")
