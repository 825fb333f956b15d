"""LoraRetriever (Zhao et al., 2024) for concept LoRAs: find the LoRAs that a prompt needs, and compose them."""
