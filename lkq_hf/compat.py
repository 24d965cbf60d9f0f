"""What the libraries below this package rename or move from version to version, in one place.

- The name under which a model takes its cache: [`cache_name`], [`pass_cache`], [`find_cache`],
  [`rename_cache`].
- Whether transformers works with the installed PEFT: [`adapter_methods_work`].
- The versions that are tested, a warning about newer ones, and errors that name both: [`warn_of_newer_versions`],
  [`incompatible`], [`explained_imports`].
- The private parts that this package uses: [`PRIVATE_PARTS`].
"""

import functools
import importlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from packaging.version import Version

TESTED_VERSIONS = {
    "torch": ("2.11", "2.15.0"),
    "transformers": ("5.17", "5.24.0"),
    "peft": ("0.21", "0.21.2"),
    "accelerate": ("1.11", "1.15.0"),
    "optimum": ("2.0", "2.3.0"),
    "huggingface-hub": ("1.0", "2.4.0"),
}
"""For each library whose inside this package depends on: the oldest version in setup.cfg, the newest one tested."""

CHUNKED_TURNS_SINCE = Version("5.21")
"""The first transformers whose ``generate`` can read a later turn in chunks."""

CACHE_NAMES = ("cache", "past_key_values")
"""Names under which transformers passes a cache: from 5.24 on, and before."""

