"""``python -m t2i``, and ``torchrun -m t2i train …``."""

from t2i.cli import main

main()
