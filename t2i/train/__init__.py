"""Training of image tokenizers and language models."""
