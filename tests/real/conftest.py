"""The real model, where `make real` (or `python -m tutorloop.lab.real`) has put it; else these tests are skipped."""

import pytest

from tutorloop.lab.real import RealModels, cache_folder
from tutorloop.lab.real import real_models as where


@pytest.fixture(scope="session")
def real_models() -> RealModels:
    """`.teacher` and `.student` are folders, `.train`, `.test` and `.ood` JSONL files."""
    models = where()
    parts = [models.teacher / "config.json", models.student / "config.json", models.train, models.test, models.ood]
    if missing := [str(part) for part in parts if not part.exists()]:
        pytest.skip(f"no real model in {cache_folder()}: {', '.join(missing)} missing; make it with `make real`")
    return models
