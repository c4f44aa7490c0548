"""Container images without a registry: built or taken on a laptop, moved between hosts layer by layer."""
