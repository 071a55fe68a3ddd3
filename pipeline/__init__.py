"""Commands, training loop and everything they are made of."""
