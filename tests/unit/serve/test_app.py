"""What is decided before Serve starts: who needs a key, which address, what is printed."""

import os
import pickle
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pi_ray import config as configuration
from pi_ray.config import RunConfig, ServeConfig
from pi_ray.errors import ConfigError
from pi_ray.serve import app
from pi_ray.serve.http.keys import ApiKeys, key_digest

KEY = "a-secret-key"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("PI_RAY_API_KEY", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_idle_connections_are_closed_as_soon_in_every_way_of_serving():
    root = Path(__file__).parents[3]
    deployed = yaml.safe_load((root / "serve" / "app.yaml").read_text())
    files = yaml.safe_load_all((root / "cluster" / "k8s" / "rayservice.yaml").read_text())
    (service,) = (file for file in files if file["kind"] == "RayService")
    for found in (deployed, yaml.safe_load(service["spec"]["serveConfigV2"])):
        assert found["http_options"]["keep_alive_timeout_s"] == app.KEEP_ALIVE_S


def config(**limits):
    return RunConfig(name="t", store="store", run_dir="runs/t", serve=ServeConfig(**limits))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.org", "", "localhost.example.org"])
def test_server_off_loopback_refuses_to_start_without_a_key(host):
    with pytest.raises(ConfigError, match="PI_RAY_API_KEY"):
        app.run_server(config(host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_server_needs_no_key_but_uses_one_that_is_set(host, monkeypatch):
    assert app.bearer_key(config(host=host)) == ""
    monkeypatch.setenv("PI_RAY_API_KEY", KEY)
    assert app.bearer_key(config(host=host)) == KEY


def test_white_space_around_the_key_is_not_part_of_it(monkeypatch):
    """As a secret read from a file has it; a client that sends the key without it must be let in."""
    monkeypatch.setenv("PI_RAY_API_KEY", f" {KEY}\r\n")
    assert app.bearer_key(config()) == KEY
    assert ApiKeys(key_digest(app.bearer_key(config()))).find(f"Bearer {KEY}".encode())
    monkeypatch.setenv("PI_RAY_API_KEY", "\n")
    with pytest.raises(ConfigError, match="needs a key"):
        app.bearer_key(config(host="0.0.0.0"))


def test_cluster_deployment_needs_a_key_and_pickles_only_its_digest(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(configuration.dump_config(config()))
    with pytest.raises(ConfigError, match="PI_RAY_API_KEY"):
        app.deploy({"run": str(tmp_path / "run.yaml")})
    with pytest.raises(ConfigError, match=r"args\.run"):
        app.deploy({})
    monkeypatch.setenv("PI_RAY_API_KEY", KEY)
    made = app.deploy({"run": str(tmp_path / "run.yaml")})
    ray_pickle = pytest.importorskip("ray.cloudpickle")
    sent = ray_pickle.dumps(made._bound_deployment.func_or_class)
    assert KEY.encode() not in sent
    assert key_digest(KEY).encode() in sent
    assert KEY.encode() not in pickle.dumps(made._bound_deployment.init_args[0]._bound_deployment.init_args)


@pytest.mark.parametrize(
    ("host", "url"),
    [("::1", "http://[::1]:8000"), ("127.0.0.1", "http://127.0.0.1:8000"), ("localhost", "http://localhost:8000")],
)
def test_server_url_brackets_ipv6_hosts(host, url):
    assert app.server_url(config(host=host)) == url


@pytest.mark.parametrize(("proxies", "warned"), [(65, False), (0, False), (None, False), (60, True), (30, True)])
def test_warning_when_proxy_timeout_is_not_above_request_timeout(proxies, warned, monkeypatch, caplog, tmp_path):
    running = SimpleNamespace(http_config=SimpleNamespace(request_timeout_s=proxies))
    monkeypatch.setattr(app.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(app.ray, "cluster_resources", dict)
    monkeypatch.setattr(app.serve.context, "_get_global_client", lambda raise_if_no_controller_running: running)
    monkeypatch.setenv("PI_RAY_API_KEY", KEY)
    (tmp_path / "run.yaml").write_text(configuration.dump_config(config()))
    app.deploy({"run": str(tmp_path / "run.yaml")})
    assert ("http_options.request_timeout_s" in caplog.text) == warned


def test_usage_text_of_a_merged_server_names_the_merged_adapter(tmp_path):
    merged = RunConfig(name="t", store=str(tmp_path), serve=ServeConfig(merge="hot"))
    assert '"model": "hot"' in app.usage_text(merged)


def test_taken_port_raises_config_error_before_ray_starts():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"serve\.port"):
            app.run_server(config(port=taken.getsockname()[1]))


class Impatient(threading.Event):
    """An event that must have come before it is waited for."""

    def wait(self, timeout=None):
        assert self.is_set()
        return True


@pytest.mark.parametrize("joins", [True, False], ids=["in a cluster's Ray", "in a Ray of its own"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("before", [True, False], ids=["while it starts", "once it serves"])
def test_a_signal_stops_the_server_also_where_the_shell_has_it_ignored(joins, number, before, monkeypatch, capsys):
    """As a shell has SIGINT for what it starts in the background."""
    stopped, handlers = [], {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def run(*_, **__):
        if before:
            os.kill(os.getpid(), number)
            time.sleep(1)
            raise AssertionError("the signal was ignored")
        monkeypatch.setattr(app, "_metrics_text", lambda: os.kill(os.getpid(), number) or "")

    monkeypatch.setattr(app, "threading", SimpleNamespace(Event=Impatient))
    monkeypatch.setattr(app, "_check_port", lambda config: None)
    monkeypatch.setattr(app.session, "connect", lambda: None)
    monkeypatch.setattr(app, "_start_proxies", lambda config: None)
    monkeypatch.setattr(app, "build_application", lambda *_: None)
    monkeypatch.setattr(app.serve, "run", run)
    monkeypatch.setattr(app, "_shutdown", stopped.append)
    monkeypatch.setattr(app.ray, "is_initialized", lambda: joins)
    signal.signal(number, signal.SIG_IGN)
    try:
        app.run_server(config())
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)
    assert stopped == [not joins]
    assert ("shutting down" in capsys.readouterr().out) != before


def test_usage_text_names_the_key_variable_and_never_the_key(monkeypatch):
    assert "Authorization" not in app.usage_text(config())
    monkeypatch.setenv("PI_RAY_API_KEY", KEY)
    text = app.usage_text(config())
    assert "$PI_RAY_API_KEY" in text
    assert KEY not in text


def test_usage_text_shows_that_a_key_is_needed_where_keys_are_in_a_file():
    text = app.usage_text(config().replace(**{"serve.keys_file": "keys.yaml"}))
    assert 'Authorization: Bearer $PI_RAY_API_KEY' in text and 'os.environ["PI_RAY_API_KEY"]' in text
