"""Token hierarchies from embeddings, co-occurrence counts or files."""
