"""loss.svg: a picture of what the training log holds."""

import json
import re
from xml.etree import ElementTree

import pytest

from pi_ray.errors import StorageError
from pi_ray.report import charts, loss_plot
from pi_ray.report.charts import COLOURS
from pi_ray.run.directory import RunDir
from pi_ray.schedule import Phase
from tests.unit.fake_run import config

SVG = "{http://www.w3.org/2000/svg}"
LEFT, TOP, WIDTH, HEIGHT = 64, 26, 876, 250  # pixels of the panel of losses


def updates(phases):
    return [
        {"step": 10 * p + i, "phase": p, "loss": 2.0 - 0.05 * (10 * p + i)} for p in range(phases) for i in range(10)
    ]


def drawn(tmp_path, log):
    """The picture of a log of a run of three phases."""
    run = RunDir(tmp_path)
    run.train_log.parent.mkdir(parents=True, exist_ok=True)
    run.train_log.write_text("".join(json.dumps(e) + "\n" for e in log) + '{"half')
    loss_plot.write_loss_plot(config(tmp_path))
    return ElementTree.parse(tmp_path / "loss.svg").getroot()


def points(picture, width):
    """The points of each curve of losses whose line is so wide."""
    lines = [e for e in picture.iter(f"{SVG}polyline") if e.get("stroke-width") == width]
    return [[tuple(map(float, p.split(","))) for p in e.get("points").split()] for e in lines]


def texts(picture):
    return [e.text for e in picture.iter(f"{SVG}text")]


def test_every_loss_each_phase_and_its_dev_loss_are_drawn(tmp_path):
    ends = [{"event": "phase_end", "phase": 1, "step": 19, "dev_loss": 1.0}]
    picture = drawn(tmp_path, [*updates(3), *ends, {"event": "best", "phase": 2, "step": 29, "dev_accuracy": 0.5}])
    assert picture.tag == f"{SVG}svg" and picture.get("viewBox") == f"0 0 {charts.WIDTH} 540"
    x = lambda step: LEFT + step / 29 * WIDTH  # noqa: E731
    y = lambda loss: TOP + HEIGHT - loss / 2 * HEIGHT  # noqa: E731
    raw, means = points(picture, "1"), points(picture, "2.2")
    assert [len(curve) for curve in raw] == [len(curve) for curve in means] == [10, 10, 10], "one curve a phase"
    for curve, phase in zip(raw, range(3), strict=True):
        wanted = [(x(u["step"]), y(u["loss"])) for u in updates(3) if u["phase"] == phase]
        assert [v for p in curve for v in p] == pytest.approx([v for p in wanted for v in p], abs=0.06)
    assert {e.get("stroke") for e in picture.iter(f"{SVG}polyline")} == {COLOURS["promptintern"]}
    bands = [e for e in picture.iter(f"{SVG}rect") if float(e.get("y")) == TOP]
    edges = [(float(e.get("x")), float(e.get("x")) + float(e.get("width"))) for e in bands]
    assert [v for e in edges for v in e] == pytest.approx([x(s) for s in (0, 9, 9, 19, 19, 29)], abs=0.11)
    assert [e.get("fill") for e in bands] == [charts.BANDS[0], charts.BANDS[1], charts.BANDS[0]]
    marks = [e.get("d") for e in picture.iter(f"{SVG}path") if e.get("stroke")]
    at = [tuple(map(float, re.match(r"M([\d.]+) ([\d.]+)", d).groups())) for d in marks]
    assert at == [pytest.approx((x(19), y(1.0) - 7), abs=0.06)], "the dev loss, at the end of its phase"
    assert "1.000" in texts(picture)
    names = [t for t in texts(picture) if t.startswith("phase ")]
    assert names == ["phase 0", "phase 1", "phase 2 (best on dev rows)"]


def test_the_picture_says_more_with_every_fact(tmp_path):
    end, best = {"event": "phase_end", "phase": 0, "step": 9, "dev_loss": 1.0}, {"event": "best", "phase": 1}
    made = [texts(drawn(tmp_path, [*updates(2), *facts])) for facts in ([], [end], [end, best])]
    assert [("1.000" in t, "dev loss, phase end" in t) for t in made] == [(False, False), (True, True), (True, True)]
    assert ["phase 1 (best on dev rows)" in t for t in made] == [False, False, True]


def test_it_is_drawn_after_each_phase_and_the_listener_hears_everything(tmp_path):
    run, heard = RunDir(tmp_path), []
    listen = loss_plot.draw_after_phases(config(tmp_path), heard.append)
    run.train_log.write_text("".join(json.dumps(e) + "\n" for e in updates(1)))
    for entry in updates(1):
        listen(entry)
    assert not (tmp_path / "loss.svg").exists()
    listen({"event": "phase_end", "phase": 0, "step": 9})
    assert (tmp_path / "loss.svg").exists() and len(heard) == 11


def test_without_updates_or_room_there_is_no_picture_and_no_error(tmp_path, monkeypatch):
    loss_plot.write_loss_plot(config(tmp_path))
    assert not (tmp_path / "loss.svg").exists()
    assert len(points(drawn(tmp_path / "run", updates(1)[:1]), "1")) == 1, "one update is enough"

    def full(path, content):
        raise StorageError("no room")

    monkeypatch.setattr(loss_plot, "write_atomic", full)
    (tmp_path / "run" / "loss.svg").unlink()
    loss_plot.write_loss_plot(config(tmp_path / "run"))
    assert not (tmp_path / "run" / "loss.svg").exists()


def test_the_reports_picture_marks_the_best_phase_too():
    spans = [
        charts.PhaseSpan(i, Phase(1 - i, 0, 1), 1 - i, 10 * i, 10 * i + 9, 1.0, best=i == 1) for i in range(2)
    ]
    picture = charts.training_chart(updates(2), [], spans)
    assert "phase 1 (best on dev rows)" in picture and "phase 0 (best" not in picture
