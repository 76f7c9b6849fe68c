"""Training of image tokenizers and language models from configuration files."""
