"""Components of recipes that are part of ddiff itself, such as samplers, heads and optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff import hookimpl

if TYPE_CHECKING:
    from ddiff import Registry

# Targets are strings, so that nothing heavy is imported until a recipe selects a component.
COMPONENTS = {
    "dataset": {
        "bundled": "ddiff_core.data:Bundled",
        "chat": "ddiff_core.chat_data:Chat",
        "digit_rows": "ddiff_core.data:DigitRows",
        "files": "ddiff_core.data:Files",
        "hub": "ddiff_core.data:Hub",
        "jsonl": "ddiff_core.data:JsonLines",
        "markov": "ddiff_core.data:Markov",
        "names": "ddiff_core.data:Names",
        "number_questions": "ddiff_core.chat_data:NumberQuestions",
        "shards": "ddiff_core.data:Shards",
        "standard_library": "ddiff_core.data:StandardLibrary",
        "symbols": "ddiff_core.data:Symbols",
        "text": "ddiff_core.data:Text",
        "vector_files": "ddiff_core.vector_documents:ConditionedVectorFiles",
        "vector_shards": "ddiff_core.vector_documents:ConditionedVectorShards",
    },
    "fields_dataset": {
        "digits": "ddiff_core.fields_data:Digits",
        "encoded_texts": "ddiff_core.fields_files:EncodedTexts",
        "image_tables": "ddiff_core.fields_files:ImageTables",
        "images": "ddiff_core.fields_files:Images",
        "sentences": "ddiff_core.sentences:Sentences",
        "shapes": "ddiff_core.fields_data:Shapes",
        "token_grids": "ddiff_core.fields_files:TokenGrids",
        "vector_files": "ddiff_core.fields_files:VectorFiles",
        "vector_shards": "ddiff_core.fields_files:VectorShards",
    },
    "tokenizer": {
        "alphabet": "ddiff_core.tokenizers:Alphabet",
        "bpe": "ddiff_core.tokenizers:BytePair",
        "letters": "ddiff_core.tokenizers:Letters",
        "pretrained": "ddiff_core.tokenizers:Pretrained",
        "saved": "ddiff_core.tokenizers:Saved",
        "words": "ddiff_core.tokenizers:Words",
    },
    "vocabulary": {
        "clusters": "ddiff_core.vocabularies:Clusters",
        "file": "ddiff_core.vocabularies:File",
        "flat": "ddiff_core.vocabularies:Flat",
        "patterns": "ddiff_core.token_patterns:Patterns",
    },
    "head": {
        "levelwise": "ddiff_core.heads:Levelwise",
        "tied": "ddiff_core.heads:Tied",
        "tokens": "ddiff_core.heads:Tokens",
        "vector": "ddiff_core.heads:Vector",
    },
    "objective": {"nelbo": "ddiff_core.objectives:Nelbo"},
    "training_loss": {
        "clip": "ddiff_core.objectives:Clip",
        "elbo": "ddiff_core.objectives:Elbo",
        "min_snr": "ddiff_core.vector_losses:MinSignalToNoise",
        "output_mse": "ddiff_core.vector_losses:OutputError",
        "sigmoid": "ddiff_core.vector_losses:Sigmoid",
    },
    "time_rule": {
        "block": "ddiff_core.objectives:Block",
        "flat": "ddiff_core.objectives:Flat",
        "occupancy": "ddiff_core.objectives:Occupancy",
        "quenched": "ddiff_core.objectives:Quenched",
        "slide": "ddiff_core.objectives:Slide",
    },
    "optimizer": {
        "adamw": "ddiff_core.optimizers:AdamW",
        "adamw_8bit": "ddiff_core.optimizers:AdamW8bit",
        "muon": "ddiff_core.optimizers:Muon",
    },
    "backend": {
        "ddp": "ddiff_core.backends:DataParallel",
        "fsdp": "ddiff_core.backends:FullySharded",
        "single": "ddiff_core.backends:Single",
    },
    "sampler": {
        "acs": "ddiff_core.samplers:AdaptiveCorrection",
        "analytic": "ddiff_core.samplers:Analytic",
        "ancestral": "ddiff_core.samplers:Ancestral",
        "blockwise": "ddiff_core.samplers:Blockwise",
        "hyperschedule": "ddiff_core.samplers:Hyperschedule",
        "confidence": "ddiff_core.samplers:Confidence",
        "ddim": "ddiff_core.samplers:Ddim",
        "ddpm": "ddiff_core.samplers:Ddpm",
        "dfm": "ddiff_core.samplers:PredictorCorrector",
        "entropy": "ddiff_core.samplers:EntropyBound",
        "euler": "ddiff_core.samplers:Euler",
        "first_hitting": "ddiff_core.samplers:FirstHitting",
        "heun": "ddiff_core.samplers:Heun",
        "margin": "ddiff_core.samplers:Margin",
        "one_level": "ddiff_core.samplers:OneLevel",
        "psi": "ddiff_core.samplers:Psi",
        "remdm": "ddiff_core.samplers:Remasking",
        "sde": "ddiff_core.samplers:ReverseSde",
        "self_correction": "ddiff_core.samplers:SelfCorrection",
        "tau_leaping": "ddiff_core.samplers:TauLeaping",
        "trapezoidal": "ddiff_core.samplers:Trapezoidal",
    },
    "path_rule": {
        "cycle": "ddiff_core.paths:Cycle",
        "first": "ddiff_core.paths:First",
        "independent": "ddiff_core.paths:Independent",
        "lagged": "ddiff_core.paths:Lagged",
        "mixture": "ddiff_core.paths:Mixture",
        "shared": "ddiff_core.paths:Shared",
    },
    "normalizer": {
        "none": "ddiff_core.normalizers:Unchanged",
        "pca": "ddiff_core.normalizers:Pca",
        "standard": "ddiff_core.normalizers:Standard",
    },
    "judge": {
        "digits": "ddiff_core.judges:DigitsJudge",
        "shapes": "ddiff_core.judges:ShapesJudge",
        "strings": "ddiff_core.string_judge:StringsJudge",
        "vectors": "ddiff_core.judges:VectorsJudge",
    },
    "tracker": {
        "none": "ddiff_core.trackers:Disabled",
        "tensorboard": "ddiff_core.tensorboard:TensorBoard",
        "wandb": "ddiff_core.trackers:WeightsAndBiases",
    },
}


@hookimpl
def ddiff_register(registry: Registry) -> None:
    for kind, targets in COMPONENTS.items():
        for name, target in targets.items():
            registry.add(kind, name, target)
