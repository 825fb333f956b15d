"""The subjects of a prompt: drawn apart at first and then joined, or found in a given picture."""
