"""Ray Serve: one light ingress deployment `Api` in front of replicas of `Model`, each with its own engine.

    client -> proxy -> Api (HTTP, key, limits) -> bounded queue -> Model (engine, adapters)

`run` serves in the foreground on this machine; `deploy` is what `serve deploy serve/app.yaml` and KubeRay import.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import shlex
import signal
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from pi_ray import cluster, runfile
from pi_ray.config import RunConfig
from pi_ray.errors import ConfigError
from pi_ray.serving.adapters import AdapterStore
from pi_ray.serving.api import create_api, key_digest
from pi_ray.serving.completion import Ask, Completer, RefusedError, base_name

APP = "pi-ray"
API_REQUESTS = 1024  # open HTTP requests at the ingress; the queue before the model is the bound that clients meet


class Model:
    """A replica: the base model, its adapters and the engine. `complete` streams events; refusals are events too, so that they log no traceback."""

    def __init__(self, config: RunConfig):
        import torch

        from pi_ray.models import load_tokenizer
        from pi_ray.registry import engines

        if not torch.cuda.is_available():  # Ray gives an actor one thread; a CPU replica needs its share of the machine
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.serve.max_replicas))
        self.engine = engines[config.serve.engine](config.model, config.serve)
        self.completer = Completer(config, self.engine, load_tokenizer(config.model), context_length(config))

    async def complete(self, ask: Ask) -> AsyncIterator[dict[str, Any]]:
        try:
            async with aclosing(self.completer.complete(ask)) as events:
                async for event in events:
                    yield event
        except RefusedError as error:
            yield {"refused": error.args}

    def check_health(self) -> None:
        check = getattr(self.engine, "check", None)
        if check:
            check()


class HandleBackend:
    """api.Backend over the Model deployment. A full queue is 429, a lost replica 503; leaving the iterator cancels the generation."""

    def __init__(self, config: RunConfig, handle: Any):
        self.config = config
        self.store = AdapterStore(config.store)
        self.handle = handle

    async def models(self) -> list[str]:
        return [base_name(self.config.model.base), *self.store.names()]

    async def complete(self, ask: Ask) -> AsyncIterator[dict[str, Any]]:
        response = self.handle.options(stream=True).complete.remote(ask)
        try:
            async for event in response:
                if "refused" in event:
                    raise RefusedError(*event["refused"])
                yield event
        except BackPressureError:
            raise RefusedError(429, "all slots and the queue are taken; come back later", "rate_limit_error", "queue_full") from None
        except (DeploymentUnavailableError, ray.exceptions.RayActorError):
            raise RefusedError(503, "the model is being restarted; come back later", "server_error", "unavailable") from None
        except (asyncio.CancelledError, GeneratorExit):  # the client left, or the time is over
            response.cancel()
            raise


def build(config: RunConfig, digest: str = "") -> serve.Application:
    """The Serve application of `config`. `digest` (api.key_digest) is what the server keeps of the bearer key."""
    limits = config.serve
    gpus = int(ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0)
    model = serve.deployment(
        Model,
        max_ongoing_requests=limits.max_ongoing_requests,
        max_queued_requests=limits.max_queued_requests,
        autoscaling_config={
            "min_replicas": limits.min_replicas,
            "max_replicas": limits.max_replicas,
            "target_ongoing_requests": limits.max_ongoing_requests * 0.75,
        },
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        health_check_period_s=5,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=30,
    )

    def api() -> Any:  # called in the ingress replica
        return create_api(HandleBackend(config, serve.get_deployment_handle("Model")), limits, digest)

    ingress = serve.deployment(
        serve.ingress(api)(type("Api", (_Ingress,), {})),
        name="Api",
        max_ongoing_requests=API_REQUESTS,
        max_queued_requests=API_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=30,
    )
    return ingress.bind(model.bind(config))


class _Ingress:
    """Takes the bound Model, so that Serve deploys it; the routes find it by name."""

    def __init__(self, model: Any):
        self.model = model


def context_length(config: RunConfig) -> int:
    """Tokens that the base model can attend to."""
    from transformers import AutoConfig

    from pi_ray.models import resolve

    return AutoConfig.from_pretrained(resolve(config.model.base), revision=config.model.revision or "main", trust_remote_code=False).max_position_embeddings


def bearer_key(config: RunConfig, required: bool | None = None) -> str:
    """The key from the environment. Raises ConfigError when there is none and the server can be reached from other machines."""
    key = os.environ.get(config.serve.api_key_env, "")
    if not key and (not is_loopback(config.serve.host) if required is None else required):
        raise ConfigError(
            f"serve.host is {config.serve.host}: a server that other machines can reach needs a key. Set it in the environment, for example "
            f'export {config.serve.api_key_env}="$(openssl rand -hex 32)", or set serve.host to 127.0.0.1'
        )
    return key


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def deploy(args: dict[str, str]) -> serve.Application:
    """Application builder for `serve deploy` and KubeRay: `args: {run: path/to/run.yaml}`. Always needs a key: a cluster's proxies bind all interfaces."""
    if "run" not in args:
        raise ConfigError("args.run is missing: the run.yaml whose store and base model are to be served")
    config = runfile.load(args["run"])
    return build(config, key_digest(bearer_key(config, required=True)))


