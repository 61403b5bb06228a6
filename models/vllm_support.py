"""Which models vLLM runs, asked without starting it. Importing vLLM takes seconds, so only a run that uses it asks."""

from ..contracts.errors import ModelError
from .loading import load_config


def check_vllm_architecture(model: str) -> None:
    """Refuse a model of whose architecture vLLM has no implementation of its own. Raises ModelError.

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
