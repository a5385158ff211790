"""The manifest for Kubernetes: valid, and its command one that the program takes."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from absl import flags

from experiments import train

ROOT = Path(__file__).parents[2]


def strict(schema):
    """A schema that refuses unknown fields, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        schema.setdefault("additionalProperties", False)
    return schema


@pytest.fixture
def manifest():
    return yaml.safe_load((ROOT / "experiments" / "jobset.yaml").read_text())


@pytest.fixture(scope="module")
def validator():
    schema = json.loads((ROOT / "tests/jobset/jobset_v1alpha2.json").read_text())
    schema["properties"]["metadata"] = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string"}},
    }
    return jsonschema.Draft202012Validator(strict(schema))


def test_manifest_is_valid_by_the_schema(manifest, validator):
    validator.validate(manifest)
    jobs = manifest["spec"]["replicatedJobs"]
    jobs[0]["replicas"] = "one"
    jobs[0]["template"]["spec"]["paralellism"] = 2
    messages = "\n".join(error.message for error in validator.iter_errors(manifest))
    assert "'one' is not of type 'integer'" in messages
    assert "'paralellism' was unexpected" in messages


def test_its_command_gives_flags_of_ours_that_fit_together(manifest):
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    python, m, module, *arguments = container["command"]
    assert [python, m, module] == ["python", "-m", "experiments.lenet"]
    before = set(flags.FLAGS)
    train.define_flags()
    try:
        index = [a.replace("$(JOB_COMPLETION_INDEX)", "1") for a in arguments]
        flags.FLAGS(["program", *index])
        given = flags.FLAGS
        assert given.process_id == 1
        assert given.num_processes == spec["parallelism"] == spec["completions"]
        # The name that JobSet gives the pod of process 0.
        name, job_name = manifest["metadata"]["name"], job["name"]
        (port,) = container["ports"]
        expected = f"{name}-{job_name}-0-0.{name}:{port['containerPort']}"
        assert given.coordinator_address == expected
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert given.batch_size % (gpus * given.num_processes) == 0
        (mount,) = container["volumeMounts"]
        assert given.workdir.startswith(f"{mount['mountPath']}/")
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
