"""A teacher that servers of somebody else run: OpenAI's completions API with vLLM's `prompt_logprobs`.

A rollout is one request: its token ids as the prompt, and of the answer what the server says about them. One token is
generated, since servers refuse none, and is not looked at. Before a run `probe` finds out what the servers are: whether
they share the student's tokenizer, how many ids a position they give, and whether they are all of one model.

Shapes: L tokens of a prompt, R of them scored, K ids a position, V vocabulary.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..contracts.errors import ConfigError, TeacherError, TokenizerMismatch
from ..contracts.records import EMPTY_F, EMPTY_FF, EMPTY_II, Rollout, ScoreRequest, TeacherScores
from .http_client import HttpClient, Reply
from .requests import check_request, refusal

MOST_ENTRIES = 1 << 22  # logprobs in an answer to `given`, 60 bytes each: whole vocabularies would be gigabytes
SLACK = 1e-3  # of probabilities that sum to 1: float32's rounding over a large vocabulary
TOO_LONG = re.compile(r"context length|maximum model length|max_model_len|too long", re.IGNORECASE)
BAD_IDS = re.compile(r"out of vocab", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What the servers of a teacher can do. `largest_k == vocab` says that they give the whole vocabulary."""

    context: int  # most tokens of a rollout: one less than the server's, for the token that it generates
    vocab: int  # of the model where the server gives it whole, else of the tokenizer
    largest_k: int  # most ids a position
    temperature: str  # of prompt logprobs: "raw" where it is always 1, "requested" where it is the request's


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """What a server says about the scored tokens: `logprobs` `[R]` of the tokens, and all of `by_id` a position."""

    logprobs: np.ndarray  # float32 [R]
    by_id: list[tuple[np.ndarray, np.ndarray]]  # R pairs of ids int64 and logprobs float64, the likeliest first

    def likeliest(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 and logprobs float32 `[R, k]`."""
        ids = np.stack([ids[:k] for ids, _ in self.by_id]).astype(np.int32)
        return ids, np.stack([logprobs[:k] for _, logprobs in self.by_id]).astype(np.float32)

    def of(self, given: np.ndarray) -> np.ndarray | None:
        """Logprobs float32 `[R, K]` of the ids `given` `[R, K]`; none where the server left one out."""
        found = np.empty(given.shape, np.float32)
        for row, wanted, (ids, logprobs) in zip(found, given, self.by_id, strict=True):
            order = np.argsort(ids)
            place = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
            if not np.array_equal(ids[place], wanted):
                return None
            row[:] = logprobs[place]
        return found

    def entropy(self) -> np.ndarray:
        """−Σ p log p float32 `[R]`, nats, over what the server gave."""
        return np.array([-(np.exp(logprobs) * logprobs).sum() for _, logprobs in self.by_id], np.float32)


class HttpTeacher:
    """A `contracts.protocols.TeacherEngine` on servers at `urls`, which call it `model`; `limits` are `probe`'s."""

    tokens_per_batch = 1  # each rollout is a request of its own

    def __init__(
        self,
        model: str,
        *,
        teacher_id: str,
        urls: Sequence[str],
        requests_per_url: int,
        timeout_seconds: float,
        limits: ServerLimits,
        api_key: str = "",
    ) -> None:
        self.model, self.teacher_id, self.limits = model, teacher_id, limits
        self.context, self.vocab, self.largest_k = limits.context, limits.vocab, limits.largest_k
        self.answered: dict[int, TeacherScores] = {}  # of the last call, by index: what stands where it failed
        self.client = HttpClient(
            urls, requests_per_url=requests_per_url, timeout_seconds=timeout_seconds, api_key=api_key
        )

    @staticmethod
    def probe(model: str, urls: Sequence[str], timeout_seconds: float, api_key: str, tokenizer: Any) -> ServerLimits:
        """The `limits`, found by asking the servers before anything starts. Raises as `probe` below."""
        return probe(model, urls, timeout_seconds, api_key, tokenizer)

    def score(self, rollouts: Sequence[Rollout], request: ScoreRequest) -> list[TeacherScores]:
        """Scores in the order of `rollouts`, at temperature 1; a refused one has an error class and no arrays.

        "outside_top_k": the servers do not give a position's logprob of one of the `given` ids; "outside_vocabulary":
        they give ids that the tokenizer lacks. Raises TeacherError where a rollout gets no sound answer in time.
        """
        self._check(request)
        limits = self.limits
        errors = [refusal(r, request, context=limits.context, vocab=limits.vocab) for r in rollouts]
        sound = [i for i, error in enumerate(errors) if not error]
        scores = [self._refused(rollout, request, error) for rollout, error in zip(rollouts, errors, strict=True)]
        pool = ThreadPoolExecutor(len(self.client.urls) * self.client.requests_per_url)
        found = {pool.submit(self._score, rollouts[i], request): i for i in sound}
        done = wait(found, return_when=FIRST_EXCEPTION).done
        pool.shutdown(wait=False, cancel_futures=True)  # after a failure: those that run end within their deadlines
        self.answered = {found[future]: future.result() for future in done if not future.exception()}
        for future in done:
            scores[found[future]] = future.result()
        return scores

    def _check(self, request: ScoreRequest) -> None:
        check_request(request, self.limits.vocab)
        if request.signal == "hidden":
            remedy = "use teacher.signal=topk or sampled, or an engine of our own"
            raise ConfigError("a teacher of engine http gives no hidden states", self.teacher_id, remedy)
        needed = {"topk": request.top_k, "given": 1}.get(request.signal, 0)
        if needed > self.largest_k:
            found = f"{needed} asked of {self.teacher_id}, whose servers give {self.largest_k}"
            raise ConfigError(
                "top_k is at most what the teacher's servers give", found, "start them with more --max-logprobs"
            )

    def _refused(self, rollout: Rollout, request: ScoreRequest, error: str) -> TeacherScores:
        return TeacherScores(
            rollout_id=rollout.rollout_id, teacher_id=self.teacher_id, context=request.context, error_class=error
        )

    def _score(self, rollout: Rollout, request: ScoreRequest) -> TeacherScores:
        ids, k = rollout.token_ids, 0
        if request.signal == "topk":
            k = request.top_k
        elif request.signal == "given":
            k = min(self.largest_k, max(rollout.topk_ids.shape[1], MOST_ENTRIES // len(ids)))
        reply = self.client.send("completions", _body(self.model, ids, k))
        if reply.status != 200:
            return self._refused(rollout, request, _refusal_of(reply))
        seen = read_positions(reply, self.model, ids, rollout.prompt_length, k)
        topk_ids, topk_logprobs = EMPTY_II, EMPTY_FF
        if request.signal == "topk":
            topk_ids, topk_logprobs = seen.likeliest(k)
            if topk_ids.max() >= self.limits.vocab:
                return self._refused(rollout, request, "outside_vocabulary")
        elif request.signal == "given":
            logprobs = seen.of(rollout.topk_ids)
            if logprobs is None:
                return self._refused(rollout, request, "outside_top_k")
            topk_ids, topk_logprobs = rollout.topk_ids, logprobs
        return replace(
            self._refused(rollout, request, ""),
            logprobs=seen.logprobs,
            topk_ids=topk_ids,
            topk_logprobs=topk_logprobs,
            entropy=seen.entropy() if k == self.limits.vocab else EMPTY_F,
        )


def _body(model: str, prompt: np.ndarray | str, k: int, temperature: float = 1.0) -> dict[str, Any]:
    """A request for the `k` likeliest ids of each position, or for the prompt's own ids where it is text."""
    ids = isinstance(prompt, np.ndarray)
    asked = {"prompt_logprobs": k} if ids else {"return_token_ids": True, "add_special_tokens": False}
    shared = {"model": model, "max_tokens": 1, "temperature": temperature}
    return shared | asked | {"prompt": prompt.tolist() if ids else prompt}


def _refusal_of(reply: Reply) -> str:
    """The error class of a prompt that the server cannot take. Raises TeacherError where it takes no prompt."""
    text = reply.body.decode("utf-8", "replace")
    if reply.status in (400, 413, 422):
        if reply.status == 413 or TOO_LONG.search(text):
            return "too_long"
        if BAD_IDS.search(text):
            return "bad_ids"
    raise TeacherError(
        "a teacher's server takes the requests that its probe found it to take",
        f"{reply.url}: status {reply.status}: {reply.shown()}",
        "was it started anew, with another model, other limits or another key?",
    )


def _broken(rule: str, reply: Reply, found: str) -> TeacherError:
    remedy = "the server is none of vLLM's, or its model gives no numbers: see its log"
    return TeacherError(rule, f"{reply.url}: {found}", remedy)


def read_positions(reply: Reply, model: str, ids: np.ndarray, first: int, k: int) -> Positions:
    """The positions `first`… of the prompt `ids` `[L]`, of which `k` ids were asked (-1: all). Raises TeacherError."""
    answer = reply.json()
    if not isinstance(answer, Mapping) or not isinstance(answer.get("choices"), list) or len(answer["choices"]) != 1:
        raise _broken("an answer holds one choice", reply, type(answer).__name__)
    if answer.get("model") != model:
        raise _broken("the model that was asked answers", reply, reply.shown(answer.get("model")))
    choice = answer["choices"][0]
    found = choice.get("prompt_logprobs") if isinstance(choice, Mapping) else None
    if not isinstance(found, list):
        raise _broken("an answer holds prompt_logprobs", reply, type(found).__name__)
    if len(found) != len(ids):
        raise _broken("an answer has a position for each token", reply, f"{len(found)} for {len(ids)}")
    by_id = [_position(reply, row, k, first + i) for i, row in enumerate(found[first:])]
    own = np.empty(len(by_id), np.float32)
    for i, (token, (its_ids, logprobs)) in enumerate(zip(ids[first:], by_id, strict=True)):
        place = np.flatnonzero(its_ids == token)
        if len(place) != 1:
            raise _broken("a position holds its own token", reply, f"position {first + i} lacks it")
        own[i] = logprobs[place[0]]
    return Positions(logprobs=own, by_id=by_id)


def _position(reply: Reply, row: Any, k: int, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logprobs of one position, the likeliest first: `k` of them, and the token's own if it is not among."""
    if not isinstance(row, Mapping) or (k >= 0 and len(row) not in (max(k, 1), k + 1)):
        count = len(row) if isinstance(row, Mapping) else type(row).__name__
        raise _broken("a position holds as many ids as were asked", reply, f"{count} for {k} at {position}")
    try:
        ids = np.array([int(key) for key in row], np.int64)
        logprobs = np.array([float(entry["logprob"]) for entry in row.values()])
    except (TypeError, ValueError, KeyError, OverflowError):
        raise _broken("a position maps ids to their logprobs", reply, f"something else at {position}") from None
    if not (np.isfinite(logprobs).all() and np.exp(logprobs).sum() <= 1 + SLACK):
        found = f"from {logprobs.min():.4g} to {logprobs.max():.4g} at {position}"
        raise _broken("a position's logprobs are finite and of probabilities that sum to at most 1", reply, found)
    if ids.min() < 0:
        raise _broken("a position maps ids to their logprobs", reply, f"id {ids.min()} at {position}")
    order = np.lexsort((ids, -logprobs))
    return ids[order], logprobs[order]


# ---- before a run ---------------------------------------------------------------------------------------------------

TEXTS = (
    "0 12 345 6789 1234567890 3.14159 -2e10",
    " \t two  blanks\n\n\nlines\r\n    indented ",
    "naïve façade Ωμέγα 数学の問題 🙂👩‍🔬 \u00a0\u200b é",
    r"Let $\frac{a^2+b^2}{\sqrt{2\pi}} \leq \sum_{i=1}^{n} x_i$, so \boxed{\mathbb{R}^{n\times m}}.",
    "def f(x):\n\treturn {'a': x != 0, \"b\": [1, 2]}  # comment",
)
VLLM = "serve the model with vLLM"
SPREAD = 256  # ids over the whole vocabulary, whose texts are one more probe


def probe(model: str, urls: Sequence[str], timeout_seconds: float, api_key: str, tokenizer: Any) -> ServerLimits:
    """What the servers at `urls` can do, found by asking them; `tokenizer` is the student's.

    Raises ConfigError (model, key, limits, servers that differ), TokenizerMismatch, and TeacherError where a server
    does not answer or its answer is broken.
    """
    found: list[tuple[str, ServerLimits, np.ndarray]] = []
    for url in urls:
        found.append((url, *_Probe(model, url, timeout_seconds, api_key).run(tokenizer)))
        (one, limits, logprobs), (other, others, other_logprobs) = found[0], found[-1]
        gap = float(np.abs(logprobs - other_logprobs).max()) if len(logprobs) == len(other_logprobs) else np.inf
        if limits != others or gap > 1e-2:
            values = f"{one}: {limits}; {other}: {others}; logprobs of one prompt differ by up to {gap:.3g}"
            raise ConfigError("all servers of teacher.urls run one model alike", values, "start them alike")
    return found[0][1]


class _Probe:
    """Asks one server. Raises as `probe` does."""

    def __init__(self, model: str, url: str, timeout_seconds: float, api_key: str) -> None:
        self.model, self.url = model, url
        self.client = HttpClient(
            [url], requests_per_url=1, timeout_seconds=timeout_seconds, api_key=api_key, most_tries=3
        )

    def run(self, tokenizer: Any) -> tuple[ServerLimits, np.ndarray]:
        """Its limits, and the logprobs of a prompt that is the same for all servers."""
        context = self._context()
        for text in _probe_texts(tokenizer):
            self._compare(text, tokenizer, context)
        ids = np.array(_ids(tokenizer, TEXTS[0] + TEXTS[3])[:context], np.int64)
        vocab, largest_k = self._largest_k(ids[:2], tokenizer)
        logprobs = self._asked(ids, min(largest_k, 1024)).logprobs
        halved = self._asked(ids, 0, temperature=0.5).logprobs
        temperature = "requested" if np.abs(logprobs - halved).max() > 0.1 else "raw"
        self.client.close()
        return ServerLimits(context=context, vocab=vocab, largest_k=largest_k, temperature=temperature), logprobs

    def _context(self) -> int:
        """Of the model, if the server has it."""
        reply = self.client.send("models")
        listed = self._answer(reply).get("data")
        cards = [card for card in listed if isinstance(card, Mapping)] if isinstance(listed, list) else []
        card = next((card for card in cards if card.get("id") == self.model), None)
        if card is None:
            known = ", ".join(reply.shown(card.get("id")) for card in cards[:20]) or "none"
            found = f"{self.model}; {self.url} has {known}"
            raise ConfigError("teacher.model is a model of its servers", found, "give the name that the servers use")
        length = card.get("max_model_len")
        if not isinstance(length, int) or length < 3:
            raise ConfigError("a server says its max_model_len", f"{self.url}: {reply.shown(length)}", VLLM)
        return length - 1

    def _compare(self, text: str, tokenizer: Any, context: int) -> None:
        """The server's ids of `text` are the tokenizer's."""
        reply = self.client.send("../tokenize", {"model": self.model, "prompt": text, "add_special_tokens": False})
        if reply.status in (404, 405):  # a proxy that lets the API through alone
            text = text[: context // 4]  # an id a byte, and it still fits
            answer = self._answer(self.client.send("completions", _body(self.model, text, 0)))
            choices = answer.get("choices")
            choice = choices[0] if isinstance(choices, list) and choices else None
            theirs = choice.get("prompt_token_ids") if isinstance(choice, Mapping) else None
        else:
            theirs = self._answer(reply).get("tokens")
        if not isinstance(theirs, list):
            found = f"{self.url} has no /tokenize, and its completions no prompt_token_ids"
            raise ConfigError("a teacher's server can show its tokenizer", found, VLLM)
        ours = _ids(tokenizer, text)
        if theirs != ours:
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), "the end")
            found = f"{self.url}: {len(theirs)} ids, ours {len(ours)}, of {text[:40]!r}; the first other at {at}"
            remedy = "serve a model of the student's family: a teacher scores the student's exact token ids"
            raise TokenizerMismatch("student and teacher share one tokenizer", found, remedy)

    def _largest_k(self, ids: np.ndarray, tokenizer: Any) -> tuple[int, int]:
        """The vocabulary, and how many ids a position the server gives; `ids` are two."""
        if self._given(ids, 0) is None:
            raise ConfigError("a teacher's server gives prompt_logprobs", self.url, VLLM)
        likeliest = self._given(ids, 1)
        if likeliest is None:
            return len(tokenizer), 0
        ids = np.array([ids[0], likeliest[0][0]])  # its own token is among any K, and adds no id to them
        whole = self._given(ids, -1)
        if whole is not None and len(whole[0]) >= tokenizer.vocab_size:
            mass, count = np.exp(whole[1]).sum(), len(whole[0])
            if mass < 1 - SLACK:
                found = f"{self.url}: over {count} ids they sum to {mass:.4g}"
                raise ConfigError("a server's logprobs are a distribution", found, "start it with raw_logprobs")
            return count, count
        low, high, step = 1, len(tokenizer), 2  # never above it: some servers die of a K above their vocabulary
        while low + 1 < high:
            k = min(step, high - 1) if step else (low + high) // 2
            if self._given(ids, k) is None:
                high, step = k, 0
            else:
                low, step = k, 2 * step
        return len(tokenizer), low

    def _given(self, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids and logprobs of the second token's position where `k` are asked; none where the server gives fewer."""
        reply = self.client.send("completions", _body(self.model, ids, k))
        if reply.status in (400, 422):
            return None
        self._answer(reply)
        found = read_positions(reply, self.model, ids, 1, -1).by_id[0]
        return found if len(found[0]) >= k else None

    def _asked(self, ids: np.ndarray, k: int, temperature: float = 1.0) -> Positions:
        reply = self.client.send("completions", _body(self.model, ids, k, temperature))
        self._answer(reply)
        return read_positions(reply, self.model, ids, 1, k)

    def _answer(self, reply: Reply) -> Mapping[str, Any]:
        """The JSON object of a 200. Raises ConfigError, TeacherError."""
        if reply.status in (401, 403):
            found = f"{self.url}: status {reply.status}"
            raise ConfigError("a teacher's server takes the key", found, "check the variable of teacher.api_key_env")
        answer = reply.json() if reply.status == 200 else None
        if not isinstance(answer, Mapping):
            found = f"{self.url}: status {reply.status}: {reply.shown()}"
            raise ConfigError("a teacher's server answers its probe", found, "teacher.urls read http://HOST:PORT/v1")
        return answer


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _probe_texts(tokenizer: Any) -> Iterator[str]:
    """Fixed texts, the special tokens, and the texts of ids from all over the vocabulary."""
    yield from TEXTS
    yield " a ".join(sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})[:64])
    yield "".join(tokenizer.decode([int(i)]) for i in np.linspace(0, len(tokenizer) - 1, SPREAD))
