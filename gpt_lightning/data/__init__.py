"""Text in, batches out: corpus, tokenizers, tokens, windows, datamodule, in this order."""
