"""Settings of the runs whose saved models are tested."""

from __future__ import annotations

from small import FLAT

SHORT = ["train.steps=2", "sample.count=1", "sample.gaps=0", "tokenizer.size=262"]
RUNS = {
    "tree": ["train.ema=0.5"],
    "flat": [*FLAT, "denoiser.time=false", "denoiser.convolution=3", "denoiser.qk_norm=true"],
    "score": [
        'plugins=["sedd", "dit"]',
        'vocabulary={kind="flat"}',
        'process={kind="sedd"}',
        'denoiser={kind="ddit", width=16, layers=1, heads=2, head="score"}',
        'sample.sampler="analytic"',
    ],
    "decoder": [
        'plugins=["mdlm", "hf"]',
        'vocabulary={kind="flat"}',
        'process={kind="mdlm"}',
        'denoiser={kind="hf", architecture="llama", settings={hidden_size=16, num_hidden_layers=1, '
        "num_attention_heads=2, intermediate_size=16, max_position_embeddings=64}}",
    ],
    "uniform": [
        'plugins=["sedd", "dit"]',
        'vocabulary={kind="flat", mask=false}',
        'process={kind="sedd", graph="uniform"}',
        'denoiser.head="tokens"',
    ],
    "blocks": [
        *FLAT,
        'objective.times={kind="block", width=4}',
        'sample.sampler={kind="blockwise", width=4}',
    ],
    "tied": ['denoiser.head="tied"', "denoiser.given=all"],
}
"""Settings of each run. The first run has an exponential moving average."""
