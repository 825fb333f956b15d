"""Training: concept LoRAs from pictures, and gates over finished LoRAs from pictures or from prompts alone."""
