"""The extractor and the solutions beside it: embeddings, whitening, vectors that depend on nothing else, the folder."""

import importlib.util
import json
import secrets

import numpy as np
import pytest
import torch
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

from tutorloop.contracts.errors import StrategyError
from tutorloop.models.digests import digest_of
from tutorloop.verifier_service.strategies.embedding import BATCH_TOKENS, Whitening, make_embedder
from tutorloop.verifier_service.strategies.extractor import (
    MANIFEST,
    SIZE,
    WEIGHTS,
    Extractor,
    FrozenEncoder,
    StepEncoder,
    inputs_of,
    version_of,
    view_of,
)
from tutorloop.verifier_service.strategies.segments import StepLimits
from tutorloop.verifier_service.strategies.solutions import KEPT, Problem, Solutions, save_solutions, unlike

SENTENCE = "factor the left side then divide both by x add 3 and 14 so that y equals 2 check it again"
WORDS = SENTENCE.split()


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print("seed", seed)
    return np.random.default_rng(seed)


def texts(rng, count, most=20):
    return [" ".join(rng.choice(WORDS, rng.integers(1, most))) for _ in range(count)]


def solutions(rng, count):
    return [texts(rng, rng.integers(1, 7), most=6) for _ in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen3", layers=3)


@pytest.fixture
def embedder(model):
    return make_embedder(f"hidden:{model}")


def make_extractor(rng, embedder, frozen=False):
    views = [view_of(step) for steps in solutions(rng, 20) for step in steps]
    whitening = Whitening.of(embedder.embed(views), 16)
    torch.manual_seed(int(rng.integers(2**31)))
    encoder = FrozenEncoder() if frozen else StepEncoder(whitening.matrix_EC.shape[1], 32)
    codes = torch.nn.functional.normalize(torch.randn(8, SIZE), dim=-1)
    return Extractor(embedder, whitening, encoder, codes, StepLimits(least=2, most=40, steps=9))


@pytest.fixture
def extractor(rng, embedder):
    return make_extractor(rng, embedder)


def close(found, expected, scale=1.0):
    """To 1e-5 of vectors' length, which is `scale`."""
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "mistral"])  # the second has a sliding window
def test_hidden_states_are_the_model_s(rng, tmp_path, architecture):
    name = save_tiny(tmp_path, architecture, layers=3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name).eval(), tiny_tokenizer()
    some = ["", *texts(rng, 30), "x" * 500]
    found = make_embedder(f"hidden:{name}").embed(some)
    assert found.dtype == np.float32
    for text, own in zip(some, found, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:128]
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
        expected = states[1:].mean(0).numpy() if len(ids) > 1 else np.zeros_like(own)
        close(own, expected, scale=max(np.linalg.norm(expected), 1.0))


def test_an_embedding_is_the_same_in_any_batch(rng, embedder):
    some = texts(rng, 2 * BATCH_TOKENS // 40)
    together = embedder.embed(some)
    order, scale = rng.permutation(len(some)), np.linalg.norm(together, axis=1).min()
    close(embedder.embed([some[i] for i in order]), together[order], scale)
    close(np.concatenate([embedder.embed([some[i]]) for i in order[:20]]), together[order[:20]], scale)
    assert embedder.embed([]).shape == (0, together.shape[1])


@pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is not None, reason="it is installed")
def test_other_embedders_need_their_library():
    with pytest.raises(StrategyError, match=r"tutorloop\[embeddings\]"):
        make_embedder("some/embedder")


