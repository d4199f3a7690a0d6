"""Ray's prefix-aware router, for prompts that clients send whole: a request goes to the replica that has read most of
its beginning. `serve.router: prefix` takes it.
"""

from typing import Any

from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import PrefixCacheAffinityRouter
from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree import PrefixTreeActor
from ray.serve._private.constants import SERVE_NAMESPACE

from pi_ray.serve.engine.request import CompletionRequest


class PrefixRouter(PrefixCacheAffinityRouter):
    """Reads our requests, and those that vLLM gets, whose prompts are token ids: one character an id."""

    def initialize_state(self, *arguments: Any, **settings: Any) -> None:
        """Make the actor that remembers prompts under Ray's name for it, but so that it waits for no CPU: replicas may
        have them all.
        """
        where = f"{SERVE_NAMESPACE}::{self._deployment_id.app_name}::{self._deployment_id.name}"
        named = {"name": "LlmPrefixTreeActor", "namespace": where, "get_if_exists": True, "lifetime": "detached"}
        actor: Any = PrefixTreeActor
        actor.options(num_cpus=0, **named).remote()
        super().initialize_state(*arguments, **settings)

    def _extract_text_from_request(self, pending_request: Any) -> str:
        return routed_text(pending_request.args[0])


def routed_text(request: Any) -> str:
    """A text, never empty, whose beginning two requests share as far as they can share a prefix cache."""
    own = isinstance(request, CompletionRequest)
    prompt = request.full_text if own else "".join(map(chr, request.prompt))
    return f"{request.model}\0{request.cache_salt or ''}\0{prompt}"
