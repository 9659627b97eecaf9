"""What prefetch and eviction are worth: first epochs beside peers, S3 far away, and a dataset twice the cache."""
