"""Token hierarchies from embeddings, co-occurrence counts or files, as arrays of parents."""