PRIVATE_PARTS = (
    # attention.py, cache/: the attention functions, the masks, the layers of a cache and what generate makes of them.
    "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS",
    "transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS",
    "transformers:PreTrainedConfig._attn_implementation",
    "transformers:PreTrainedModel._supports_attention_backend",
    "transformers.integrations.sdpa_attention:sdpa_attention_forward(attention_mask, dropout, scaling)",
    "transformers.masking_utils:sdpa_mask",
    "transformers.masking_utils:create_masks_for_generate(config, inputs_embeds, attention_mask, position_ids, "
    "or_mask_function, and_mask_function, block_sequence_ids)",
    "transformers.generation:GenerationMixin.prepare_inputs_for_generation(attention_mask)",
    "transformers.generation:GenerationMixin._sample(input_ids, logits_processor, stopping_criteria, "
    "generation_config, streamer)",
    "transformers.generation:GenerationMixin._prefill(input_ids, generation_config, model_kwargs)",
    "transformers.generation:GenerationMixin._update_model_kwargs_for_generation(outputs, model_kwargs)",
    "transformers.generation:GenerationMixin._valid_auto_compile_criteria(model_kwargs, generation_config)",
    "transformers.generation:GenerationMixin._optimize_model_for_decode",
    "transformers:PreTrainedModel.get_compiled_call(compile_config)",
    "torch._inductor.custom_graph_pass:CustomGraphPass",
    "torch._inductor.custom_graph_pass:get_hash_for_files(paths, extra)",
    "torch._inductor.config:post_grad_custom_pre_pass",
    "transformers.cache_utils:Cache.update(key_states, value_states, layer_idx)",
    "transformers.cache_utils:Cache.get_mask_sizes(query_length, layer_idx)",
    "transformers.cache_utils:Cache.activate_past_recording",
    "transformers.cache_utils:Cache.crop(tokens_to_remove)",
    "transformers.cache_utils:DynamicCache(config)",
    "transformers.cache_utils:DynamicLayer.lazy_initialization(key_states, value_states)",
    "transformers.cache_utils:DynamicLayer.get_mask_sizes(query_length)",
    "transformers.cache_utils:DynamicLayer.reorder_cache(beam_idx)",
    "transformers.cache_utils:DynamicLayer.batch_repeat_interleave(repeats)",
    "transformers.cache_utils:DynamicLayer.batch_select_indices(indices)",
    "transformers.cache_utils:DynamicSlidingWindowLayer(sliding_window)",
    # adapter/: a type of PEFT's own, and what a tuner may override.
    "peft:PeftType.__members__",
    "peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING",
    "peft.utils:register_peft_method",
    "peft.tuners.tuners_utils:check_target_module_exists",
    "peft.tuners.tuners_utils:BaseTuner.inject_adapter(model, adapter_name)",
    "peft.tuners.tuners_utils:BaseTuner._prepare_adapter_config(peft_config, model_config)",
    "peft.tuners.tuners_utils:BaseTuner._prepare_model(peft_config, model)",
    "peft.tuners.tuners_utils:BaseTuner._check_target_module_exists",
    "peft.tuners.tuners_utils:BaseTuner._create_and_replace(peft_config, adapter_name, target, target_name, parent, "
    "current_key)",
    "peft.tuners.tuners_utils:BaseTuner._replace_module(parent, child_name, new_module, child)",
    "peft.tuners.tuners_utils:BaseTuner._remove_adapter_name_from_key(key, adapter_name)",
    "peft.tuners.tuners_utils:BaseTuner._get_adapter_state_dict",
    "peft.tuners.tuners_utils:BaseTuner._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)",
    "peft.tuners.tuners_utils:BaseTunerLayer._move_adapter_to_device_of_base_layer(adapter_name)",
    "peft.tuners.tuners_utils:BaseTunerLayer._active_adapter",
    # hub/: loading into a model of transformers, and the moment before an upload.
    "transformers:PreTrainedModel._hf_peft_config_loaded",
    "transformers.integrations.peft:MIN_PEFT_VERSION",
    "peft.functional:delete_adapter(model, adapter_name, prefix)",
    "transformers:PreTrainedModel._upload_modified_files(working_dir, repo_id)",
    # quantization/: a quantization method of transformers' own, and how it reads checkpoints.
    "transformers.quantizers.auto:register_quantizer",
    "transformers.quantizers.auto:register_quantization_config",
    "transformers.quantizers.base:HfQuantizer._process_model_before_weight_loading(model)",
    "transformers.quantizers.base:HfQuantizer._process_model_after_weight_loading(model)",
    "transformers.quantizers.base:HfQuantizer._dequantize(model)",
    "transformers.quantizers.base:HfQuantizer.get_state_dict_and_metadata(model)",
    "transformers.utils.quantization_config:QuantizationConfigMixin.from_dict(config_dict)",
    "transformers.conversion_mapping:get_model_conversion_mapping",
    "transformers.core_model_loading:WeightConverter",
    "transformers.core_model_loading:WeightRenaming",
    "transformers.pytorch_utils:Conv1D",
    "transformers:PreTrainedModel._no_split_modules",
    # training/: the parts of Trainer that save, resume and sample.
    "transformers:Trainer._save_optimizer_and_scheduler",
    "transformers:Trainer._load_from_checkpoint",
    "transformers:Trainer._load_optimizer_and_scheduler",
    "transformers:Trainer._get_train_sampler(train_dataset)",
    "transformers.trainer:TRAINER_STATE_NAME",
    "transformers.trainer_utils:PREFIX_CHECKPOINT_DIR",
    "transformers.trainer_utils:has_length",
    "transformers.trainer_pt_utils:get_length_grouped_indices",
)
"""Parts of transformers and PEFT outside of their documented interfaces: ``module:object(arguments)``."""

_Cache = TypeVar("_Cache")


@functools.cache
def cache_name() -> str:
    """The name under which the installed transformers passes a cache to a model.

    Raises:
        ImportError: it is neither of ``CACHE_NAMES``.
    """
    from transformers.generation import GenerationMixin

    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise incompatible(f"generate passes a cache under none of the names {', '.join(CACHE_NAMES)}")


def pass_cache(cache: Any) -> dict[str, Any]:
    """The keyword argument that passes ``cache`` to a model or to ``generate``."""
    return {cache_name(): cache}


def find_cache(arguments: Mapping[str, Any], kind: type[_Cache]) -> _Cache | None:
    """The cache of this kind among keyword arguments or a model's outputs, under whichever name; None if none is."""
    for name in CACHE_NAMES:
        found = arguments.get(name)
        if isinstance(found, kind):
            return found
    return None


