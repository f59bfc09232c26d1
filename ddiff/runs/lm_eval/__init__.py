"""Adapter for the lm-evaluation-harness: `ddiff lm-eval`, `Run.lm_eval` and `--model ddiff`.

The package lm_eval is optional. Only the modules `model` and `harness` import it.
"""
