"""Drop-in pipelines: code written for diffusers' LoRA calls works unchanged, and gates compose what it loads."""
