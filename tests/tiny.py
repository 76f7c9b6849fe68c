"""Settings that make training runs small enough for tests."""

TINY_TOKENIZER = [
    "run.threads=1",
    "run.device=cpu",
    "run.precision=fp32",
    "model.overrides={channels = [16, 16, 16], encoder_blocks = [1, 1], decoder_blocks = [1, 1, 1],"
    " num_heads = 2, num_codes = 32, code_dim = 4}",
    "optim.batch_size=8",
    "optim.warmup_steps=2",
    "data.shift=1",
]
TINY_LM = [
    "run.threads=1",
    "run.device=cpu",
    "run.precision=fp32",
    "model.overrides={dim = 32, num_layers = 2, num_heads = 2, ffn_dim = 64, text_vocab_size = 300,"
    " image_vocab_size = 32, max_positions = 64, dropout = 0.1}",
    "text.vocab_size=300",
    "optim.batch_size=8",
    "optim.warmup_steps=2",
]
