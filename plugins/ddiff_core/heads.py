"""Heads of the engine as recipe components."""

from __future__ import annotations

from ddiff import ComponentConfig, TokenHead, TreeHead, Vocabulary


class Tokens:
    """Head with one logit per token; every row computes all logits.

    The probability of a node is the sum over the tokens below the node.
    """

    class Config(ComponentConfig):
        """No keys."""

    @staticmethod
    def build(config: Config, *, vocabulary: Vocabulary, width: int) -> TokenHead:
        return TokenHead(vocabulary, width)


class Tied:
    """Head with one logit per token; a row computes only the logits of the tokens that it needs.

    The probability of a node is the sum over the tokens below the node. The bound needs the tokens
    below the node of a row: all tokens at masks, the tokens of one cluster at a cluster.
    """

    class Config(ComponentConfig):
        """No keys."""

    @staticmethod
    def build(config: Config, *, vocabulary: Vocabulary, width: int) -> TreeHead:
        return TreeHead(vocabulary, width, "tied")


class Levelwise:
    """Head with separate logits for the children of every node, a hierarchical softmax.

    A row computes only the logits of the children of one node, the node whose children the bound
    compares.
    """

    class Config(ComponentConfig):
        """No keys."""

    @staticmethod
    def build(config: Config, *, vocabulary: Vocabulary, width: int) -> TreeHead:
        return TreeHead(vocabulary, width, "levelwise")
