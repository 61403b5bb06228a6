"""A method of one's own: one file outside the package with its own loss term, or a module, or a clear error."""

import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from method_cases import TEACHER, config
from torch import Tensor

from tutorloop.cluster.methods import compose_stages, own_module
from tutorloop.contracts.errors import ConfigError
from tutorloop.contracts.records import Term
from tutorloop.learner.terms import bind_terms
from tutorloop.learner.terms.base import StudentChunk, TokenRows

PAGE = (Path(__file__).parents[2] / "docs/methods.md").read_text(encoding="utf-8")
[EXAMPLE] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def chunk(logits_CV: Tensor, targets: Tensor, teacher: Tensor) -> tuple[StudentChunk, TokenRows]:
    logprobs = logits_CV.log_softmax(1)
    sampled = logprobs.gather(1, targets[:, None]).squeeze(1)
    zero, ids = torch.zeros_like(teacher), torch.zeros(len(targets), 0)
    rows = TokenRows(
        targets_C=targets,
        old_C=zero,
        advantage_C=zero,
        teacher_C=teacher,
        reference_C=zero,
        gate_C=zero + 1,
        topk_ids_CK=ids.long(),
        topk_logprobs_CK=ids,
        teacher_entropy_C=zero,
    )
    return StudentChunk(logprobs_CV=logprobs, sampled_C=sampled), rows


def test_the_documented_file_is_a_method_with_its_own_loss(tmp_path: Path) -> None:
    path = tmp_path / "margin_opd.py"
    path.write_text(EXAMPLE, encoding="utf-8")
    [composition] = compose_stages(config(str(path), {**TEACHER, "signal": "sampled"}, {"margin": 0.2}))
    assert composition.scoring and composition.scoring.signal == "sampled"
    [term] = bind_terms(composition.terms)
    assert (term.key, term.loss.signal, term.loss.margin) == ("margin", "sampled", 0.2)

    seed = random.randrange(2**32)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(5, (9,), generator=generator)
    teacher = torch.randn(9, 5, generator=generator, dtype=torch.float64).log_softmax(1)[torch.arange(9), targets]
    student, rows = chunk(logits, targets, teacher)
    term(student, rows).loss_C.sum().backward()
    expected = torch.zeros_like(logits)
    for t in range(9):  # −d · ∇ log softmax(logits)[y] = −d · (1[y] − softmax)
        p = logits[t].detach().exp() / logits[t].detach().exp().sum()
        d = teacher[t] - p[targets[t]].log()
        if abs(d) > 0.2:
            expected[t] = d * p
            expected[t, targets[t]] -= d
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-12)


def test_its_term_travels_by_value(tmp_path: Path) -> None:
    from ray import cloudpickle

    path = tmp_path / "margin_opd.py"
    path.write_text(EXAMPLE, encoding="utf-8")
    module = own_module(str(path))
    assert module is not None
    cloudpickle.register_pickle_by_value(module)
    sent = cloudpickle.dumps(Term(name="margin", options={"margin": 0.3}, loss=module.MarginGradient))
    cloudpickle.unregister_pickle_by_value(module)
    path.unlink()
    del sys.modules[module.__name__]
    [term] = bind_terms((cloudpickle.loads(sent),))
    assert term.loss.margin == 0.3 and type(term.loss).__name__ == "MarginGradient"
    with pytest.raises(ConfigError, match="0 or above"):
        bind_terms((replace(cloudpickle.loads(sent), options={"margin": -1.0}),))
    wide, zero = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.zeros(2, dtype=torch.int64)
    student, rows = chunk(wide, zero, torch.tensor([-2.0, -0.6]))
    assert term(student, rows).metrics["far"].tolist() == [1.0, 0.0]


def test_a_module_that_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_test").mkdir()
    (tmp_path / "mine_for_test/margin.py").write_text(EXAMPLE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    [composition] = compose_stages(config("mine_for_test.margin", TEACHER))
    assert composition.terms[0].options == {"margin": 0.1}


@pytest.mark.parametrize(
    ("method", "text", "expected"),
    [
        ("absent.py", None, "exists"),
        ("bare.py", "x = 1\n", "defines compose"),
        ("wrong.py", "def compose(config):\n    return 3\n", "returns a Composition"),
        ("margin_opd.py", EXAMPLE, "margin_opd knows: margin"),
    ],
)
def test_a_file_that_is_no_method(method: str, text: str | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / method
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=expected):
        compose_stages(config(str(path), TEACHER, {"marginn": 0.2}))


def test_an_unknown_module_is_told() -> None:
    with pytest.raises(ConfigError, match="can be imported"):
        compose_stages(config("nowhere_at_all.method", TEACHER))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import nowhere_at_all\n", "line 1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def compose(config):\n    return {}[config.method]\n", "line 2: KeyError"),
        ("def compose(config)\n", "line 1: SyntaxError: expected ':'"),
    ],
)
def test_what_its_own_code_raises_is_told_with_its_line(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"{path} {told}")):
        compose_stages(config(str(path), TEACHER))


def test_what_it_leaves_out_is_checked_as_for_ours(tmp_path: Path) -> None:
    path = tmp_path / "margin_opd.py"
    path.write_text(EXAMPLE, encoding="utf-8")
    with pytest.raises(ConfigError, match="needs a teacher"):
        compose_stages(config(str(path)))
