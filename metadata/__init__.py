"""What exists in a volume and how new that knowledge is: inodes, entries, listings, freshness. No bytes of files."""
