"""loss.png: a picture of what the training log holds."""

import io
import json

from PIL import Image

from pi_ray.report import charts, loss_plot
from pi_ray.report.charts import COLOURS
from pi_ray.run.directory import RunDir
from pi_ray.schedule import Phase


def updates(phases):
    return [{"step": 10 * p + i, "phase": p, "loss": 2.0 - 0.05 * (10 * p + i)} for p in range(phases) for i in range(10)]


def test_each_phase_and_its_dev_loss_are_drawn(tmp_path):
    run = RunDir(tmp_path)
    log = [*updates(3), {"event": "phase_end", "phase": 1, "step": 19, "dev_loss": 1.0}, {"event": "best", "phase": 2, "step": 29, "dev_accuracy": 0.5}]
    run.train_log.write_text("".join(json.dumps(e) + "\n" for e in log) + '{"half')
    assert loss_plot.write(run)
    image = Image.open(tmp_path / "loss.png").convert("RGB")
    assert image.size == (loss_plot.WIDTH, loss_plot.HEIGHT)
    line = tuple(int(COLOURS["promptintern"][i : i + 2], 16) for i in (1, 3, 5))
    near = lambda pixel: sum(abs(a - b) for a, b in zip(pixel, line, strict=True)) < 60  # noqa: E731
    columns = {x for x in range(image.width) for y in range(40, 370) if near(image.getpixel((x, y)))}
    assert min(columns) < 80 and max(columns) > image.width - 40, "the curve goes over the whole picture"


def test_the_picture_says_more_with_every_fact():
    plain, ended, best = (loss_plot.png(updates(2), ends, b) for ends, b in (([], None), ([{"step": 9, "dev_loss": 1.0}], None), ([{"step": 9, "dev_loss": 1.0}], 1)))
    assert len({plain, ended, best}) == 3 and all(Image.open(io.BytesIO(p)).format == "PNG" for p in (plain, ended, best))


def test_without_updates_or_room_there_is_no_picture_and_no_error(tmp_path):
    assert not loss_plot.write(RunDir(tmp_path))
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.train_log.write_text(json.dumps(updates(1)[0]) + "\n")
    assert loss_plot.write(run), "one update is enough"


def test_the_reports_picture_marks_the_best_phase_too():
    spans = [charts.Span(i, Phase(1 - i, 0, 1), 1 - i, 10 * i, 10 * i + 9, 1.0, best=i == 1) for i in range(2)]
    picture = charts.training(updates(2), [], spans)
    assert "phase 1 (best on dev rows)" in picture and "phase 0 (best" not in picture
