"""Network of a run as a model of the transformers library.

`save_pretrained` writes a copy of this module, with every definition of ddiff that it needs, into
the folder of a saved model. Therefore only torch and transformers may be imported from outside of
ddiff, and all imports are at the top of a module.

Shapes: B sequences, L positions, V tokens, S states (the tokens, the nodes of a tree, the mask).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from ddiff.core.schedule import (
    BernsteinSchedule,
    CosineSchedule,
    GeometricSchedule,
    LinearSchedule,
    PowerSchedule,
    Schedule,
)
from ddiff.core.times import Noisy
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary, Vocabulary
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import Context, Denoiser

SCHEDULES: dict[str, Any] = {
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "power": PowerSchedule,
    "geometric": GeometricSchedule,
    "bernstein": BernsteinSchedule,
}
"""Schedules that a saved model can have, by the name in its configuration."""


class DdiffConfig(PreTrainedConfig):
    """Configuration of a saved model.

    Args:
        num_tokens: number V of tokens.
        has_mask: whether the last state is a mask.
        parents: for each level below the root of a tree, the index of each node's parent in the
            next level; None for a vocabulary without a tree.
        length: number of positions of the rows of the training.
        backbone: kind and keys of the backbone, as in the recipe.
        head: kind and keys of the output head, as in the recipe.
        inputs: "own", or "previous" for a network that predicts P(x_i | x_<i) at position i.
        given: "rest" if the logits at position i predict P(x_i | all other states), "all" if they
            predict P(x_i | all states).
        schedule: kind and settings of the schedule alpha(t), the probability that a token has had
            no noise until time t; None if the model has no such schedule.
        is_masked_diffusion: whether a state is either the clean token or the mask.
        has_one_time: whether all noisy positions of a training sequence had the same noise time and
            attended to each other; False for a model of blocks.
        sample: table [sample] of the recipe: sampler, number of steps, and so on.
    """

    model_type = "ddiff"

    def __init__(
        self,
        num_tokens: int = 1,
        has_mask: bool = True,
        parents: list[list[int]] | None = None,
        length: int = 1,
        backbone: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        inputs: str = "own",
        given: str = "rest",
        schedule: dict[str, Any] | None = None,
        is_masked_diffusion: bool = False,
        has_one_time: bool = True,
        sample: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_tokens = num_tokens
        self.has_mask = has_mask
        self.parents = parents
        self.length = length
        self.backbone = backbone
        self.head = head
        self.inputs = inputs
        self.given = given
        self.schedule = schedule
        self.is_masked_diffusion = is_masked_diffusion
        self.has_one_time = has_one_time
        self.sample = sample
        super().__init__(**kwargs)


class ScheduledProcess:
    """Part of a forward process that a network reads: the probability of no noise until a time."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def keep_probability(self, t: Tensor) -> Tensor:
        """Return the probability alpha(t) that a token has had no noise until time t."""
        return self.schedule.alpha(t)


