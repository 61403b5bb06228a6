"""Every kind of run on the real model, a few steps each: `make test-real`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from real_runs import GREEDY_TOKENS, RECIPES, greedy, logprobs_of, rollouts_of, steps_of, train
from safetensors.torch import load_file


def mean(values: torch.Tensor) -> float:
    return float(values.double().mean())


def test_topk_divergence_is_that_of_the_teachers_support(real_models, tmp_path):
    teacher = (f"teacher.model={real_models.teacher}", "teacher.signal=topk", "method_options.top_k=64")
    train(real_models, tmp_path / "run", "opd_exact.yaml", *teacher)
    logged = steps_of(tmp_path / "run")[0]
    rollouts = rollouts_of(tmp_path / "run", 1)
    s = torch.cat([logprobs_of(real_models.student, row) for row in rollouts]).double()
    t = torch.cat([logprobs_of(real_models.teacher, row) for row in rollouts]).double()
    top = t.topk(64, 1)
    p, q = (
        torch.cat([x, (1 - x.sum(1, keepdim=True)).clamp(min=1e-12)], 1)
        for x in (s.gather(1, top.indices).exp(), top.values.exp())
    )
    assert logged["learner"]["topk_reverse_kl"] == pytest.approx(mean((p * (p.log() - q.log())).sum(1)), abs=1e-3)
    assert logged["learner"]["teacher_entropy"] == pytest.approx(mean(-(t.exp() * t).sum(1)), abs=1e-4)


def test_sampled_tokens_estimate_the_divergence(real_models, tmp_path):
    train(
        real_models,
        tmp_path / "run",
        "opd_exact.yaml",
        f"teacher.model={real_models.teacher}",
        "teacher.signal=sampled",
    )
    logged, rollouts = steps_of(tmp_path / "run")[0], rollouts_of(tmp_path / "run", 1)
    gaps = []
    for row in rollouts:
        ids = torch.tensor(row["token_ids"][row["prompt_length"] :])[:, None]
        gaps.append(torch.tensor(row["logprobs"]) - logprobs_of(real_models.teacher, row).gather(1, ids)[:, 0])
    assert logged["learner"]["reverse_kl"] == pytest.approx(mean(torch.cat(gaps)), abs=1e-3)


def test_adapters_alone_train_and_the_export_holds_them_merged(real_models, tmp_path):
    train(
        real_models, tmp_path / "run", "opd_exact.yaml", f"teacher.model={real_models.teacher}", "student.lora.rank=4"
    )
    final, before = (load_file(f / "model.safetensors") for f in (tmp_path / "run" / "final", real_models.student))
    assert final.keys() == before.keys()
    changed = {name for name in final if not torch.equal(final[name], before[name])}
    assert changed and all(name.endswith("_proj.weight") for name in changed)
    assert (tmp_path / "run" / "final" / "adapter" / "adapter_model.safetensors").is_file()
    (row, *_) = rollouts_of(tmp_path / "run", 2)
    assert len(greedy(tmp_path / "run" / "final", row)) <= GREEDY_TOKENS


def test_sft_learns_given_answers_and_their_end(real_models, tmp_path):
    train(real_models, tmp_path / "run", "sft.yaml", "data.solution_field=answer")
    logged, rollouts = steps_of(tmp_path / "run")[0], rollouts_of(tmp_path / "run", 1)
    nll = []
    for row in rollouts:
        ids = torch.tensor(row["token_ids"][row["prompt_length"] :])
        assert row["source"] == "dataset" and (int(ids[-1]) == 2) == (row["finish_reason"] == "stop")
        nll.append(-logprobs_of(real_models.student, row).gather(1, ids[:, None])[:, 0])
    assert logged["loss"] == pytest.approx(mean(torch.cat(nll)), abs=1e-4)


def test_grpo_trains_on_groups_of_the_teacher_as_a_student(real_models, tmp_path):
    """The damaged student solves nothing: the undamaged one has something to compare."""
    own = (f"student.model={real_models.teacher}", "rollout.samples_per_prompt=4", "rollout.temperature=0.7")
    train(real_models, tmp_path / "run", "grpo.yaml", *own)
    for step in (1, 2):
        groups: dict[str, list[float]] = {}
        for row in rollouts_of(tmp_path / "run", step):
            groups.setdefault(row["group_id"], []).append(row["advantage"])
        assert len(groups) == 4
        assert len(groups) == 4 and all(abs(sum(group)) < 1e-5 for group in groups.values())


def test_skills_are_shown_to_a_self_teacher(real_models, tmp_path):
    own = (f"student.model={real_models.teacher}", f"teacher.model={real_models.teacher}", "rollout.temperature=0.7")
    train(real_models, tmp_path / "run", "sgsd_lab.yaml", *own)
    assert all(np.isfinite(row["loss"]) for row in steps_of(tmp_path / "run"))


def test_a_run_that_was_interrupted_goes_on_bit_for_bit(real_models, tmp_path):
    teacher, steps = f"teacher.model={real_models.teacher}", "steps=3"
    train(real_models, tmp_path / "whole", "opd_exact.yaml", teacher, steps)
    folder = tmp_path / "halves"
    command = [
        sys.executable,
        "-c",
        "import sys, json; from pathlib import Path; sys.path[:0] = json.loads(sys.argv[1])\n"
        "import real_runs; from tutorloop.lab.real import real_models\n"
        "real_runs.train(real_models(), Path(sys.argv[2]), 'opd_exact.yaml', *sys.argv[3:])",
    ]
    paths = json.dumps([str(Path(__file__).parents[1])])
    with subprocess.Popen([*command, paths, str(folder), teacher, steps], start_new_session=True) as process:
        while not (folder / "metrics.jsonl").exists() or not steps_of(folder):
            assert process.poll() is None
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
        process.wait(300)
    assert len(steps_of(folder)) < 3
    train(real_models, folder, "opd_exact.yaml", teacher, steps, resume=True)
    whole, halves = (steps_of(path) for path in (tmp_path / "whole", folder))
    assert [row["loss"] for row in whole] == [row["loss"] for row in halves]
    finals = [(path / "final" / "model.safetensors").read_bytes() for path in (tmp_path / "whole", folder)]
    assert finals[0] == finals[1]


def test_vllm_samples_and_scores_and_reads_the_export(real_models, tmp_path):
    pytest.importorskip("vllm", reason="no vLLM here: make vllm")
    engines = ("rollout.engine=vllm", "teacher.engine=vllm", f"teacher.model={real_models.teacher}")
    train(real_models, tmp_path / "run", "opd_exact.yaml", *engines)
    logged, rollouts = steps_of(tmp_path / "run")[0], rollouts_of(tmp_path / "run", 1)
    s = torch.cat([logprobs_of(real_models.student, row) for row in rollouts]).double()
    t = torch.cat([logprobs_of(real_models.teacher, row) for row in rollouts]).double()
    assert logged["learner"]["reverse_kl"] == pytest.approx(mean((s.exp() * (s - t)).sum(1)), abs=1e-3)
    script = (
        "import sys, json; from vllm import LLM, SamplingParams\n"
        "rows = json.load(open(sys.argv[2]))\n"
        "llm = LLM(sys.argv[1], dtype='float32', max_model_len=512, enforce_eager=True, disable_log_stats=True)\n"
        "made = llm.generate([{'prompt_token_ids': r} for r in rows], SamplingParams(temperature=0, max_tokens=12))\n"
        "json.dump([list(m.outputs[0].token_ids) for m in made], open(sys.argv[3], 'w'))"
    )
    rows = rollouts_of(tmp_path / "run", 2)
    prompts, made = tmp_path / "prompts.json", tmp_path / "made.json"
    prompts.write_text(json.dumps([row["token_ids"][: row["prompt_length"]] for row in rows]))
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    command = [sys.executable, "-c", script, str(tmp_path / "run" / "final"), str(prompts), str(made)]
    subprocess.run(command, check=True, env=environment, timeout=600)
    assert json.loads(made.read_text()) == [greedy(tmp_path / "run" / "final", row) for row in rows]


def test_the_recipe_composes(real_models, tmp_path):
    command = [str(Path(sys.executable).parent / "tutorloop"), "train", str(RECIPES / "smollm2_opd.yaml"), "--check"]
    paths = [f"student.model={real_models.student}", f"teacher.model={real_models.teacher}"]
    data = [f"data.path={real_models.train}", f"eval.path={real_models.test}", f"output_dir={tmp_path}"]
    subprocess.run([*command, *paths, *data], check=True, timeout=300)
