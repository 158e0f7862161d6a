"""Ranks, the DeepSpeed engine and checkpoints: the only importer of deepspeed."""
