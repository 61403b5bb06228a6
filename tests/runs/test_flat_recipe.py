"""The flat recipe is short, stands alone, runs, distils, and its KL is that of a slow reference without batches."""

import contextlib
import copy
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "opd_in_100_lines.py"
REPORT = re.compile(r"^(before|after) +reverse KL (\d+\.\d+) nats/token +accuracy (\d+) %$", re.MULTILINE)


@pytest.fixture(scope="module")
def recipe():
    """The file's names after ten steps, and what it printed; torch's threads and random state are put back."""
    threads, state, printed = torch.get_num_threads(), torch.get_rng_state(), io.StringIO()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(torch, "set_num_threads", lambda _: None)  # it asks for two, which wait for each other
        patch.setattr(sys, "argv", [str(RECIPE), "10"])
        names = runpy.run_path(str(RECIPE))
    yield names, printed.getvalue()
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def test_it_is_at_most_100_lines_without_the_system():
    text = RECIPE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert not re.search(r"^\s*(from|import) +(tutorloop|ray|deepspeed)", text, re.MULTILINE)


def test_a_few_steps_lower_the_kl_and_raise_the_accuracy(recipe):
    _, printed = recipe
    reports = {name: (float(kl), int(accuracy)) for name, kl, accuracy in REPORT.findall(printed)}
    assert set(reports) == {"before", "after"}, printed
    assert printed.count("\nstep ") == 10
    assert reports["after"][0] < 0.8 * reports["before"][0], printed
    assert reports["after"][1] > reports["before"][1], printed


def test_the_kl_of_a_padded_batch_is_that_of_each_answer_alone(recipe):
    recipe, _ = recipe
    seed = torch.seed() % 2**31
    print("seed", seed)
    torch.manual_seed(seed)
    rows = [recipe["test"][i] for i in torch.randperm(100)[:8].tolist()]
    tokens, mask, prompt_length = recipe["sample"](rows)
    found = float(recipe["reverse_kl"](tokens, mask, prompt_length).detach())  # in float32

    student, teacher = (
        copy.deepcopy(recipe[name]).double() for name in ("student", "teacher")
    )  # transformers' norms stay in float32
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
