"""What a mixture costs, measured next to the alternatives."""
