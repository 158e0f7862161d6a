"""Data in: readers, tasks, leak guard, prepared shards, tokens, batches, generated populations."""
