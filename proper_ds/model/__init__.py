"""The mathematics: frozen base, LoRA slots, experts, routers, adapter files. Knows torch and transformers only."""
