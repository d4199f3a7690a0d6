"""Starts the server: `run_server` in the foreground, `deploy` for `serve deploy serve/app.yaml` and KubeRay."""

import json
import logging
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import serve

from pi_ray.cluster import auth, haproxy, session
from pi_ray.config import RunConfig, run_file
from pi_ray.errors import ConfigError
from pi_ray.serve.deployment import build_application
from pi_ray.serve.engine.completion import served_models
from pi_ray.serve.http.connections import check_callback
from pi_ray.serve.http.keys import key_digest, load_keys
from pi_ray.store.adapters import AdapterStore

APP_NAME = "pi-ray"
KEEP_ALIVE_S = 30  # after which an idle connection is closed; serve/app.yaml and RayService say the same
log = logging.getLogger("ray.serve")


def bearer_key(config: RunConfig, required: bool = False) -> str:
    """The key from the environment. Without `required` only a server that other machines can reach needs one.

    Raises ConfigError for an invalid keys file, and when a key is needed and there is neither key nor file.
    """
    env, file = config.serve.api_key_env, config.serve.keys_file
    key = os.environ.get(env, "").strip()  # of the line break that a file's content ends with
    if file:
        keys = load_keys(Path(file))  # an error is raised here, not in a replica's log
        if not config.serve.usage_dir and any(known.monthly_tokens for known in keys.values()):
            cure = "name a folder in serve.usage_dir, where tokens are counted"
            raise ConfigError(f"serve.keys_file {file}: a key has monthly_tokens; {cure}")
    if not key and not file and (required or not auth.is_loopback(server_url(config))):
        example = f'Set it in the environment, for example export {env}="$(openssl rand -hex 32)"'
        others = "name a file of keys in serve.keys_file ('pi-ray key' makes them), or set serve.host to 127.0.0.1"
        problem = f"serve.host is {config.serve.host}: a server that other machines can reach needs a key"
        raise ConfigError(f"{problem}. {example}, {others}")
    return key


def server_url(config: RunConfig) -> str:
    host = config.serve.host
    return f"http://{f'[{host}]' if ':' in host else host}:{config.serve.port}"


def deploy(args: dict[str, str]) -> serve.Application:
    """For `serve deploy`, with `args: {run: FILE}`. Always needs a key: a cluster's proxies bind all interfaces."""
    if "run" not in args:
        raise ConfigError("args.run is missing: the run.yaml whose store and base model are to be served")
    config = run_file.load_run_file(args["run"])
    _check_proxy_timeout(config)
    return build_application(config, key_digest(bearer_key(config, required=True)))


def run_server(config: RunConfig, blocking: bool = True) -> str:
    """Serve `config` and return the URL; with `blocking`, print how to call it and serve until SIGINT or SIGTERM.

    Raises ConfigError: no key off loopback, the port is taken, or Serve already runs here on another address.
    """
    key = bearer_key(config)
    starts_ray = not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")  # a Ray that ends with this process
    if starts_ray:
        _check_port(config)
    session.connect()
    check_callback()
    log.setLevel(logging.WARNING)
    if warning := haproxy.describe_risks():
        log.warning(warning)
    done, deployed = threading.Event(), False
    try:
        if blocking:  # also where a shell that starts it in the background has SIGINT ignored
            _on_stop(signal.default_int_handler)
        _start_proxies(config)
        application, deployed = build_application(config, key_digest(key)), True
        serve.run(application, name=APP_NAME, route_prefix="/", blocking=False)
        if blocking:
            _on_stop(lambda *_: done.set())
    except BaseException as error:
        stopped = blocking and isinstance(error, KeyboardInterrupt)  # Ctrl-C stops a server, also before it is up
        if starts_ray or (stopped and deployed):
            _shutdown(starts_ray)
        if stopped:
            return ""
        raise
    url = server_url(config)
    if blocking:
        names = ", ".join(served_models(config, AdapterStore(config.store)))
        print(f"serving at {url}, with a page to try it   models: {names}   Ctrl-C stops\n", flush=True)
        print(f"{usage_text(config)}\n\n{_metrics_text()}", flush=True)
        while not done.wait(1):  # in steps: a signal that another thread takes does not end a wait
            pass
        print("shutting down: requests under way are finished first", flush=True)
        _shutdown(starts_ray)
    return url


