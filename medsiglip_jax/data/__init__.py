"""What there is to read: tables, folders, shards, and the batches that are made of them."""
