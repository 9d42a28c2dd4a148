"""Train a router."""