def test_whitened_embeddings_have_even_variances(rng):
    mixed = rng.normal(size=(500, 12)) @ rng.normal(size=(12, 12)) + 40
    mixed[:, 7] = mixed[:, 3]  # a direction without variance
    whitening = Whitening.of(mixed, 20)
    white = whitening(mixed)
    assert white.shape == (500, 11) and white.dtype == np.float64  # as what it is given
    _, sizes, directions = np.linalg.svd(mixed - mixed.mean(0), full_matrices=False)
    variances = sizes[:11] ** 2 / 500
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-4)
    expected = np.diag(variances / (variances + variances.mean()))
    np.testing.assert_allclose(white.T @ white / 500, expected, atol=1e-4)
    cosines = directions[:11] @ whitening.matrix_EC / np.linalg.norm(whitening.matrix_EC, axis=0)
    np.testing.assert_allclose(np.abs(cosines), np.eye(11), atol=1e-4)  # the largest first
    assert Whitening.of(mixed, 5).matrix_EC.shape == (12, 5)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_solution_is_the_same_in_any_batch(rng, embedder, frozen):
    extractor = make_extractor(rng, embedder, frozen)
    some = [[], *solutions(rng, 40), [*texts(rng, 40)]]
    together = extractor.encode(some)
    assert [len(own.vectors) for own in together] == [len(own.codes) for own in together] == list(map(len, some))
    for steps, own in zip(some[:8], together, strict=False):
        (alone,) = extractor.encode([steps])
        close(alone.vectors, own.vectors)
        assert own.vectors.shape == (len(steps), SIZE) and own.vectors.dtype == np.float32
        close(np.linalg.norm(own.vectors, axis=1), 1)
        distances = torch.cdist(torch.from_numpy(own.vectors), extractor.codebook_KD)
        close(distances[range(len(steps)), own.codes], distances.min(1).values if steps else np.zeros(0))
    assert extractor.encode([]) == []


def test_a_step_is_seen_after_what_came_before_it(rng, extractor):
    steps = texts(rng, 5)
    one, other = extractor.encode([steps, [*steps[:3], *texts(rng, 4)]])
    close(one.vectors[:3], other.vectors[:3])
    (moved,) = extractor.encode([steps[1:]])
    assert np.abs(moved.vectors - one.vectors[1:]).max() > 1e-3


def test_what_is_its_problem_s_alone_changes_nothing(extractor):
    one, other = extractor.encode([["Divide 12 by 3.", "So x = 4."], ["Divide 95 by 19.\n", "\nSo x = 5."]])
    close(one.vectors, other.vectors)


def test_the_transformer_against_its_equations(rng):
    """Pre-norm blocks (2002.04745), written out: causal attention of four heads, GELU."""
    torch.manual_seed(int(rng.integers(2**31)))
    encoder, inputs = StepEncoder(6, 16).double().eval(), torch.from_numpy(rng.normal(size=(1, 5, 6)))
    weights, norm = dict(encoder.named_parameters()), torch.nn.functional.layer_norm
    x = inputs[0] @ weights["enter.weight"].T + weights["enter.bias"]
    for n, w in np.ndindex(5, 16):
        x[n, w] += (np.sin, np.cos)[w % 2](n / 10_000 ** ((w - w % 2) / 16))
    for layer in range(2):
        own = {key.split(f"{layer}.", 1)[1]: value for key, value in weights.items() if f"layers.{layer}." in key}
        y = norm(x, (16,), own["norm1.weight"], own["norm1.bias"])
        q, k, v = (y @ own["self_attn.in_proj_weight"].T + own["self_attn.in_proj_bias"]).chunk(3, -1)
        heads = []
        for h in range(4):
            part = slice(4 * h, 4 * h + 4)
            scores = (q[:, part] @ k[:, part].T / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + torch.cat(heads, -1) @ own["self_attn.out_proj.weight"].T + own["self_attn.out_proj.bias"]
        y = norm(x, (16,), own["norm2.weight"], own["norm2.bias"])
        y = torch.nn.functional.gelu(y @ own["linear1.weight"].T + own["linear1.bias"])
        x = x + y @ own["linear2.weight"].T + own["linear2.bias"]
    x = norm(x, (16,), weights["layers.norm.weight"], weights["layers.norm.bias"])
    x = x @ weights["leave.weight"].T + weights["leave.bias"]
    close((x / x.norm(dim=-1, keepdim=True)).detach().numpy(), encoder(inputs)[0].detach().numpy())


# ---- the folder --------------------------------------------------------------------------------------------------


def save(rng, extractor, folder):
    """An extractor with two problems' solutions; what was kept of them."""
    folder.mkdir()
    nested = [solutions(rng, 2), solutions(rng, 1)]
    problems = [Problem(f"p{i}", f"Problem {i} ü", [" ".join(s) for s in own]) for i, own in enumerate(nested)]
    encoded = [extractor.encode(own) for own in nested]
    extractor.save(folder, save_solutions(folder, problems, nested, encoded))
    return nested, encoded


@pytest.mark.parametrize("frozen", [False, True])
def test_a_folder_gives_back_what_was_saved(rng, embedder, tmp_path, frozen):
    extractor = make_extractor(rng, embedder, frozen)
    nested, encoded = save(rng, extractor, tmp_path / "saved")
    loaded, kept = Extractor.load(tmp_path / "saved"), Solutions.load(tmp_path / "saved")
    assert loaded.limits == extractor.limits and loaded.version == extractor.version != ""
    some = solutions(rng, 5)
    for own, before in zip(loaded.encode(some), extractor.encode(some), strict=True):
        np.testing.assert_array_equal(own.vectors, before.vectors)
        np.testing.assert_array_equal(own.codes, before.codes)
    assert kept.prompt_ids == ["p0", "p1"] and kept.problem("p1") == "Problem 1 ü"
    for i, prompt_id in enumerate(kept.prompt_ids):
        assert kept.texts(prompt_id) == nested[i]
        for found, expected in ((kept.of(prompt_id), "vectors"), (kept.codes(prompt_id), "codes")):
            assert len(found) == len(encoded[i])
            for own, one in zip(found, encoded[i], strict=True):
                np.testing.assert_array_equal(own, getattr(one, expected))
    assert (kept.of("p2"), kept.texts("p2"), kept.codes("p2"), kept.problem("p2")) == ([], [], [], "")


@pytest.mark.parametrize("name", [WEIGHTS, "solutions.safetensors", "solutions.jsonl"])
def test_any_other_file_is_another_version_and_a_damaged_one_is_refused(rng, extractor, tmp_path, name):
    save(rng, extractor, tmp_path / "saved")
    file, version = tmp_path / "saved" / name, version_of(tmp_path / "saved")
    data = bytearray(file.read_bytes())
    data[int(rng.integers(len(data)))] ^= 1
    file.write_bytes(data)
    for load in (Extractor.load, Solutions.load):
        with pytest.raises(StrategyError, match=f"{name} is not as it was written"):
            load(tmp_path / "saved")
    manifest = json.loads((tmp_path / "saved" / MANIFEST).read_text())
    manifest["files"][name] = digest_of(file)
    (tmp_path / "saved" / MANIFEST).write_text(json.dumps(manifest))
    assert version_of(tmp_path / "saved") != version
    file.unlink()
    with pytest.raises(StrategyError, match=f"{name} is not there"):
        Extractor.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "Expecting"),
        ("[1]", "extractor.json"),
        ('{"format": 1, "files": {}}', "limits"),
        ('{"format": 2, "files": {}, "limits": {}}', "format 1"),
        (None, "no extractor.json"),
    ],
)
def test_a_manifest_that_is_none(tmp_path, text, told):
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(StrategyError, match=told):
        Extractor.load(tmp_path)
    with pytest.raises(StrategyError, match="no such folder"):
        Extractor.load(tmp_path / "none")


