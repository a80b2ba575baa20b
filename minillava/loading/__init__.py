"""Read a checkpoint from a folder or the hub: config, tokenizer, image settings and weights."""
