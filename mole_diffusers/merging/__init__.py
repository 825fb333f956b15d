"""Training-free composers that give one ordinary LoRA: the maths in files that know torch alone, then experts in and out."""
