"""Starting the server: `run` serves in the foreground on this machine; `deploy` is what `serve deploy serve/app.yaml` and KubeRay import."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import socket
import threading
import time
from pathlib import Path

import ray
from ray import serve

from pi_ray.cluster import auth, session
from pi_ray.config import RunConfig, run_file
from pi_ray.errors import ConfigError
from pi_ray.serve.deployment import build
from pi_ray.serve.engine.completion import served
from pi_ray.serve.http.keys import key_digest, load
from pi_ray.store.adapters import AdapterStore

APP = "pi-ray"
log = logging.getLogger("ray.serve")


def bearer_key(config: RunConfig, required: bool | None = None) -> str:
    """The key from the environment. Raises ConfigError for a wrong keys file, and when there is no key and other machines can reach the server."""
    key, file = os.environ.get(config.serve.api_key_env, ""), config.serve.keys_file
    if file:
        load(Path(file))  # what is wrong with it is said here, not in a replica's log
    if not key and not file and (not auth.is_loopback(url_of(config)) if required is None else required):
        raise ConfigError(
            f"serve.host is {config.serve.host}: a server that other machines can reach needs a key. Set it in the environment, for example "
            f'export {config.serve.api_key_env}="$(openssl rand -hex 32)", name a file of keys in serve.keys_file (\'pi-ray key\' makes them), or set serve.host to 127.0.0.1'
        )
    return key


def url_of(config: RunConfig) -> str:
    host = config.serve.host
    return f"http://{f'[{host}]' if ':' in host else host}:{config.serve.port}"


def deploy(args: dict[str, str]) -> serve.Application:
    """Application builder for `serve deploy` and KubeRay: `args: {run: path/to/run.yaml}`. Always needs a key: a cluster's proxies bind all interfaces."""
    if "run" not in args:
        raise ConfigError("args.run is missing: the run.yaml whose store and base model are to be served")
    config = run_file.load(args["run"])
    _check_patience(config)
    return build(config, key_digest(bearer_key(config, required=True)))


def run(config: RunConfig, blocking: bool = True) -> str:
    """Serve `config` and return the URL; with `blocking`, print how to call it and serve until SIGINT or SIGTERM ("" when that came before it was up).

    Raises ConfigError: no key off loopback, the port is taken, or Serve already runs here on another address.
    """
    key = bearer_key(config)
    own = not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")  # this process's Ray, which ends with it
    if own:
        _check_port(config)
    session.connect()
    log.setLevel(logging.WARNING)
    try:
        _start(config)
        serve.run(build(config, key_digest(key)), name=APP, route_prefix="/", blocking=False)
    except BaseException as error:
        if own:
            _shutdown(own)
        if blocking and isinstance(error, KeyboardInterrupt):
            return ""  # Ctrl-C stops a server, early or late
        raise
    url = url_of(config)
    if blocking:
        names = ", ".join(served(config, AdapterStore(config.store)))
        print(f"serving at {url}, with a page to try it   models: {names}   Ctrl-C stops\n\n{usage(config, url)}\n\n{_metrics()}", flush=True)
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
    _check_patience(config)


def _check_patience(config: RunConfig) -> None:
    """Warn of proxies that give up before the server does: what they then say is not in OpenAI's format. Their limit was set when Serve was started."""
    client = serve.context._get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    limit = client.http_config.request_timeout_s if client else None
    if limit and limit <= config.serve.request_timeout_s:
        log.warning(
            "Serve's proxies cut a request off after %g s, serve.request_timeout_s allows %g s: set http_options.request_timeout_s of serve/app.yaml to %g and start Serve anew",
            limit, config.serve.request_timeout_s, config.serve.request_timeout_s + 5,
        )  # fmt: skip


def usage(config: RunConfig, url: str, model: str = "", query: str = "YOUR QUERY") -> str:
    """What to paste into a terminal or a program; `model` defaults to the first adapter of the store, or the base."""
    model = model or served(config, AdapterStore(config.store))[:2][-1]  # the base comes first
    env = config.serve.api_key_env
    key = f"-H \"Authorization: Bearer ${env}\" " if os.environ.get(env) else ""
    python = f'os.environ["{env}"]' if key else '"none"'
    messages = [{"role": "user", "content": query}]
    return f"""  curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' \\
    -d {shlex.quote(json.dumps({"model": model, "messages": messages}))}

  client = openai.OpenAI(base_url="{url}/v1", api_key={python})
  client.chat.completions.create(model="{model}", messages={json.dumps(messages)})

The message is the query alone: no template, no examples."""


def _metrics() -> str:
    """Where Prometheus finds this machine's metrics: Ray's port for them, not the server's."""
    local = ray.util.get_node_ip_address()
    ports = [node["MetricsExportPort"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == local]
    return f"Metrics for Prometheus: http://{local}:{ports[0]}/metrics" if ports else "Ray's metrics are switched off."


def _wait() -> None:
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    while not done.wait(1):
        pass


def _shutdown(own: bool) -> None:
    """Take away the application, once its replicas have finished what they have begun, and this process's own Ray; a cluster that was there before stays."""
    if APP in serve.status().applications:
        serve.delete(APP, _blocking=False)
        while APP in serve.status().applications:  # at most serve.graceful_shutdown_timeout_s, which may be longer than Ray's own patience
            time.sleep(0.2)
    if own:
        serve.shutdown()
        ray.shutdown()
