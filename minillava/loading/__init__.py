"""Reading checkpoints, from disk or the hub: configuration, tokenizer, image processor, weights."""
