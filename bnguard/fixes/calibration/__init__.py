"""How running statistics are computed from data; knows the model, and leaves it as it found it."""
