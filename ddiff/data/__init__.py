"""Documents, tokenizers, packed rows and batches. Nothing in this package depends on diffusion.

documents = load_bundled_novels()
tokenizer = BytePairTokenizer.train(documents.train["text"], size=2048)
rows      = pack(documents.train, tokenizer, length=64)
batch     = batch_rows(rows, row_at(seed=0, position=np.arange(32), num_rows=len(rows)))
"""