class DdiffModel(PreTrainedModel):
    """Network that predicts clean tokens from noisy states.

        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
        logits = model(input_ids, timesteps=0.5).logits

    `components` maps ("backbone", kind) and ("head", kind) to the classes that build the network.
    """

    config_class = DdiffConfig
    main_input_name = "input_ids"
    components: ClassVar[Mapping[tuple[str, str], Any]] = {}

    def __init__(self, config: DdiffConfig) -> None:
        super().__init__(config)
        # The library builds models on the meta device. The tables of a vocabulary are not weights
        # and would have no values there.
        with torch.device("cpu"):
            vocabulary = build_vocabulary(config)
            self.schedule = build_schedule(config.schedule)
        process = None if self.schedule is None else ScheduledProcess(self.schedule)
        backbone = self._build(
            "backbone",
            config.backbone or {},
            vocabulary=vocabulary,
            length=config.length,
            process=process,
        )
        head = self._build("head", config.head or {}, vocabulary=vocabulary, width=backbone.width)
        # The denoiser checks both texts.
        given: Any = config.given
        inputs: Any = config.inputs
        self.denoiser = Denoiser(backbone, head, given, inputs)
        # Constants of a network are saved with its weights, because the library gives buffers that
        # are not saved no values.
        for module in self.modules():
            module._non_persistent_buffers_set.clear()
        self.post_init()

    def _build(self, kind: str, table: Mapping[str, Any], **inputs: Any) -> Any:
        """Build a component from its kind and keys, with the inputs that its `build` names."""
        keys = dict(table)
        name = str(keys.pop("kind", None))
        component = self.components.get((kind, name))
        if component is None:
            known = [other for each, other in self.components if each == kind]
            raise ArgumentError(
                f"DdiffModel: the configuration has the {kind} {name!r}, but the known ones are "
                f"{', '.join(known) or 'none'}. Load the model with trust_remote_code=True, or "
                "install the plugin of the component."
            )
        parameters = inspect.signature(component.build).parameters
        wanted = {name: value for name, value in inputs.items() if name in parameters}
        return component.build(component.Config(**keys), **wanted)

    def _init_weights(self, module: Any) -> None:
        # Constructors initialize their weights; those of a saved model are all in its file.
        pass

    def forward(
        self,
        input_ids: Tensor,
        timesteps: Tensor | float | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        block_ids: Tensor | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        return_dict: bool = True,
    ) -> MaskedLMOutput | tuple[Tensor]:
        """Return the logits [B,L,V] of the clean tokens; a score head returns [B,L,S].

        Args:
            input_ids: [B,L] states: ids of tokens, nodes of a tree and the mask.
            timesteps: noise time in [0,1], 0 for clean data: a number, [B] or [B,L]. Not needed by
                a network that does not read the time.
            attention_mask: [B,L], 0 at padding. None: no padding.
            document_ids: [B,L] number of the document of each position. None: one document.
            block_ids: [1 or B,L] number of the block of each position, which attends to its own
                and to earlier blocks. None: every position attends to every position.
            conditions: labels [B] or vectors [B,d] by name.
            return_dict: False returns a tuple.
        """
        noisy = Noisy(
            zt=input_ids,
            t=self._read_times(input_ids, timesteps),
            clean=torch.zeros_like(input_ids, dtype=torch.bool),
            block=block_ids,
        )
        context = Context(
            valid=None if attention_mask is None else attention_mask.bool(),
            document=document_ids,
            conditions=conditions or {},
        )
        hidden = self.denoiser.hidden_states(noisy, context)
        logits = self.denoiser.head(hidden).unflatten(0, input_ids.shape)
        return MaskedLMOutput(logits=logits) if return_dict else (logits,)

    def _read_times(self, input_ids: Tensor, timesteps: Tensor | float | None) -> Tensor:
        """Return the noise times [B,L] in float64. Raises ArgumentError if they are missing."""
        if timesteps is None:
            if self.denoiser.reads_time:
                raise ArgumentError(
                    "DdiffModel: timesteps must be noise times in [0, 1], because this network "
                    "reads the time; got None. Pass a number, or a tensor [B] or [B,L]."
                )
            timesteps = 0.0
        t = torch.as_tensor(timesteps, dtype=torch.float64, device=input_ids.device)
        if t.dim() == 1:
            t = t.unsqueeze(-1)
        return t.expand(input_ids.shape)

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor | None = None,
        batch_size: int = 1,
        length: int | None = None,
        steps: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw ids [B,L] by ancestral sampling of masked diffusion (arXiv 2406.07524).

        In a step from time t to s < t, a mask stays a mask with probability
        (1 - alpha(s)) / (1 - alpha(t)), and else becomes a draw of the predicted distribution. For
        other processes, samplers and filters, use `ddiff.load(folder).sample`.

        Args:
            prompt_ids: [L0] or [B,L0] first tokens, which do not change.
            batch_size: number of sequences; that of `prompt_ids` if it has two dimensions.
            length: number of positions; by default that of the training.
            steps: number of steps; by default that of the recipe.
            temperature: temperature of the predicted distribution, above 0.
            generator: random generator of torch, on the device of the model.
        """
        schedule = self._require_masked_diffusion(temperature)
        zt = self._start(prompt_ids, batch_size, length or self.config.length)
        # Given tokens are clean: a network reads the time 0 at their positions, also in training.
        is_given = zt != self.denoiser.head.vocabulary.root
        steps = steps or int((self.config.sample or {}).get("steps", 64))
        grid = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64, device=zt.device)
        for t, s in pairwise(grid):
            # The last step draws all masks, also if the schedule leaves noise at t = 0.
            stays = schedule.one_minus_alpha(s) / schedule.one_minus_alpha(t)
            stays = torch.where(s > 0.0, stays, 0.0)
            timesteps = torch.where(is_given, 0.0, t)
            logits = self(zt, timesteps=timesteps).logits[..., : self.config.num_tokens]
            probabilities = (logits / temperature).softmax(-1).flatten(0, 1)
            drawn = torch.multinomial(probabilities, 1, generator=generator).view(zt.shape)
            u = torch.rand(zt.shape, dtype=torch.float64, device=zt.device, generator=generator)
            moves = (zt == self.denoiser.head.vocabulary.root) & (u >= stays)
            zt = torch.where(moves, drawn, zt)
        return zt

    def _require_masked_diffusion(self, temperature: float) -> Schedule:
        """Return the schedule. Raises ArgumentError if `generate` cannot draw from this model."""
        is_plain = self.config.inputs == "own" and self.config.given == "rest"
        is_plain = is_plain and self.config.has_one_time
        if self.schedule is None or not self.config.is_masked_diffusion or not is_plain:
            raise ArgumentError(
                "DdiffModel.generate: the process must be masked diffusion with a schedule, and "
                "with one time per sequence; got another model. Install ddiff, and draw samples "
                "with ddiff.load(folder).sample()."
            )
        if not temperature > 0.0:
            raise ArgumentError(
                f"DdiffModel.generate: temperature must be above 0; got {temperature}. Use a small "
                "number, such as 0.01, for nearly the most likely tokens."
            )
        return self.schedule

    def _start(self, prompt_ids: Tensor | None, batch_size: int, length: int) -> Tensor:
        """Return masks [B,L] that begin with the prompt."""
        root = self.denoiser.head.vocabulary.root
        if prompt_ids is None:
            return torch.full((batch_size, length), root, device=self.device)
        prompt = prompt_ids.to(self.device)
        if prompt.dim() == 1:
            prompt = prompt.expand(batch_size, -1)
        if prompt.shape[1] > length:
            raise ArgumentError(
                f"DdiffModel.generate: prompt_ids must have at most length = {length} tokens; got "
                f"{prompt.shape[1]}. Pass a shorter prompt or a larger length."
            )
        zt = torch.full((len(prompt), length), root, device=self.device)
        zt[:, : prompt.shape[1]] = prompt
        return zt


def build_vocabulary(config: DdiffConfig) -> Vocabulary:
    """Build the vocabulary of a configuration."""
    if config.parents is None:
        return FlatVocabulary(config.num_tokens, mask=config.has_mask)
    return HierarchicalVocabulary(config.parents)


def build_schedule(table: Mapping[str, Any] | None) -> Schedule | None:
    """Build a schedule from its kind and settings; None for a model without a schedule."""
    if table is None:
        return None
    settings = dict(table)
    schedule: Schedule = SCHEDULES[settings.pop("kind")](**settings)
    return schedule
