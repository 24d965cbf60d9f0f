"""Names in files and of files by which everyone knows what they hold."""

PEFT_TYPE = "LOOKAHEAD_KV"
"""The `peft_type` in the adapter_config.json of an adapter."""

QUANT_METHOD = "two_stage_gptq"
"""The `quant_method` in the config.json of a checkpoint in our own format."""

RECIPE = QUANT_METHOD
"""The key in the config.json of an exported checkpoint under which the origin of its weights is recorded."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
"""A directory with one of these holds a tokenizer."""
