"""Prompts and images -> Batch, and ids -> text: templates, SentencePiece, placeholders."""
