"""Whether a JobSet is one, told before a cluster is asked (the extra [gke]).

The JobSet around the Job is checked by a schema of the fields that vidgen writes, the Job with its pods by
kubernetes-validate, which has the schemas of Kubernetes inside. Both are strict: a field they don't know is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from vidgen.config import ConfigError

KUBERNETES = "1.31"  # whose Job is asked for; pod failure policies are stable since


def _object(required: str = "", **properties: Any) -> dict[str, Any]:
    """The schema of an object with these fields and no others; `required` are names, with spaces between."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _text(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern}


_NAME = _text("^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 0}
_ACTION = {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]}
_REASON = {
    "enum": [
        "BackoffLimitExceeded",
        "DeadlineExceeded",
        "FailedIndexes",
        "MaxFailedIndexesExceeded",
        "PodFailurePolicy",
    ]
}
SCHEMA = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_object("name", name=_NAME, namespace=_NAME, labels=_TEXTS, annotations=_TEXTS),
    spec=_object(
        "replicatedJobs",
        failurePolicy=_object(
            maxRestarts=_COUNT,
            rules={
                "type": "array",
                "items": _object(
                    "name action",
                    name=_text("^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"),
                    action=_ACTION,
                    onJobFailureReasons={"type": "array", "items": _REASON},
                    targetReplicatedJobs={"type": "array", "items": _NAME},
                ),
            },
        ),
        network=_object(enableDNSHostnames={"type": "boolean"}, subdomain=_NAME),
        suspend={"type": "boolean"},
        ttlSecondsAfterFinished=_COUNT,
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": _object(
                "name replicas template",
                name=_NAME,
                replicas={"type": "integer", "minimum": 1},
                template=_object("spec", metadata={"type": "object"}, spec={"type": "object"}),
            ),
        },
    ),
)


def check(manifest: Mapping[str, Any]) -> None:
    """Raises ConfigError for a field that is not as a JobSet has it, with its place and the nearest known one."""
    try:
        import jsonschema
        import kubernetes_validate
    except ImportError:
        raise ConfigError('to check a JobSet needs the extra [gke]: pip install "vidgen[gke]"') from None
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(manifest)
    if error := jsonschema.exceptions.best_match(found):
        raise ConfigError(_line("JobSet", error))
    for job in manifest["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}} | job["template"]
        try:
            kubernetes_validate.validate(whole, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as e:
            deepest = jsonschema.exceptions.best_match([e])
            raise ConfigError(_line(f"JobSet: job {job['name']}", deepest)) from None


def _line(what: str, error: Any) -> str:
    place = ".".join(map(str, error.absolute_path)) or "the top"
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = error.schema.get("properties", {})
        wrong = next(name for name in error.instance if name not in known)
        near = difflib.get_close_matches(wrong, known, n=1)
        return f"{what}: {place}: unknown field {wrong!r}" + (f"; did you mean {near[0]}?" if near else "")
    return f"{what}: {place}: {' '.join(error.message.split())[:200]}"
