"""In and out of a pipeline: experts, gates and hooks are put on its models, and taken off again bit for bit."""
