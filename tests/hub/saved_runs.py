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
    "tied": ['denoiser.head="tied"', "denoiser.given=all"],
}
"""Settings of each run. The first run has an exponential moving average."""
