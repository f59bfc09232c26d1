"""Runs: build, train, evaluate and sample recipes, and manage run directories."""
