"""The experiments of the pruning papers, each a command that writes tables and plots."""
