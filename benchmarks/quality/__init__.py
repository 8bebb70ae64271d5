"""KV caches as published, simulated inside a Hugging Face model: one file per method."""
