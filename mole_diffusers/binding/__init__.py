"""Which words and which places are whose."""
