"""`tutorloop eval MODEL [--data …]`: avg@k, pass@k and maj@k of a model, with intervals over problems."""

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, hub id, lab:NAME, or a run's folder (its final/).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value of a recipe, e.g. rollout.num_gpus=1 learner.dtype=bf16")
    ] = None,
    data: Annotated[str, typer.Option(help="lab:SPLIT, a JSONL or Parquet file, or a hub id.")] = "lab:test",
    data_name: Annotated[str, typer.Option(help="A hub dataset's configuration.")] = "",
    split: Annotated[str, typer.Option(help="A hub dataset's split.")] = "test",
    prompt_field: Annotated[str, typer.Option(help="Field of the problem.")] = "prompt",
    answer_field: Annotated[str, typer.Option(help="Field of the gold answer.")] = "answer",
    prompt_suffix: Annotated[str, typer.Option(help="Text after every problem.")] = "",
    problems: Annotated[int, typer.Option(min=1, help="First problems of the data.")] = 200,
    samples: Annotated[int, typer.Option(min=1, help="Samples per problem, the k.")] = 8,
    temperature: Annotated[float, typer.Option(min=0)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    verifier: Annotated[str, typer.Option(help="As verifier.kind: math, exact, numeric, …")] = "math",
    replicas: Annotated[int, typer.Option(min=1)] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster (default: a private local one).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> bool:
    """Evaluate a model on problems with verifiable answers."""
    from ..contracts.recipe import parse_config

    final = Path(model) / "final"
    tree = {
        "method": "opd",
        "output_dir": ".",
        "steps": 1,
        "prompts_per_step": 1,
        "seed": seed,
        "student": {"model": str(final) if final.is_dir() else model},
        "teacher": {"model": model},
        "data": {
            "path": data,
            "name": data_name,
            "split": split,
            "prompt_field": prompt_field,
            "answer_field": answer_field,
            "prompt_suffix": prompt_suffix,
        },
        "rollout": {"replicas": replicas, "max_new_tokens": max_new_tokens, "batch_size": batch_size},
        "verifier": {"kind": verifier},
        "eval": {"problems": problems, "samples": samples, "temperature": temperature},
    }
    config = parse_config(tree, overrides or [])
    from rich.console import Console

    from ..cluster import standalone_eval

    row = standalone_eval.evaluate_model(config, address)
    if as_json:
        shares = ("response_length", "truncated_share", "answered_share")
        typer.echo(json.dumps(row.stats | {name: getattr(row, name) for name in shares}))
    else:
        Console().print(standalone_eval.table(config, row))
    return True
