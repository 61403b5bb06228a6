"""On-policy distillation, the algorithm without the system: one file of PyTorch and transformers, for reading.

A student learns from a teacher on text that the STUDENT wrote. One step:
  1. sample   the student answers a batch of problems;
  2. score    the teacher reads those answers in one forward pass: at each token, what would it have written here?
  3. learn    move the student's next-token distribution towards the teacher's, by the reverse KL(student‖teacher).
Training on the teacher's own text (plain distillation) never shows the student its own mistakes; here the teacher
corrects the very prefixes that the student gets into, with a distribution at each token, not one reward an answer.
Source: GKD, arXiv:2306.13649, with β = 1; Thinking Machines, "On-Policy Distillation" (2025).

    python recipes/opd_in_100_lines.py [steps]      about a minute on two cores for the default 60 steps

Shapes: B answers, P prompt tokens, R response tokens, V vocabulary.
"""

import json
import math
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LAB = Path(__file__).resolve().parent.parent / "lab"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 60
BATCH, MAX_NEW_TOKENS, LEARNING_RATE, WARMUP, MAX_GRAD_NORM = 96, 64, 1e-3, 20, 1.0

torch.manual_seed(0)
torch.set_num_threads(2)
shuffle = random.Random(0)
tokenizer = AutoTokenizer.from_pretrained(LAB / "models/student", padding_side="left")  # the teacher's is the same
student = AutoModelForCausalLM.from_pretrained(LAB / "models/student")
teacher = AutoModelForCausalLM.from_pretrained(LAB / "models/teacher")


def problems(split: str) -> list[dict]:
    """Rows such as {"prompt": "... 19 + 61 =", "answer": "80"}."""
    return [json.loads(line) for line in (LAB / f"data/{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def sample(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The student's answers: tokens [B, P+R], their attention mask [B, P+R], and P. Prompts are padded on the left."""
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    # No top-k, no top-p, temperature 1: the text must come from the very distribution that is trained.
    tokens = student.generate(**prompts, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS)
    prompt_length = prompts["input_ids"].shape[1]
    ended = (tokens[:, prompt_length:] == tokenizer.eos_token_id).int()
    is_response = ended.cumsum(1) - ended == 0  # up to and with the end-of-turn token; the rest is padding
    return tokens, torch.cat([prompts["attention_mask"], is_response.long()], 1), prompt_length


def response_logprobs(model, tokens: torch.Tensor, mask: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """log p(next token | prefix) for every response token: [B, R, V]. The logits at position t predict token t+1."""
    logits = model(tokens, attention_mask=mask).logits
    return logits[:, prompt_length - 1 : -1].log_softmax(-1)


def reverse_kl(tokens: torch.Tensor, mask: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """KL(student‖teacher) in nats, exact over the vocabulary, mean over the response tokens; differentiable."""
    ours = response_logprobs(student, tokens, mask, prompt_length)
    with torch.no_grad():
        theirs = response_logprobs(teacher, tokens, mask, prompt_length)
    kl = (ours.exp() * (ours - theirs)).sum(-1)  # [B, R]: sum over v of student(v) · log(student(v) / teacher(v))
    # A teacher behind an API may return only theirs[y], for the token y that was sampled. Then use a policy gradient:
    #     advantage = (theirs[y] - ours[y]).detach();  loss = -advantage * ours[y]
    # On average over y its gradient is that of the exact KL; it is only noisier. (Differentiating ours[y] - theirs[y]
    # itself would be wrong: that gradient does not depend on the teacher and is zero on average.)
    weight = mask[:, prompt_length:]
    return (kl * weight).sum() / weight.sum()


@torch.no_grad()
def report(name: str, rows: list[dict]) -> None:
    """Sample an answer to each test problem; print the reverse KL on them and how many box the right number."""
    tokens, mask, prompt_length = sample(rows)
    texts = tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
    right = sum(text.endswith(f"\\boxed{{{row['answer']}}}") for text, row in zip(texts, rows, strict=True))
    kl = reverse_kl(tokens, mask, prompt_length).item()
    print(f"{name:10} reverse KL {kl:.3f} nats/token   accuracy {100 * right / len(rows):.0f} %", flush=True)


train, test = problems("train"), problems("test")[::4]  # 100, of both families: the file is sorted
optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
report("before", test)
for step in range(1, STEPS + 1):
    warmup, decay = min(1.0, step / WARMUP), 0.5 * (1 + math.cos(math.pi * step / (STEPS + 1)))
    optimizer.param_groups[0]["lr"] = LEARNING_RATE * warmup * decay
    loss = reverse_kl(*sample(shuffle.sample(train, BATCH)))  # no gradient through the sampling
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    print(f"step {step:3}/{STEPS} reverse KL {loss.item():.3f} nats/token", flush=True)
report("after", test)
