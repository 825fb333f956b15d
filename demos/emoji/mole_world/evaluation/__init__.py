"""Compare composers: methods x cases x seeds -> rows -> tables and figures, with intervals."""
