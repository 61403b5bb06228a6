"""What the probe finds out about servers, and which it refuses before a run."""

import numpy as np
import pytest
from bigram_server import KEY, NEXT, BigramServer, V, edited, serving, status
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tutorloop.contracts.errors import ConfigError, TeacherError, TokenizerMismatch
from tutorloop.teacher_service.http_engine import ServerLimits, probe


def foreign_tokenizer():
    """Byte-level as the tiny one, and trained: it merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["12 345 the sum"] * 9, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def swapped_tokenizer():
    """The tiny one, but for two ids that no plain text shows."""
    tokenizer = tiny_tokenizer()
    state = tokenizer.backend_tokenizer.to_str().replace('"<user>"', '"<other>"')
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(state), eos_token="<eos>")


def probed(*servers, tokenizer=None, model="big", timeout=20.0):
    with serving(*servers) as urls:
        return probe(model, urls, timeout, KEY, tokenizer or tiny_tokenizer())


@pytest.mark.parametrize("most", [0, 1, 2, 20, 64, 100, V - 1, V])
@pytest.mark.parametrize("tempered", [False, True])
def test_the_limits_are_found(most, tempered):
    server = BigramServer(most=most, tempered=tempered)
    expected = ServerLimits(context=127, vocab=V, largest_k=most, temperature="requested" if tempered else "raw")
    assert probed(server) == expected
    assert len(server.bodies) < 25 and server.connections == 1 and server.keys == {f"Bearer {KEY}"}


def test_a_server_that_gives_fewer_than_were_asked_is_asked_for_no_more():
    def capped(handler, body):
        if body.get("prompt_logprobs", 0) > 30 or body.get("prompt_logprobs") == -1:
            body["prompt_logprobs"] = 30

    assert probed(BigramServer(always=capped)).largest_k == 30


def test_a_model_whose_vocabulary_is_padded_says_so():
    padded = np.full((V, V + 11), -40.0)
    padded[:, :V] = NEXT
    assert probed(BigramServer(logits=padded, most=V + 11)).vocab == V + 11


@pytest.mark.parametrize("tokenize", [True, False])
def test_a_foreign_tokenizer_is_refused(tokenize):
    assert probed(BigramServer(tokenize=tokenize)).largest_k == V
    for foreign in (foreign_tokenizer(), swapped_tokenizer()):
        with pytest.raises(TokenizerMismatch, match="ours"):
            probed(BigramServer(tokenize=tokenize), tokenizer=foreign)


def test_a_server_that_shows_no_ids_is_refused():
    def none(handler, body):
        handler.answer(200, {"model": "big", "choices": [{"text": ""}]})
        return True

    with pytest.raises(ConfigError, match="no /tokenize"):
        probed(BigramServer(tokenize=False, always=none))
    with pytest.raises(TeacherError, match="prompt_logprobs"):
        probed(BigramServer(always=none))


def test_logprobs_that_are_no_distribution_are_refused():
    def shifted(by):
        def edit(rows, body):
            for row in rows[1:]:
                for entry in row.values():
                    entry["logprob"] += by

        return edited(edit)

    with pytest.raises(TeacherError, match="at most 1"):
        probed(BigramServer(always=shifted(0.01)))
    with pytest.raises(ConfigError, match="distribution"):
        probed(BigramServer(always=shifted(-0.01)))


def test_servers_that_differ_are_refused_by_name():
    other = NEXT + 0.02 * np.random.default_rng(1).normal(0, 1, NEXT.shape)
    near = NEXT + 1e-4 * np.random.default_rng(1).normal(0, 1, NEXT.shape)
    assert probed(BigramServer(), BigramServer(logits=near)).largest_k == V
    for changed in ({"logits": other}, {"most": 20}, {"context": 256}, {"tempered": True}):
        servers = BigramServer(), BigramServer(), BigramServer(**changed)
        with pytest.raises(ConfigError, match="one model") as caught:
            probed(*servers)
        text = str(caught.value)
        assert servers[0].url in text and servers[2].url in text and servers[1].url not in text


def test_a_wrong_name_a_wrong_key_and_a_silent_server_are_refused():
    with pytest.raises(ConfigError, match="a model of its servers") as caught:
        probed(BigramServer(), model="bigger")
    assert "'other', 'big'" in str(caught.value)
    with pytest.raises(ConfigError, match="max_model_len"):
        probed(BigramServer(), model="other")
    with pytest.raises(ConfigError, match="api_key_env"):
        probed(BigramServer(always=status(401)))
    with pytest.raises(ConfigError, match="status 404") as caught:
        probed(BigramServer(always=status(404)))
    assert KEY not in str(caught.value)
    with pytest.raises(TeacherError, match=r"refused.*3 tries"):
        probe("big", ["http://127.0.0.1:9/v1"], 60, KEY, tiny_tokenizer())
