"""What methods share: second models, tables and indexes on disk, trees of ranks."""
