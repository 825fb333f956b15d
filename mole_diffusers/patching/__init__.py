"""A diffusers model with experts in it.

host/ knows what differs between models, gating/ acts while sampling, install/ puts experts in and takes them out, and
subjects/ draws the things of a prompt apart.
"""
