"""Heads of the engine as recipe components."""

from __future__ import annotations

from ddiff import ComponentConfig, TokenHead, TreeHead, Vocabulary


class Tokens:
    """Head with one logit per token; all logits are computed at every position.

    On a tree, the probability of a node is the sum over the tokens below the node.
    """

    class Config(ComponentConfig):
        """Empty: this head has no keys."""

    @staticmethod
    def build(config: Config, *, vocabulary: Vocabulary, width: int) -> TokenHead:
        return TokenHead(vocabulary, width)


class Tied:
    """Head with one logit per token; computes only the logits below the node at a position.

    At a mask these are the logits of all tokens, at a cluster the logits of its tokens. The
    probability of a node is the sum over the tokens below the node.
    """

    class Config(ComponentConfig):
        """Empty: this head has no keys."""

    @staticmethod
    def build(config: Config, *, vocabulary: Vocabulary, width: int) -> TreeHead:
        return TreeHead(vocabulary, width, "tied")


class Levelwise:
    """Head with separate logits for the children of every node, a hierarchical softmax.

    At each position only the logits of the children of the queried node are computed: in the
    bound, the clusters at a mask and the tokens of one cluster at a cluster.
    """

    class Config(ComponentConfig):
        """Empty: this head has no keys."""

    @staticmethod
    def build(config: Config, *, vocabulary: Vocabulary, width: int) -> TreeHead:
        return TreeHead(vocabulary, width, "levelwise")
