"""What a model is before any tensor is touched: its files, configuration, tokenizer and chat template."""
