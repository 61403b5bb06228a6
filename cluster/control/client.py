"""Asking a run how it stands, and telling it to have other numbers of replicas.

A run is asked through what its `live.json` says. One that does not answer is described by its files: who claims the
folder, the last row of `metrics.jsonl`, `summary.json`, the checkpoints. Nothing here loads torch or Ray.
"""

import json
import os
import re
import shlex
import socket
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...contracts import errors
from ...contracts.errors import InputError, RunFolderError, TutorloopError
from ...contracts.recipe import load_config
from ..recording.claim import LONG_SECONDS, Holder, holder_of, is_claim
from ..recording.metrics import METRICS_FILE
from ..recording.notify import kept
from .live import LIVE, Live, lives, read_live

ANSWER_SECONDS = 30.0  # that a run may keep still
MOST_BYTES = 1 << 26  # of an answer
TAIL_BYTES = 1 << 18  # of metrics.jsonl, read first
LOOPBACK = re.compile(r"localhost|127\.[\d.]+|::1")
OF_A_RUN = ("config.yaml", METRICS_FILE, LIVE)  # one of them stands in a run's folder, or a claim
FIGURES = ("loss", "reward", "pass_rate", "response_length", "truncated_share", "staleness_mean")
OF_LEARNER = ("reverse_kl", "topk_reverse_kl", "entropy", "grad_norm")

RUNNING, UNHEARD, ELSEWHERE = "running", "starting or ending", "running elsewhere"
ENDED, INTERRUPTED, DIED = "ended", "interrupted", "died"
AUXILIARY = {UNHEARD: "is ", ELSEWHERE: "is ", INTERRUPTED: "was "}


def ask(folder: Path) -> dict[str, Any]:
    """How the run in `folder` stands: the fields of RunStatus, and always `state`, `alarms`, `figures`, `checkpoint`,
    `go_on`.

    `state`: running where the run itself has answered; otherwise the rest is what its files say, and it is one of
    "starting or ending" (its process lives and does not listen), "running elsewhere", "ended", "interrupted", "died".
    `alarms`: its last ones, and how it ended, as in alarms.jsonl;
    `figures`: of its last step; `checkpoint`: the newest, not verified; `go_on`: what a person can do next, in words.
    Raises an InputError, and TutorloopError where a living run does not answer or fails to.
    """
    said = _asked(folder, "GET", "/status")
    known = of_files(folder)
    return known if said is None else {**known, **said, "state": RUNNING, "go_on": ""}


