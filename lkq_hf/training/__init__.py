"""Training a lookahead adapter: prompts, targets, loss and trainer."""
