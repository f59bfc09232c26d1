"""Facts about published diffusion models of the transformers library, one entry per architecture.

The weights do not show these facts: a model that is run with another mask id, shift or attention
gives fluent nonsense and no error. The table follows descriptions of the models. It was not
compared with their programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Attention = Literal["full", "block", "causal"]


@dataclass(frozen=True)
class HubModel:
    """Facts about one architecture.

    Attributes:
        examples: names on the hub.
        model_type: `model_type` of the published configuration, or its beginning.
        library: model type of the transformers library that computes the same function. None: the
            end of the published `model_type`, such as "qwen3" in "a2d-qwen3".
        mask_token: id of the mask if the configuration has no `mask_token_id`. None: the mask token
            of the tokenizer.
        shift: whether the output at position i - 1 predicts the token at position i.
        attention: "full": every position attends to every position; "block": to all positions
            of the same and of earlier blocks; "causal": to itself and to earlier positions.
        block: number of positions of a block, for "block".
        end: end mark of an answer, and the tokens after it. Only printed and documented.
        chat_template: file of the repository with the chat template. Only documented.
        tokenizer: hub name of a tokenizer with the same ids, for repositories whose own tokenizer
            needs Python code. None: the tokenizer of the repository.
    """

    examples: tuple[str, ...]
    model_type: str
    library: str | None
    mask_token: int | None
    shift: bool
    attention: Attention
    block: int | None
    end: str
    chat_template: str
    tokenizer: str | None = None


FILLED = "end mark, repeated to the end of the row"
STOPPED = "end mark, after which nothing is generated"

HUB_MODELS: dict[str, HubModel] = {
    "llada": HubModel(
        examples=("GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-1.5"),
        model_type="llada",
        library="llama",
        mask_token=126336,
        shift=False,
        attention="full",
        block=None,
        end=FILLED,
        chat_template="tokenizer_config.json",
    ),
    "dream": HubModel(
        examples=("Dream-org/Dream-v0-Base-7B", "Dream-org/Dream-v0-Instruct-7B"),
        model_type="Dream",
        library="qwen2",
        mask_token=151666,
        shift=True,
        attention="full",
        block=None,
        end=FILLED,
        chat_template="tokenizer_config.json",
        tokenizer="Qwen/Qwen2.5-7B",
    ),
    "llada2": HubModel(
        examples=("inclusionAI/LLaDA2.0-mini", "inclusionAI/LLaDA2.0-flash"),
        model_type="llada2_moe",
        library="glm4_moe",
        mask_token=156895,
        shift=False,
        attention="block",
        block=32,
        end=STOPPED,
        chat_template="tokenizer_config.json or chat_template.jinja",
    ),
    "modernbert": HubModel(
        examples=("dllm-hub/ModernBERT-base-chat-v0.1", "answerdotai/ModernBERT-base"),
        model_type="modernbert",
        library="modernbert",
        mask_token=None,
        shift=False,
        attention="full",
        block=None,
        end="end mark of the chat template",
        chat_template="chat_template.jinja or tokenizer_config.json",
    ),
    "a2d": HubModel(
        examples=("dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1",),
        model_type="a2d-",
        library=None,
        mask_token=None,
        shift=False,
        attention="full",
        block=None,
        end=FILLED,
        chat_template="chat_template.jinja or tokenizer_config.json",
    ),
}