def run(config: RunConfig, blocking: bool = True) -> str:
    """Serve `config` and return the URL; with `blocking`, print how to call it and serve until SIGINT or SIGTERM ("" when that came before it was up).

    Raises ConfigError: no key off loopback, the port is taken, or Serve already runs here on another address.
    """
    key = bearer_key(config)
    own = not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")  # this process's Ray, which ends with it
    if own:
        _check_port(config)
    cluster.connect()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        _start(config)
        serve.run(build(config, key_digest(key)), name=APP, route_prefix="/", blocking=False)
    except BaseException as error:
        if own:
            _shutdown(own)
        if blocking and isinstance(error, KeyboardInterrupt):
            return ""  # Ctrl-C stops a server, early or late
        raise
    url = f"http://{config.serve.host}:{config.serve.port}"
    if blocking:
        names = [*AdapterStore(config.store).names(), base_name(config.model.base)]
        print(f"serving at {url}   models: {', '.join(names)}   Ctrl-C stops\n\n{usage(config, url)}", flush=True)
        _wait()
        print("shutting down: requests under way are finished first", flush=True)
        _shutdown(own)
    return url


def _check_port(config: RunConfig) -> None:
    """Serve's own failure on a taken port comes late and names no cure."""
    host, port = config.serve.host, config.serve.port
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror}; set serve.port to a free port") from error


def _start(config: RunConfig) -> None:
    """Start Serve's proxy on the configured address. A Serve that already runs keeps its own address, so it must be the same one."""
    limits = config.serve
    options = {"host": limits.host, "port": limits.port, "request_timeout_s": limits.request_timeout_s + 5, "keep_alive_timeout_s": 30}
    serve.start(proxy_location="EveryNode", http_options=options, logging_config={"log_level": "WARNING", "enable_access_log": False})
    found = serve.context._get_global_client().http_config
    if (found.host, found.port) != (limits.host, limits.port):
        raise ConfigError(f"Ray Serve already runs at {found.host}:{found.port}; stop it with 'serve shutdown', or set serve.host and serve.port to that")


def usage(config: RunConfig, url: str, model: str = "", query: str = "YOUR QUERY") -> str:
    """What to paste into a terminal or a program; `model` defaults to the first adapter of the store, or the base."""
    model = model or next(iter(AdapterStore(config.store).names()), base_name(config.model.base))
    env = config.serve.api_key_env
    key = f"-H \"Authorization: Bearer ${env}\" " if os.environ.get(env) else ""
    python = f'os.environ["{env}"]' if key else '"none"'
    messages = [{"role": "user", "content": query}]
    return f"""  curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' \\
    -d {shlex.quote(json.dumps({"model": model, "messages": messages}))}

  client = openai.OpenAI(base_url="{url}/v1", api_key={python})
  client.chat.completions.create(model="{model}", messages={json.dumps(messages)})

The message is the query alone: no template, no examples."""


def _wait() -> None:
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    while not done.wait(1):
        pass


def _shutdown(own: bool) -> None:
    """End this process's Ray; on a cluster that was there before, take away the application alone."""
    if own:
        serve.shutdown()
        ray.shutdown()
    else:
        serve.delete(APP)
