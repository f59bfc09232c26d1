"""Runs of recipes of several fields: data, model, evaluation and samples."""