def scale(folder: Path, wanted: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Have pools of the run in `folder` go to other numbers of replicas: {"before": …, "wanted": …}.

    Raises an InputError where the run is not alive or refuses, and TutorloopError as `ask` does.
    """
    said = _asked(folder, "POST", "/scale", json.dumps(dict(wanted)))
    if said is None:
        known = of_files(folder)
        of = f" of {known['steps']}" if known["steps"] else ""
        found = f"run {AUXILIARY.get(known['state'], '')}{known['state']} at step {known['step']}{of}"
        raise RunFolderError("the run is alive", found, known["go_on"])
    return said


# ---- the run itself --------------------------------------------------------------------------------------------------


def _asked(folder: Path, command: str, path: str, body: str | None = None) -> dict[str, Any] | None:
    """The run's answer; None where nobody listens. Raises InputError, TutorloopError."""
    _check_is_run(folder)
    live = read_live(folder)
    if live is None or lives(live) is False or _listens_elsewhere(live):
        return None
    try:
        code, data = _exchange(live, command, path, body)
    except ConnectionError:
        return None
    except HTTPException as error:
        raise _not_ours(live, f"{type(error).__name__}: {error}") from error
    except OSError as error:
        if lives(live) is None:  # another machine, which cannot be reached from here
            return None
        found = f"{live} has not for {ANSWER_SECONDS:.0f} s: {error}"
        raise TutorloopError("a living run answers", found, f"see {folder / METRICS_FILE}, or try again") from error
    return _understood(folder, live, code, data)


def _check_is_run(folder: Path) -> None:
    """Raises RunFolderError."""
    remedy = "give the output_dir of a run"
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise RunFolderError("RUN is the folder of a run", f"{folder}: {error.strerror}", remedy) from error
    if not any(name in OF_A_RUN or is_claim(Path(name)) for name in names):
        raise RunFolderError("RUN is the folder of a run", f"{folder} holds none", remedy)


def _listens_elsewhere(live: Live) -> bool:
    """Whether it cannot be reached from here: the token is not for whoever has that port on this machine."""
    return live.host != socket.gethostname() and bool(LOOPBACK.fullmatch(urlsplit(live.url).hostname or ""))


def _exchange(live: Live, command: str, path: str, body: str | None) -> tuple[int, bytes]:
    """One request, past any proxy. Raises OSError, HTTPException."""
    url = urlsplit(live.url)
    with closing(HTTPConnection(url.hostname or "", url.port, timeout=ANSWER_SECONDS)) as connection:
        headers = {"Authorization": f"Bearer {live.token}", "Content-Type": "application/json"}
        connection.request(command, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read(MOST_BYTES)


def _understood(folder: Path, live: Live, code: int, data: bytes) -> dict[str, Any]:
    """What was answered. Raises the error that was."""
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        said = None
    if code == 401:
        remedy = "let live.json be as the run wrote it; if another process has the port by now, the run has ended"
        raise RunFolderError("a command holds the run's token", f"{live.url} refuses that of {folder / LIVE}", remedy)
    if code == 200 and isinstance(said, dict):
        return said
    if code in (400, 500) and isinstance(said, dict) and "rule" in said:
        raise _error(code, said)
    raise _not_ours(live, f"{code} {data[:80]!r}")


def _error(code: int, said: Mapping[str, Any]) -> TutorloopError:
    """The error that the run met, as itself where it is one of ours."""
    named = getattr(errors, str(said.get("error")), None)
    kind = named if isinstance(named, type) and issubclass(named, TutorloopError) else TutorloopError
    if issubclass(kind, InputError) != (code == 400):
        kind = InputError if code == 400 else TutorloopError
    return kind(*(str(said.get(name) or "") for name in ("rule", "found", "remedy")))


def _not_ours(live: Live, found: str) -> TutorloopError:
    remedy = "see whether another process listens there by now"
    return TutorloopError("a run answers in JSON", f"{live.url}: {found}", remedy)


# ---- its files -------------------------------------------------------------------------------------------------------


def of_files(folder: Path) -> dict[str, Any]:
    """What a run's files say, with the keys of `ask`."""
    summary, holder = _json(folder / "summary.json"), holder_of(folder) or read_live(folder)
    rows = _last_rows(folder / METRICS_FILE)
    row, state = rows.get("step", {}), _state(folder, holder, summary)
    method, steps = _recipe(folder)
    step = max(row.get("step", 0), summary.get("steps") or 0)
    checkpoint = _newest_checkpoint(folder)
    return {
        "state": state,
        "method": summary.get("method") or method,
        "phase": f"died at step {step}" if state == DIED else state,
        "step": step,
        "steps": steps,
        "version": row.get("step"),
        "seconds": summary.get("wall_seconds") or row.get("wall_seconds"),
        "pools": [],
        "in_flight": [],
        "dropped": summary.get("dropped") or row.get("dropped") or {},
        "learner_ranks": None,
        "learner_restarts": None,
        "notes": [],
        "alarms": kept(folder),
        "decisions": [],
        "figures": _figures(row, rows.get("eval", {})),
        "checkpoint": checkpoint and str(checkpoint),
        "go_on": _go_on(folder, state, holder, checkpoint),
    }


def _state(folder: Path, holder: Holder | None, summary: Mapping[str, Any]) -> str:
    alive = lives(holder) if holder else False
    if alive:
        return UNHEARD
    if holder and alive is None and _since_sign_of_life(folder) < LONG_SECONDS:
        return ELSEWHERE
    if not summary:  # it is written last, and goes when a run goes on
        return DIED
    return INTERRUPTED if summary.get("interrupted") else ENDED


def _since_sign_of_life(folder: Path) -> float:
    """Seconds since the holder of the folder touched it, by this machine's clock."""
    touched = 0.0
    with suppress(OSError):
        signs = (path for path in folder.iterdir() if is_claim(path) or path.name == LIVE)
        touched = max((path.stat().st_mtime for path in signs), default=0.0)
    return max(0.0, time.time() - touched)


def _go_on(folder: Path, state: str, holder: Holder | None, checkpoint: Path | None) -> str:
    where = folder.absolute()
    if state == UNHEARD:
        return f"it is {holder}, which does not listen now: ask again in a moment"
    if state == ELSEWHERE:
        seen = _since_sign_of_life(folder)
        return f"it is {holder}, with a sign of life {seen:.0f} s ago: ask on that machine"
    if state == ENDED:
        return f"its student is {where / 'final'}"
    if not (folder / "config.yaml").is_file():
        return "it wrote nothing: start it again"
    arguments = shlex.join([str(where / "config.yaml"), f"output_dir={where}"])
    after = f"after step {int(checkpoint.name.removeprefix('step-'))}" if checkpoint else "from its beginning"
    return f"continue {after}: tutorloop train {arguments} --resume"


def _recipe(folder: Path) -> tuple[str, int | None]:
    """The run's methods in words, and its steps, of all its stages."""
    try:
        config = load_config(folder / "config.yaml")
    except InputError:  # of another release, or not there yet
        return "", None
    return config.methods, config.total_steps


def _newest_checkpoint(folder: Path) -> Path | None:
    found = [path for path in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-[0-9]+", path.name)]
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def _figures(row: Mapping[str, Any], evaluated: Mapping[str, Any]) -> dict[str, float]:
    """The last figures that were measured, under the names of metrics.jsonl; `accuracy` of the last evaluation."""
    learner = row.get("learner") or {}
    found = {**{name: row.get(name) for name in FIGURES}, **{name: learner.get(name) for name in OF_LEARNER}}
    if evaluated:
        found |= {"accuracy": evaluated["stats"]["avg_at_k"]["value"], "accuracy_step": evaluated["step"]}
    return {name: value for name, value in found.items() if value is not None}


def _last_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The last step, and the last evaluation of the student on the recipe's own problems where it stands near it."""
    rows: dict[str, dict[str, Any]] = {}
    want = TAIL_BYTES
    with suppress(FileNotFoundError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        while "step" not in rows:
            file.seek(max(0, size - want))
            lines = file.read(want).split(b"\n")
            rows = {kind: row for line in lines if (row := _row(line)) and (kind := _kind(row))}
            if want >= size:
                break
            want *= 4
    return rows


def _row(line: bytes) -> dict[str, Any]:
    """Empty where the line is no row: a tail begins anywhere, and a crash cuts the last line off."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else {}


def _kind(row: Mapping[str, Any]) -> str | None:
    shown = row.get("kind") == "step" or (row.get("model"), row.get("split")) == ("student", "in_distribution")
    return row.get("kind") if shown else None


def _json(path: Path) -> dict[str, Any]:
    """Empty where there is none. Raises RunFolderError."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        remedy = "restore it, or remove it"
        raise RunFolderError("a run's summary.json is as it was written", f"{path}: {error}", remedy) from error
    return read if isinstance(read, dict) else {}
