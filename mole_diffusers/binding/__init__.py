"""Binding: which words of the prompt, and which place in the picture, belong to which expert."""
