"""What a mixture costs, measured beside what else there is."""
