"""Tiny random models for tests: a real architecture and a real tokenizer in a folder, made from a seed in a moment."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>"]
PAD, BOS, EOS = 0, 1, 2
CHAT = (
    "{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<assistant>' }}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, no merges: 5 special tokens and 256 bytes, 261 ids."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def _sizes(vocab: int, hidden: int, layers: int, tied: bool, context: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": 0.3,  # far from uniform, so that a wrong distribution shows
    }


def tiny_model(architecture: str = "qwen3", *, window: int = 4, seed: int = 0, **sizes: Any) -> Any:
    """A random model of `architecture`: qwen3, llama, or mistral with a sliding `window`."""
    sizes = _sizes(**({"vocab": 300, "hidden": 32, "layers": 2, "tied": False, "context": 128} | sizes))
    torch.manual_seed(seed)
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    assert architecture == "mistral", architecture
    return MistralForCausalLM(MistralConfig(**sizes, sliding_window=window)).eval()


def save_tiny(folder: Path, architecture: str, *, seed: int = 0, **sizes: Any) -> str:
    """Save a tiny model with its tokenizer; the folder, as a model's name."""
    tiny_model(architecture, seed=seed, **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_qwen3(
    folder: Path,
    *,
    vocab: int = 300,
    hidden: int = 32,
    layers: int = 2,
    tied: bool = False,
    context: int = 128,
    seed: int = 0,
) -> str:
    """A tiny Qwen3 with its tokenizer and chat template in `folder`; the folder, as a model's name."""
    return save_tiny(folder, "qwen3", vocab=vocab, hidden=hidden, layers=layers, tied=tied, context=context, seed=seed)
