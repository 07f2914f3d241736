"""Text to token store to rows to batches, in numpy: vocabulary, token_store, rows, pipeline."""
