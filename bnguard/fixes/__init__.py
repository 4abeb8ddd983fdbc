"""The repairs: each takes a model or its state, and says what it did and how to take it back."""
