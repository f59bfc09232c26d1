"""Hierarchies over words from embeddings, co-occurrence counts or files: arrays in, parent arrays out."""
