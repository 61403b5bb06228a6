"""Small models of other architectures than Qwen3, and what they are compared with.

They are made from their own configurations with random weights by seed, in a folder with the tests' tokenizer. What is
peculiar to each stands in its line below; the sizes suit vLLM's CPU attention. The reference is a plain transformers
model in float64 that reads one sequence at a time.
"""

from pathlib import Path
from typing import Any

import torch
from learner_cases import OneProcess
from tiny import BOS, EOS, PAD, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from tutorloop.contracts.records import Term
from tutorloop.learner.examples import Example
from tutorloop.learner.loss_head import PackedStudent
from tutorloop.models.checkpoint import load_lm_head
from tutorloop.models.loading import load_causal_lm

TERMS = (Term(name="exact_divergence", weight=0.7), Term(name="policy_gradient", weight=0.3))

CONTEXT, VOCAB, WINDOW, EXPERTS = 160, 512, 12, 6
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.2,  # far from uniform, so that a wrong distribution shows
    "tie_word_embeddings": False,
}
OWN: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {},
    # one layer of each kind, another angle base in each, scaled embeddings, tied as every Gemma is
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 16,
        "tie_word_embeddings": True,
    },
    "mistral": {"sliding_window": WINDOW},
    "qwen3_moe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
}
ARCHITECTURES = tuple(OWN)


def small_model(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of `architecture` in float32; norms' weights are drawn too, so that a lost one shows."""
    config = AutoConfig.for_model(architecture, **(SIZES | OWN[architecture] | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_small(folder: Path, architecture: str, seed: int = 0, **changes: Any) -> str:
    """Save a small model with its tokenizer; the folder, as a model's name."""
    small_model(architecture, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def exactly(name: str):
    """The model in float64, by transformers' own attention and, where it has experts, one of them after the other."""
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64, experts_implementation="eager")


def response_logprobs(model, rollout):
    """log π `[R, V]` of the response's positions, and the response's ids."""
    ids = torch.tensor(rollout.token_ids, dtype=torch.long)
    logits = model(ids[None], use_cache=False).logits[0, rollout.prompt_length - 1 : -1]
    return logits.log_softmax(1), ids[rollout.prompt_length :]


def reference_loss(student, teacher, rollouts):
    """The two terms' means over all tokens, weighted; with its graph."""
    losses = []
    for rollout in rollouts:
        ours, ids = response_logprobs(student, rollout)
        with torch.no_grad():
            theirs, _ = response_logprobs(teacher, rollout)
        own = ours.gather(1, ids[:, None])[:, 0]
        gap = theirs.gather(1, ids[:, None])[:, 0] - own.detach()
        losses.append(0.7 * (ours.exp() * (ours - theirs)).sum(1) - 0.3 * gap * own)
    return torch.cat(losses).mean()


class Learner(OneProcess):
    """The learner without ranks, on a model of a folder."""

    def __init__(self, student: str, teacher: str) -> None:
        model = load_causal_lm(student, attention="packed")
        super().__init__(PackedStudent(model), TERMS, heads={"teacher": load_lm_head(teacher)})
        self.student, self.lora, self.engine.device = student, None, "cpu"
        self.report = None

    @property
    def parameters(self):
        return {name.removeprefix("model."): p for name, p in self.engine.module.named_parameters()}

    def train(self, rollouts, scores, random) -> None:
        """One step, in micro-batches of rollouts of very different lengths."""
        examples = [
            Example(rollout=r, advantage=0.0, weight=1.0, scores={"teacher": s})
            for r, s in zip(rollouts, scores, strict=True)
        ]
        order = random.permutation(len(examples)).tolist()
        self.report = self.learn(examples, [[order[:8], order[8:11], order[11:]]])
