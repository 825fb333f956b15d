"""Training-free merges: several LoRAs become one ordinary LoRA. The maths imports torch only."""
