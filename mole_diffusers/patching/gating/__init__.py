"""While sampling: what the user set, where sampling is, what each gate decides, and which tokens each expert acts on."""
