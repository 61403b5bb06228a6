"""The flat recipe is short, stands alone, runs, distils, and its KL is that of a slow reference without batches."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "opd_in_100_lines.py"
REPORT = re.compile(r"^(before|after) +reverse KL (\d+\.\d+) nats/token +accuracy (\d+) %$", re.MULTILINE)


@pytest.fixture
def recipe(monkeypatch):
    """The file's names after a run of no steps, on one thread; torch's threads and random state are put back."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda _: None)  # the file asks for two
        patch.setattr(sys, "argv", [str(RECIPE), "0"])
        names = runpy.run_path(str(RECIPE))
    yield names
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def test_it_is_at_most_100_lines_without_the_system():
    text = RECIPE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert not re.search(r"^\s*(from|import) +(tutorloop|ray|deepspeed)", text, re.MULTILINE)


def test_a_few_steps_lower_the_kl_and_raise_the_accuracy():
    one_thread = {**os.environ, "OMP_THREAD_LIMIT": "1"}  # the two it asks for wait for each other on a busy machine
    command = [sys.executable, str(RECIPE), "10"]
    run = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    reports = {name: (float(kl), int(accuracy)) for name, kl, accuracy in REPORT.findall(run.stdout)}
    assert set(reports) == {"before", "after"}, run.stdout
    assert run.stdout.count("\nstep ") == 10
    assert reports["after"][0] < 0.8 * reports["before"][0], run.stdout
    assert reports["after"][1] > reports["before"][1], run.stdout


def test_the_kl_of_a_padded_batch_is_that_of_each_answer_alone(recipe):
    seed = torch.seed() % 2**31
    print("seed", seed)
    torch.manual_seed(seed)
    rows = [recipe["test"][i] for i in torch.randperm(100)[:8].tolist()]
    tokens, mask, prompt_length = recipe["sample"](rows)
    found = float(recipe["reverse_kl"](tokens, mask, prompt_length).detach())  # in float32

    student, teacher = recipe["student"].double(), recipe["teacher"].double()  # transformers' norms stay in float32
    total, count = 0.0, 0
    for answer, row in zip(tokens.tolist(), rows, strict=True):
        chat = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        prompt = recipe["tokenizer"](chat)["input_ids"]
        assert answer[prompt_length - len(prompt) : prompt_length] == prompt
        response = answer[prompt_length:]
        eos = recipe["tokenizer"].eos_token_id
        response = response[: response.index(eos) + 1] if eos in response else response
        for end in range(len(response)):
            prefix = torch.tensor([prompt + response[:end]])
            with torch.no_grad():
                p, q = (model(prefix).logits[0, -1].softmax(-1) for model in (student, teacher))
            total += float((p * (p / q).log()).sum())
            count += 1
    assert found == pytest.approx(total / count, rel=0, abs=1e-5)
