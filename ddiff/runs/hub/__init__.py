"""Saved models of the transformers library, and the Hugging Face hub."""
