"""How good pictures are: reconstruction, Fréchet distance, agreement with their captions."""
