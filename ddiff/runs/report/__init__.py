"""Reports of runs: one HTML file without network access, from the files of run directories."""