def rename_cache(arguments: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The same keyword arguments with this cache under the name that the installed transformers uses."""
    return {name: value for name, value in arguments.items() if name not in CACHE_NAMES} | pass_cache(cache)


def later_chunks_work() -> bool:
    """Whether ``generate`` can read chunks of a later turn: older versions begin at the start of the text again."""
    return Version(version("transformers")) >= CHUNKED_TURNS_SINCE


def adapter_methods_work() -> bool:
    """Whether a model's own methods for adapters (``add_adapter``, ``set_adapter``, ``save_pretrained``, ...) work.

    transformers refuses them with a PEFT that is older than it wants, which may be every PEFT that there is.
    """
    from transformers.integrations.peft import MIN_PEFT_VERSION

    return Version(version("peft")) >= Version(MIN_PEFT_VERSION)


def installed_versions() -> dict[str, str]:
    """Versions of the libraries of ``TESTED_VERSIONS`` that are installed."""
    found = {}
    for name in TESTED_VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def newer_versions() -> dict[str, str]:
    """Installed libraries that are newer than the newest version tested, and their versions."""
    # Without what a build adds behind the plus sign, such as "cpu".
    return {
        name: found
        for name, found in installed_versions().items()
        if Version(Version(found).public) > Version(TESTED_VERSIONS[name][1])
    }


def warn_of_newer_versions() -> None:
    """Warns (UserWarning) about libraries that are newer than those tested. Called once, at import."""
    newer = newer_versions()
    if newer:
        warnings.warn(
            "lkq-hf was not tested with "
            + ", ".join(f"{name} {found} (newest tested: {TESTED_VERSIONS[name][1]})" for name, found in newer.items())
            + ". If something fails that should not, install the tested version: "
            + _install_command(newer),
            stacklevel=3,
        )


def incompatible(difference: str) -> ImportError:
    """The error to raise where a library lacks something essential.

    Args:
        difference: what was expected of the library and what was found, without a full stop.
    """
    installed = installed_versions()
    return ImportError(
        f"lkq-hf does not fit the installed libraries: {difference}. Found "
        + ", ".join(f"{name} {found}" for name, found in installed.items())
        + "; tested with "
        + ", ".join(f"{name} {oldest} to {newest}" for name, (oldest, newest) in TESTED_VERSIONS.items())
        + f". Install tested versions: {_install_command(newer_versions() or installed)}"
    )


def require_parts(owner: Any, *names: str) -> None:
    """Checks that an object of another library has these attributes.

    Raises:
        ImportError: it lacks one.
    """
    kind = owner if isinstance(owner, type) else type(owner)
    for name in names:
        if not hasattr(owner, name):
            raise incompatible(f"{kind.__module__}.{kind.__qualname__} has no {name}")


def require_cache_support() -> None:
    """Checks that transformers has what a LookaheadCache needs of every model, so that no model is blamed for it.

    Raises:
        ImportError: it lacks something.
    """
    from transformers import PreTrainedConfig, PreTrainedModel

    cache_name()
    require_parts(PreTrainedModel, "_supports_attention_backend")
    require_parts(PreTrainedConfig, "_attn_implementation")


@contextmanager
def explained_imports() -> Iterator[None]:
    """Explains an import that fails because a library outside of the tested versions moved something.

    Raises:
        ImportError: with the versions, and the parts that are missing.
    """
    try:
        yield
    except (ImportError, AttributeError, TypeError) as error:
        missing = [part for part in PRIVATE_PARTS if not has_part(part)]
        if not missing:
            raise
        raise incompatible(f"missing are {', '.join(missing)} ({error})") from error


def has_part(part: str) -> bool:
    """Whether an entry of ``PRIVATE_PARTS`` exists, with the arguments that it names."""
    path, _, arguments = part.removesuffix(")").partition("(")
    module, _, attributes = path.partition(":")
    try:
        found = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError):
        return False
    return not arguments or set(arguments.split(", ")) <= set(inspect.signature(found).parameters)  # type: ignore[arg-type]


def _install_command(names: Mapping[str, Any]) -> str:
    ranges = [f"'{name}>={TESTED_VERSIONS[name][0]},<={TESTED_VERSIONS[name][1]}'" for name in names]
    return f"pip install {' '.join(ranges)}"
