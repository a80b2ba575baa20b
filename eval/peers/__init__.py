"""The implementations that eval.rivals measures, each in a file of its own."""
