"""Network of a run as a model of the transformers library.

`save_pretrained` writes a copy of this module, with every definition of ddiff that it needs, into
the folder of a saved model. Therefore only torch and transformers may be imported from outside of
ddiff, and all imports are at the top of a module.

Shapes: B sequences, L positions, V tokens, S states (the tokens, the nodes of a tree, the mask).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from ddiff.core.times import Noisy
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary, Vocabulary
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import Context, Denoiser
from ddiff.nn.network import as_network
from ddiff.runs.conditioning import SampleConditions, check_guidance
from ddiff.sampling.loop import Sampler, generate
from ddiff.sampling.shaping import guide_network

OTHER_WAY = (
    "Install ddiff (pip install discrete-diffusion), and draw samples with "
    "ddiff.load(folder).sample(), which has every sampler."
)
"""Advice for models and samplers that the file of a saved model lacks."""


class DdiffConfig(PreTrainedConfig):
    """Configuration of a saved model.

    Args:
        num_tokens: number V of tokens.
        has_mask: whether the last state is a mask.
        parents: for each level below the root of a tree, the index of each node's parent in the
            next level; None for a vocabulary without a tree.
        length: number of positions of a row in training.
        backbone: kind and keys of the backbone, as in the recipe.
        head: kind and keys of the output head, as in the recipe.
        inputs: "own", or "previous" for a network that predicts P(x_i | x_<i) at position i.
        given: "rest" if the logits at position i predict P(x_i | all other states), "all" if they
            predict P(x_i | all states).
        process: kind and keys of the forward process, as in the recipe; None for autoregression.
        is_windowed: whether the network was trained in windows from left to right, and never
            attended to noise after a window.
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
        process: dict[str, Any] | None = None,
        is_windowed: bool = False,
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
        self.process = process
        self.is_windowed = is_windowed
        self.sample = sample
        super().__init__(**kwargs)


