"""The manifests in deploy/ are what KubeRay's own schema accepts; a run goes on after a failure."""

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tutorloop import __version__

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("TUTORLOOP_SHARED_DATA", ROOT.parent / "shared" / "data"))


def strict(schema: Any) -> Any:
    """A CRD's OpenAPI schema as a JSON schema that refuses unknown keys, as the API server prunes them."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items() if key not in ("default", "x-kubernetes-validations")}
    if result.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def test_the_rayjob_is_valid_and_a_wrong_one_is_not() -> None:
    crd = SHARED / "kuberay" / "crd_RayJob_v1.openapi.json"
    if not crd.is_file():
        pytest.skip(f"the shared data is not there: {crd}")
    schema = strict(json.loads(crd.read_text())["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    job = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())
    for group in [job["spec"]["rayClusterSpec"]["headGroupSpec"], *job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]:
        for container in group["template"]["spec"]["containers"]:
            for port in container.get("ports", []):
                port.setdefault("protocol", "TCP")  # the schema's default, which the API server fills in
    jsonschema.validate(job, schema)
    job["spec"]["rayClusterSpecc"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, schema)


def test_the_rayjob_names_this_version_and_goes_on_after_a_failure() -> None:
    spec = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert images == {f"tutorloop:{__version__}"}
    assert "ray==" + cluster["rayVersion"] in (ROOT / "pyproject.toml").read_text()
    assert spec["backoffLimit"] > 0 and spec["entrypoint"].split()[-2:] == ["--resume", "auto"]
