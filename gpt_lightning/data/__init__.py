"""Text in, batches out: corpora -> tokenizers -> tokens -> windows -> datamodule."""
