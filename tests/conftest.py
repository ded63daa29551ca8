"""What holds for every test."""

import os

# Idle threads of torch that spin make tests beside one another several times slower; read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
