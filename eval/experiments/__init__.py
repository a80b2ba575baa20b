"""The experiments of the pruning papers, each one command that writes a table and a picture."""
