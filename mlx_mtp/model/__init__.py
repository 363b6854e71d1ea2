"""An mlx-lm model with mask tokens, gated LoRA weights and caches."""
