"""The server's own OpenAPI document, /openapi.json, with the schemas of bodies that FastAPI does not read itself."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from pi_ray.serve.http.schemas import ChatBody, CompletionBody, RequestBody

SCHEMAS = "#/components/schemas/{model}"  # where OpenAPI's documents have a schema


def body_of(kind: type[RequestBody]) -> dict[str, Any]:
    """Describe a request's body for /openapi.json, since FastAPI does not read it."""
    schema = {"$ref": SCHEMAS.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe_api(api: FastAPI) -> dict[str, Any]:
    """The content of /openapi.json."""
    content = get_openapi(title=api.title, version=api.version, routes=api.routes)
    schemas = content.setdefault("components", {}).setdefault("schemas", {})
    for kind in (ChatBody, CompletionBody):
        schema = kind.model_json_schema(ref_template=SCHEMAS)
        schemas |= {**schema.pop("$defs", {}), kind.__name__: schema}
    return content
