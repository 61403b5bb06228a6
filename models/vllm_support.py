"""Which models vLLM runs, asked without starting it. Importing vLLM takes seconds, so only a run that uses it asks."""

from ..contracts.errors import ModelError
from .loading import load_config


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
    heads = load_config(model).get_text_config().num_attention_heads
    if heads % parts:
        rule = "a model's attention heads are split evenly (tensor_parallel)"
        raise ModelError(rule, f"{model}: {heads} heads into {parts}", "set tensor_parallel to one of their divisors")
