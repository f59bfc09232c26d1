"""Heads as recipe components.

A head maps hidden states to a distribution of the clean token, or to the mean of the clean vector.
"""

from __future__ import annotations

from typing import Literal

from ddiff import (
    ArgumentError,
    ComponentConfig,
    TokenHead,
    TreeHead,
    VectorHead,
    Vocabulary,
)


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
    """Head with one logit per token; only the logits that a position needs are computed.

    A masked position needs the logits of all tokens. A position whose state is a cluster needs only
    the logits of the tokens in this cluster. On a tree, the probability of a node is the sum over
    the tokens below the node.
    """

    class Config(ComponentConfig):
        """Empty: this head has no keys."""

    @staticmethod
    def build(config: Config, *, vocabulary: Vocabulary, width: int) -> TreeHead:
        return TreeHead(vocabulary, width, "tied")


class Levelwise:
    """Hierarchical softmax: separate logits for the children of every node of a tree.

    The bound needs only the logits of the children of a position's state. The children of the mask
    are the top clusters, and the children of a cluster of tokens are its tokens.
    """

    class Config(ComponentConfig):
        """Empty: this head has no keys."""

    @staticmethod
    def build(config: Config, *, vocabulary: Vocabulary, width: int) -> TreeHead:
        return TreeHead(vocabulary, width, "levelwise")


class Vector:
    """Linear head of a field of vectors; its output is converted to the mean of the clean vector.

    z = a x + sigma eps is the noisy vector, with signal factor a and standard normal eps.
    """

    states = frozenset({"vectors"})

    class Config(ComponentConfig):
        output: Literal["eps", "x0", "v", "u"] = "v"
        """Output of the network: the noise "eps", the clean vector "x0", "v" = a eps - sigma x, or
        the flow velocity "u" = a' x + sigma' eps."""

    @staticmethod
    def build(
        config: Config, *, vocabulary: Vocabulary | None, width: int, dim: int | None = None
    ) -> VectorHead:
        if dim is None:
            raise ArgumentError(
                'The head "vector" is for fields of vectors; got tokens. Use head = "tokens".'
            )
        return VectorHead(dim, width, config.output)
