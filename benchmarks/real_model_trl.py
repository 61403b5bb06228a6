"""TRL's DistillationTrainer on the real model, for real_model.py, under a Python that has TRL 1.16.0 and not tutorloop.

PYTHON benchmarks/real_model_trl.py STUDENT TEACHER PROMPTS.jsonl PROMPTS_A_STEP NEW_TOKENS STEPS RESULT.json
"""

import itertools
import json
import sys
import time

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

student, teacher, prompts, prompts_a_step, new_tokens, steps, result = sys.argv[1:]
with open(prompts, encoding="utf-8") as file:
    problems = [json.loads(line)["prompt"] for line in file]
ends: list[float] = []


class Clock(TrainerCallback):
    def on_step_end(self, *_args, **_kwargs):
        ends.append(time.monotonic())


trainer = DistillationTrainer(
    model=AutoModelForCausalLM.from_pretrained(student, dtype="float32"),
    teacher_model=AutoModelForCausalLM.from_pretrained(teacher, dtype="float32"),
    processing_class=AutoTokenizer.from_pretrained(student),
    train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": own}]} for own in problems]),
    callbacks=[Clock()],
    args=DistillationConfig(
        output_dir=result + ".run",
        per_device_train_batch_size=int(prompts_a_step),
        max_steps=int(steps),
        max_completion_length=int(new_tokens),
        learning_rate=1e-4,
        beta=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        seed=0,
    ),
)
trainer.train()
logs = [row for row in trainer.state.log_history if "loss" in row]
with open(result, "w", encoding="utf-8") as file:
    json.dump({"seconds": [b - a for a, b in itertools.pairwise(ends)], "logs": logs}, file)
