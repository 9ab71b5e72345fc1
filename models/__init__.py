"""Torch modules and the three ways to open one: embedded, `hf:`, `lerobot:`. Knows schemas."""
