"""Two-stage group-wise quantisation: from a model to a checkpoint that `from_pretrained` loads."""
