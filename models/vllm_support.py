"""Which models vLLM runs, asked without starting it. Importing vLLM takes seconds, so only a run that uses it asks."""

from ..contracts.errors import ModelError
from .folders import INDEX, read_json, weight_files
from .loading import load_config, locate_model, varying_frequencies


def check_vllm_architecture(model: str, parts: int = 1) -> None:
    """Refuse a model of whose architecture vLLM has no implementation of its own, or that it cannot split into `parts`.
    Raises ModelError.

    vLLM could run some others through transformers' modules; into those new weights were never tried.
    """
    try:
        from vllm.model_executor.models.registry import ModelRegistry
    except ImportError as error:
        raise ModelError(
            "the vllm engine needs vLLM", str(error), "install vllm==0.32.0, or set engine=transformers"
        ) from error
    named = load_config(model).architectures or []
    if not set(named) & ModelRegistry.get_supported_archs():
        found = f"{model}: {', '.join(named) or 'its config.json names no architecture'}"
        raise ModelError("vLLM has the model's architecture", found, "set engine=transformers")
    varying = varying_frequencies(load_config(model))
    if varying:
        found = f"{model}: rope_type={varying[0]}"
        rule = "a model under vLLM has one set of rotary frequencies, whatever a sequence's length"
        raise ModelError(
            rule, found, "set engine=transformers, and keep prompt and response within its original length"
        )
    check_vllm_files(model)
    heads = load_config(model).get_text_config().num_attention_heads
    if heads % parts:
        rule = "a model's attention heads are split evenly (tensor_parallel)"
        raise ModelError(rule, f"{model}: {heads} heads into {parts}", "set tensor_parallel to one of their divisors")


def check_vllm_files(model: str) -> None:
    """Refuse a folder of which vLLM would load other files than transformers: those that the index names, where there
    is one, and else every safetensors file. Raises ModelError."""
    folder = locate_model(model)
    ours = weight_files(model, folder)
    theirs = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        shards = set(read_json(model, folder / INDEX).get("weight_map", {}).values())
        theirs = [file for file in theirs if file.name in shards]
    if theirs != ours:
        ours_shown, theirs_shown = (", ".join(file.name for file in files[:3]) or "none" for files in (ours, theirs))
        found = f"{model}: transformers loads {ours_shown}; vLLM would load {theirs_shown}"
        remedy = "move the files of the other model out of the folder, or set engine=transformers"
        raise ModelError("vLLM and transformers load the same files of a folder", found, remedy)
