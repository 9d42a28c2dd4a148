"""A name or a path becomes a DiT and a VAE."""
