"""Drop-in pipelines: code written for diffusers' LoRA calls works unchanged, and gates compose what it loads.

A drop-in saves its mixture with the pipeline: experts, gates and strengths in one folder, see `kept.keep` and
`kept.attach_kept`.
"""
