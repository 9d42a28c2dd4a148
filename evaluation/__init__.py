"""A set of sampled images: made in shards, read, judged."""
