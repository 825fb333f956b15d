"""Compare composers: arms x cases x seeds -> rows -> tables and figures, with intervals."""
