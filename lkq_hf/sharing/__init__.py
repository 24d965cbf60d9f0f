"""What adapters, checkpoints and caches need to be shared on the Hub: cards, commits, errors."""
