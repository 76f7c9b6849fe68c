"""Auto-regressive text-to-image models."""
