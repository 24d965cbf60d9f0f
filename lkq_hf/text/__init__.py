"""From documents and chat messages to tokens."""
