"""Runs: build a recipe, train, evaluate and sample it, and keep its directory."""
