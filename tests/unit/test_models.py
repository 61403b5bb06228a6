"""Models as the rooms use them, each against the slow way: packed against one by one, chunks against dense."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model, tiny_qwen3, tiny_tokenizer

from tutorloop.contracts.errors import ModelError
from tutorloop.models import logits as logits_module
from tutorloop.models.checkpoint import load_lm_head
from tutorloop.models.loading import (
    load_causal_lm,
    load_tokenizer,
    locate_model,
    tokenizer_hash,
)
from tutorloop.models.logits import chunk_rows, token_logprobs
from tutorloop.models.packing import Packing, next_token_rows, packed_hidden_states
from tutorloop.models.weights import BucketWriter, fingerprint, read_bucket

torch.set_num_threads(1)


def fresh_generator():
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral"])
@torch.no_grad()
def test_packed_hidden_states_equal_one_by_one(architecture, tmp_path):
    random = fresh_generator()
    name = save_tiny(tmp_path, architecture)  # mistral's window is 4 tokens, shorter than most sequences here
    packed, plain = load_causal_lm(name, attention="packed"), load_causal_lm(name)
    for _ in range(3):
        lengths = torch.randint(1, 24, (6,), generator=random)
        ids = torch.randint(0, 300, (int(lengths.sum()),), generator=random)
        ours = packed_hidden_states(packed, ids, lengths)
        slow = [plain.base_model(part[None]).last_hidden_state[0] for part in ids.split(lengths.tolist())]
        torch.testing.assert_close(ours, torch.cat(slow), atol=2e-5, rtol=1e-5)


def test_packed_hidden_states_have_the_gradients_of_one_by_one():
    random = fresh_generator()
    model = tiny_model("qwen3")
    lengths = torch.tensor([5, 1, 9])
    ids = torch.randint(0, 300, (15,), generator=random)
    weight = torch.randn(15, 32, generator=random)

    def gradients(hidden):
        found = torch.autograd.grad((hidden * weight).sum(), list(model.base_model.parameters()))
        return [gradient.clone() for gradient in found]

    parts = ids.split(lengths.tolist())
    slow = gradients(torch.cat([model.base_model(part[None]).last_hidden_state[0] for part in parts]))
    model.set_attn_implementation("packed")
    for ours, expected in zip(gradients(packed_hidden_states(model, ids, lengths)), slow, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


def test_packing_and_next_token_rows_equal_loops():
    random = fresh_generator()
    lengths = torch.randint(1, 9, (7,), generator=random)
    packing = Packing.of(lengths)
    slots, positions, predicting, start = [], [], [], 0
    for row, length in enumerate(lengths.tolist()):
        slots += [row * packing.width + i for i in range(length)]
        positions += range(length)
        predicting += range(start, start + length - 1)
        start += length
    assert packing.slots.tolist() == slots and packing.positions.tolist() == positions
    assert next_token_rows(lengths).tolist() == predicting


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_token_logprobs_equal_dense_log_softmax(dtype, monkeypatch):
    random = fresh_generator()
    monkeypatch.setattr(logits_module, "CHUNK_BYTES", 4 * 300 * 7)
    assert chunk_rows(300) == 7  # 40 rows make six chunks, the last one short
    hidden = torch.randn(40, 16, generator=random).to(dtype)
    head = torch.randn(300, 16, generator=random).to(dtype)
    targets = torch.randint(0, 300, (40,), generator=random)
    dense = (hidden @ head.T).double().log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    ours = token_logprobs(hidden, head, targets)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours.double(), dense, atol=1e-12 if dtype == torch.float64 else 1e-5, rtol=0)


def random_parameters(random):
    return [
        ("a", torch.randn(3, 5, generator=random)),
        ("b.odd", torch.randn(7, generator=random).bfloat16()),  # 14 bytes: the next one is not aligned to 4
        ("c", torch.randn(4, 4, generator=random)),
        ("d", torch.randn((), generator=random).half()),
    ]


@pytest.mark.parametrize("capacity", [1, 70, 10**6])
def test_buckets_carry_every_parameter_bit_for_bit(capacity):
    parameters = random_parameters(fresh_generator())
    writer = BucketWriter(3, capacity)
    buckets = [bucket for name, tensor in parameters for bucket in writer.add(name, tensor)]
    buckets += writer.flush()
    assert writer.buckets == len(buckets) == {1: 4, 70: 2, 10**6: 1}[capacity]
    back = [pair for bucket in buckets for pair in read_bucket(bucket)]
    for (name, tensor), (name_back, tensor_back) in zip(parameters, back, strict=True):
        assert name == name_back and tensor.dtype == tensor_back.dtype and torch.equal(tensor, tensor_back)
    assert fingerprint(back) == writer.fingerprint


def test_the_fingerprint_sees_names_order_and_single_bits():
    parameters = random_parameters(fresh_generator())
    flipped = [(name, tensor.clone()) for name, tensor in parameters]
    flipped[2][1].view(torch.int32)[1, 1] ^= 1
    renamed = [("A", parameters[0][1]), *parameters[1:]]
    prints = {fingerprint(p) for p in (parameters, parameters[::-1], flipped, renamed)}
    assert len(prints) == 4


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_read_alone_is_the_models(tied, tmp_path):
    name = tiny_qwen3(tmp_path, tied=tied)
    model = load_causal_lm(name)
    assert ("lm_head.weight" in dict(model.named_parameters())) != tied
    assert torch.equal(load_lm_head(name), model.get_output_embeddings().weight)
    assert load_lm_head(name, "bf16").dtype == torch.bfloat16


def test_tokenizers_that_differ_have_other_hashes(tmp_path):
    same = tokenizer_hash(tiny_tokenizer())
    assert tokenizer_hash(load_tokenizer(tiny_qwen3(tmp_path))) == same
    other = tiny_tokenizer()
    other.add_tokens(["<think>"])
    assert tokenizer_hash(other) != same


def test_models_that_cannot_be_used_say_why(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        locate_model(str(tmp_path / "absent"))
    with pytest.raises(ModelError, match="no such folder"):
        locate_model("lab:absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        locate_model(str(empty))
    (empty / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="safetensors"):
        locate_model(str(empty))


def test_weights_that_are_missing_or_of_another_shape_are_not_drawn_at_random(tmp_path):
    name = tiny_qwen3(tmp_path / "part")
    weights = tmp_path / "part" / "model.safetensors"
    tensors = load_file(weights)
    head = tensors.pop("lm_head.weight")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head\.weight missing"):
        load_causal_lm(name)
    save_file(tensors | {"lm_head.weight": head[:, :-1].contiguous()}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match="load"):
        load_causal_lm(name)


def test_damaged_models_say_why(tmp_path):
    name = tiny_qwen3(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="load"):
        load_causal_lm(name)
    with pytest.raises(ModelError):
        load_lm_head(name)
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text(json.dumps({"model_type": "no_such_architecture"}))
    save_file({"x": torch.zeros(1)}, unknown / "model.safetensors")
    for load in (load_causal_lm, load_lm_head):
        with pytest.raises(ModelError, match="no_such_architecture"):
            load(str(unknown))
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(unknown))
