"""How many tokens a model has positions for."""

from transformers import PreTrainedConfig


def check_positions(config: PreTrainedConfig, prompt: int, answer: int = 0) -> None:
    """Checks that a prompt and its answer fit into a model's positions.

    Args:
        config: of a causal language model.
        prompt: tokens of the prompt.
        answer: tokens that may be generated after it.

    Raises:
        ValueError: they do not; beyond its positions a model answers at random.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and prompt + answer > longest:
        beside = f" and answers of up to {answer}" if answer else ""
        raise ValueError(
            f"prompts of {prompt} tokens{beside} are longer than the model's {longest} positions, beyond which it "
            f"answers at random: give prompts of at most {longest - answer} tokens"
        )