class DdiffModel(PreTrainedModel):
    """Network that predicts clean tokens from noisy states.

        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
        logits = model(input_ids, timesteps=0.5).logits

    `components` maps (role, kind), such as ("backbone", "dit"), to the class that builds this part.
    The roles are backbone, head, process and sampler.
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
            self.process = self._build_process(config, vocabulary)
        backbone = self._build(
            "backbone",
            config.backbone or {},
            vocabulary=vocabulary,
            length=config.length,
            process=self.process,
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

    def _build_process(self, config: DdiffConfig, vocabulary: Vocabulary) -> Any:
        """Return the forward process; None for a model without one, or if its class is missing."""
        table = config.process
        if table is None or ("process", table["kind"]) not in self.components:
            return None
        return self._build("process", table, vocabulary=vocabulary, width=None)

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

    @property
    def has_sampler(self) -> bool:
        """True if `generate` can draw samples with the sampler of the recipe."""
        own = (self.config.sample or {}).get("sampler") or {}
        has_process = (self.process is None) == (self.config.process is None)
        return has_process and ("sampler", own.get("kind")) in self.components

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
        prompt_mask: Tensor | None = None,
        batch_size: int = 1,
        length: int | None = None,
        steps: int | None = None,
        seed: int | None = None,
        sampler: str | None = None,
        conditions: Mapping[str, Any] | None = None,
        guidance: float | None = None,
        **settings: Any,
    ) -> Tensor:
        """Draw sequences of tokens, and return their ids [B,L].

            ids = model.generate(batch_size=4, sampler="confidence", temperature=0.8, top_p=0.95)

        The draws are those of `ddiff.load(folder).sample` with the same settings and seed, if both
        compute in the same precision. Sampler, steps, seed, conditions and guidance are by default
        those in the table [sample] of the recipe.

        Args:
            prompt_ids: [L0] or [B,L0] first tokens, which do not change.
            prompt_mask: [L0] or [B,L0] bool, False at tokens of `prompt_ids` that are drawn again,
                for example to fill gaps. None: all tokens of `prompt_ids` are kept.
            batch_size: number B of sequences, unless `prompt_ids` has two dimensions.
            length: number L of positions; by default that of the training.
            steps: number of steps, for samplers that have one.
            seed: seed of the draws.
            sampler: name of a sampler in `components`, such as "ancestral" or "confidence".
            conditions: for each condition of the network, a label or a vector for all sequences,
                or one for each sequence.
            guidance: weight of classifier-free guidance; 1 is off.
            settings: settings of the sampler, such as temperature, top_k, top_p and min_p. Another
                sampler than that of the recipe has its own defaults.

        Raises ArgumentError if an argument is not valid, or if this model cannot be sampled here.
        """
        if self.config.process is not None and self.process is None:
            raise ArgumentError(
                f"DdiffModel.generate: the process {self.config.process['kind']!r} and its "
                "samplers could not be copied to the file of this model, which therefore gives "
                f"only logits. {OTHER_WAY}"
            )
        defaults = self.config.sample or {}
        prompt, given = self._frame(prompt_ids, prompt_mask, batch_size, length)
        steps = int(defaults.get("steps", 64)) if steps is None else steps
        built = self._build_sampler(sampler, steps, settings)
        values = defaults.get("conditions", {}) if conditions is None else conditions
        parsed = SampleConditions.parse(self.denoiser, values, len(prompt)).to(self.device)
        is_cached = built.cached and self.denoiser.caches
        network: Any = as_network(
            self.denoiser, self.process, Context(conditions=parsed.values), is_cached
        )
        weight = float(defaults.get("guidance", 1.0)) if guidance is None else guidance
        check_guidance(self.denoiser, parsed, weight)
        if weight != 1.0:
            without = as_network(self.denoiser, self.process, Context(), is_cached)
            network = guide_network(network, without, weight)
        return generate(
            built,
            self.process,
            network,
            index=torch.arange(len(prompt), device=self.device),
            length=prompt.shape[1],
            seed=int(defaults.get("seed", 0)) if seed is None else seed,
            prompt=prompt,
            prompt_mask=given,
        ).ids

    def _build_sampler(self, name: str | None, steps: int, settings: Mapping[str, Any]) -> Sampler:
        """Build the sampler `name` (None: that of the recipe) with changed settings."""
        own = dict((self.config.sample or {}).get("sampler") or {})
        kind = name or str(own.get("kind"))
        if ("sampler", kind) not in self.components:
            known = [other for role, other in self.components if role == "sampler"]
            raise ArgumentError(
                f"DdiffModel.generate: sampler must be one of {', '.join(known) or '(none)'}, "
                f"which are in the file of this model; got {kind!r}. {OTHER_WAY}"
            )
        inherited = own if kind == own.get("kind") else {"kind": kind}
        sampler: Sampler = self._build(
            "sampler",
            {**inherited, **settings},
            steps=steps,
            vocabulary=self.denoiser.head.vocabulary,
        )
        sampler.check_supported(self.process, self.denoiser.parameterization.predicts)
        if self.config.is_windowed and sampler.looks_ahead:
            raise ArgumentError(
                f"DdiffModel.generate: the sampler {kind!r} passes all positions to the network at "
                "once, but this model was trained in windows from left to right. Use the sampler "
                f"of the recipe, {own.get('kind')!r}."
            )
        return sampler

    def _frame(
        self,
        prompt_ids: Tensor | None,
        prompt_mask: Tensor | None,
        batch_size: int,
        length: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Return ids [B,L] that begin with the prompt, and a bool [B,L] that marks given tokens."""
        length = self.config.length if length is None else length
        if prompt_ids is None:
            prompt_ids = torch.zeros(0, dtype=torch.long)
        prompt = prompt_ids.to(self.device)
        if prompt.dim() == 1:
            prompt = prompt.expand(batch_size, -1)
        if prompt.shape[1] > length or length < 1 or len(prompt) < 1:
            raise ArgumentError(
                "DdiffModel.generate: batch_size and length must be at least 1, and prompt_ids may "
                f"have at most length = {length} tokens; got {list(prompt.shape)}. Pass a shorter "
                "prompt or a larger length."
            )
        given = torch.ones_like(prompt, dtype=torch.bool)
        if prompt_mask is not None:
            given = prompt_mask.to(self.device).bool().expand(given.shape)
        ids = torch.zeros(len(prompt), length, dtype=torch.long, device=self.device)
        ids[:, : prompt.shape[1]] = prompt
        kept = torch.zeros(ids.shape, dtype=torch.bool, device=self.device)
        kept[:, : prompt.shape[1]] = given
        return ids, kept


def build_vocabulary(config: DdiffConfig) -> Vocabulary:
    """Build the vocabulary of a configuration."""
    if config.parents is None:
        return FlatVocabulary(config.num_tokens, mask=config.has_mask)
    return HierarchicalVocabulary(config.parents)