def _on_stop(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Call `handler` when this process is asked to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _check_port(config: RunConfig) -> None:
    """Raise ConfigError when the port is taken; Serve's own error comes late and suggests nothing."""
    host, port = config.serve.host, config.serve.port
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ConfigError(f"cannot listen: {error.strerror}; set serve.port to a free port") from error


def _start_proxies(config: RunConfig) -> None:
    """Start Serve's proxies. Raises ConfigError when Serve already runs on another address, which it would keep."""
    host, port, limit = config.serve.host, config.serve.port, config.serve.request_timeout_s + 5
    options = {"host": host, "port": port, "keep_alive_timeout_s": KEEP_ALIVE_S, "request_timeout_s": limit}
    logging_config = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(proxy_location="EveryNode", http_options=options, logging_config=logging_config)
    client = serve.context._get_global_client()
    if client and (client.http_config.host, client.http_config.port) != (host, port):
        cure = "stop it with 'serve shutdown', or set serve.host and serve.port to that"
        raise ConfigError(f"Ray Serve already runs at {client.http_config.host}:{client.http_config.port}; {cure}")
    _check_proxy_timeout(config)


def _check_proxy_timeout(config: RunConfig) -> None:
    """Warn of proxies whose limit, set when Serve started, ends a request first: with an error unlike OpenAI's."""
    client = serve.context._get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    limit, allowed = client.http_config.request_timeout_s if client else None, config.serve.request_timeout_s
    if limit and limit <= allowed:
        cure = f"set http_options.request_timeout_s of serve/app.yaml to {allowed + 5:g} and start Serve anew"
        allows = f"serve.request_timeout_s allows {allowed:g} s"
        log.warning("Serve's proxies cut a request off after %g s, %s: %s", limit, allows, cure)


def usage_text(config: RunConfig, model: str = "", query: str = "YOUR QUERY") -> str:
    """How to call the server. `model`: by default the store's first adapter, or the base."""
    model = model or served_models(config, AdapterStore(config.store))[:2][-1]  # the base comes first
    url, env = server_url(config), config.serve.api_key_env
    key = f"-H \"Authorization: Bearer ${env}\" " if os.environ.get(env) or config.serve.keys_file else ""
    python = f'os.environ["{env}"]' if key else '"none"'
    messages = [{"role": "user", "content": query}]
    return f"""  curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' \\
    -d {shlex.quote(json.dumps({"model": model, "messages": messages}))}

  client = openai.OpenAI(base_url="{url}/v1", api_key={python})
  client.chat.completions.create(model="{model}", messages={json.dumps(messages)})

The message is the query alone: no template, no examples."""


def _metrics_text() -> str:
    """Where Prometheus finds this machine's metrics: at Ray's port for them, not the server's."""
    local = ray.util.get_node_ip_address()
    for node in ray.nodes():
        if node["Alive"] and node["NodeManagerAddress"] == local:
            return f"Metrics for Prometheus: http://{local}:{node['MetricsExportPort']}/metrics"
    return "Ray's metrics are switched off."


def _shutdown(stop_ray: bool) -> None:
    """Delete the application once its replicas have finished their requests, and with `stop_ray` this process's Ray."""
    if APP_NAME in serve.status().applications:
        serve.delete(APP_NAME, _blocking=False)
        # At most serve.graceful_shutdown_timeout_s, which may be longer than a blocking serve.delete waits.
        while APP_NAME in serve.status().applications:
            time.sleep(0.2)
    if stop_ray:
        serve.shutdown()
        ray.shutdown()