def test_another_model_under_the_embedder_s_name(rng, tmp_path):
    name = save_tiny(tmp_path / "model", "qwen3", layers=3)
    extractor = make_extractor(rng, make_embedder(f"hidden:{name}"))
    save(rng, extractor, tmp_path / "saved")
    Extractor.load(tmp_path / "saved")
    save_tiny(tmp_path / "model", "qwen3", layers=3, seed=1)
    with pytest.raises(StrategyError, match="gives others now"):
        Extractor.load(tmp_path / "saved")


def test_kept_solutions_are_unlike_each_other(rng):
    kinds = rng.normal(size=(KEPT, 1, SIZE)).astype(np.float32)
    alike = [
        kinds[i % KEPT] + 0.01 * rng.normal(size=(int(rng.integers(1, 5)), SIZE)) for i in (0, 0, 0, 1, 1, 2, 3, 3)
    ]
    kept = unlike(alike, KEPT)
    assert kept[0] == 0 and kept == sorted(kept)
    assert [(0, 0, 0, 1, 1, 2, 3, 3)[i] for i in kept] == [0, 1, 2, 3]
    assert unlike(alike[:3], KEPT) == [0, 1, 2]


def test_a_text_is_embedded_once(rng, embedder):
    asked = []

    class Counting:
        name = embedder.name

        def embed(self, texts):
            asked.extend(texts)
            return embedder.embed(texts)

    whitening = Whitening.of(embedder.embed(texts(rng, 30)), 8)
    first, second = inputs_of([["a b", "c"], ["c", "a b", "a b"], []], Counting(), whitening)[:2]
    assert asked == ["a b", "c"]
    np.testing.assert_array_equal(first[[1, 0, 0]], second)
