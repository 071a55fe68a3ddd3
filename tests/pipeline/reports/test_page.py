"""The page itself: of runs in every state, with nothing from elsewhere, and as a browser shows it."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.cli import dispatch
from pipeline.compose import load, read_yaml
from pipeline.report import run

CHROMIUM = shutil.which("chromium")
EVIL = "<script>alert('&')</script>"
CONFIG = "run: a\nbatch_size: 10\nbudget:\n  value: 100\n  unit: cost\nmodel:\n  name: vit_tiny\n  image_size: 48\n"


def line(step: int, since: int = 0, **more: object) -> dict[str, object]:
    samples = 10 * (step - since)
    progress = step / 100
    whole = progress > 0.6
    return {
        "step": step,
        "steps_total": step - since,
        "samples_total": samples,
        "tokens_total": 20 * samples,
        "cost_total": 2.0 * samples,
        "uncompressed_cost_total": 4.0 * samples,
        "tuning_cost_total": 0.0,
        "step_seconds": 2.0,
        "samples_per_second": 5.0 - 2 * whole,
        "tokens_per_second": 50.0,
        "data_wait_ratio": 0.1,
        "budget_spent": 2.0 * 10 * step,
        "budget_total": 2000.0,
        "progress_ratio": progress,
        "patch_size_pixels": 8,
        "token_dropout_ratio": 0.0 if whole else 0.5,
        "query_tokens": 17 if whole else 9,
        "key_tokens": 17,
        "frozen_layers": step // 30,
        "learning_rate": 1e-3 * (1 - progress),
        "momentum_ratio": 0.99,
        "loss": 2 - progress,
        "grad_norm": 10 * math.exp(-step / 10),
        "weight_decay": 0.1,
        "skipped_steps_total": 0.0,
        "effective_rank": 3 + progress,
        "phase_forward_seconds_total": 1.2 * step,
        "time": 1e9 + 2 * step,
        **more,
    }


def make_run(runs: Path, name: str, rows: list[dict[str, object]], log: str = "", state: str = "finished") -> Path:
    directory = runs / name
    (directory / "eval").mkdir(parents=True)
    (directory / "config.yaml").write_text(CONFIG)
    (directory / "overrides.yaml").write_text('- "method=moco"\n')
    (directory / "environment.json").write_text(json.dumps({"choices": {"method": EVIL}, "packages": {"torch": "2"}}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "train.log").write_text(log)
    status = {"state": state, "step": 100, "time": time.time(), "reason": EVIL if state == "failed" else ""}
    (directory / "status.json").write_text(json.dumps(status))
    return directory


def course(knn: bool = True, lives: int = 1, **more: object) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for step in range(5, 105, 5):
        rows.append(line(step, 0 if lives == 1 or step <= 50 else 47, **more))
        if knn and step % 20 == 0:
            rows.append({"knn_top1_ratio": step / 200, "step": step, "time": 1e9 + 2 * step})
    return rows


LOG = (
    "2026-01-01 10:00:00,000 INFO 1 process(es) on cpu on node a\n2026-01-01 10:00:00,000 INFO starting at step 0\n"
    "2026-01-01 10:02:00,000 INFO [     50  50.0%] eta 0:01:30\n"
    f"2026-01-01 10:05:00,000 ERROR {EVIL}\n"
    "2026-01-01 10:06:00,000 INFO 1 process(es) on cpu on node a\n2026-01-01 10:06:00,000 INFO resumed at step 47\n"
    "2026-01-01 10:08:00,000 INFO finished at step 100\n"
)


class Page(HTMLParser):
    """What a page says and asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def written(runs: Path, name: str, *words: str) -> Page:
    run(load("report", [f"runs={runs}", f"run={name}", *words]))
    return Page((runs / name / "report.html").read_text())


def test_a_finished_run_of_two_lives(tmp_path: Path) -> None:
    directory = make_run(tmp_path, "first", course(lives=2), LOG)
    (directory / "eval" / "knn-x.json").write_text(
        json.dumps({"checkpoint": "step_1", "top1": {"10": 0.5, "linear": {"sgd": 0.75}}, "queries": {"samples": 2000}})
    )
    page = written(tmp_path, "first")
    # Nothing is loaded, nothing runs, nothing that a file said became a tag.
    assert set(page.links) <= {link for link in page.links if link.startswith("#")}
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert EVIL in page.text
    assert "default-src 'none'" in (directory / "report.html").read_text()
    for told in ("Learning", "What was saved", "Speed", "Schedules", "Norms and indicators", "Evaluations", "Lives"):
        assert told in page.words, told
    assert "2 lives: 3 steps" in page.text
    assert "linear sgd" in page.text
    assert "75.0 %" in page.text
    assert page.tags.count("svg") == page.tags.count("figure") > 12


def test_identifiers_on_a_page_are_its_own(tmp_path: Path) -> None:
    directory = make_run(tmp_path, "first", course())
    written(tmp_path, "first")
    text = (directory / "report.html").read_text()
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    assert used <= set(re.findall(r' id="([^"]+)"', text))
    # matplotlib names clips and markers by what they are; what it numbers would be on the page many times.
    assert not re.findall(r' id="[a-z]+_\d+"', text)


@pytest.mark.parametrize(
    ("rows", "log", "state", "told"),
    [
        ([], "", "failed", "has not reported yet"),
        (course()[:1], LOG[:120], "running", "No k-NN probe was run"),
        (course(knn=False), LOG, "finished", "No k-NN probe was run"),
        (course(loss=None), LOG, "failed", "20 of 20 reports have a loss that is no number"),
        (course(), LOG.replace("ERROR", "INFO"), "hung", "the log breaks off: killed, or its node was lost"),
        ([line(5), {"loss": 1.0, "step": 10, "time": 1.0}], "", "stopped", "train.log cannot be read"),
    ],
    ids=["nothing", "one-line", "no-knn", "nan", "killed", "poor"],
)
def test_runs_in_every_state_have_a_page(
    rows: list[dict[str, object]], log: str, state: str, told: str, tmp_path: Path
) -> None:
    directory = make_run(tmp_path, "first", rows, log, state)
    if not log:
        (directory / "train.log").unlink()
    assert told in written(tmp_path, "first").text


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "metrics.jsonl", "status.json", "eval/a.json"])
@pytest.mark.parametrize("content", [b"\xff\x00{", b"[1]", b""])
def test_damaged_files_leave_a_page(name: str, content: bytes, tmp_path: Path) -> None:
    directory = make_run(tmp_path, "first", [])
    (directory / name).write_bytes(content)
    assert "first" in written(tmp_path, "first").words


def test_runs_side_by_side_are_compared_at_one_accuracy(tmp_path: Path) -> None:
    make_run(tmp_path, "first", course())
    slow = [row | {"cost_total": 2 * float(str(row.get("cost_total", 0)))} for row in course()]
    make_run(tmp_path, "dense & slow $x$", slow)
    page = written(tmp_path, "first", "against=['dense & slow $x$']", f"output={tmp_path}/first/report.html")
    assert "first reached 50.0 %, the highest that all" in page.text
    assert "2.00 x" in page.text
    # In legends and tables, and no formula.
    assert page.text.count("dense & slow $x$") > 6


def test_pages_need_neither_torch_nor_a_writable_run(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "first", course())
    words = ["report", f"runs={tmp_path}/runs", "run=first", f"output={tmp_path}/new/page.html"]
    code = f"import sys; from pipeline.cli import dispatch; dispatch({words!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert (tmp_path / "new" / "page.html").exists()
    assert not (tmp_path / "runs" / "first" / "report.html").exists()


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "first", course())
    for words in (["run=none"], ["run=first", "against=[none]"], ["run=first", "against=[first]"], ["run=a/b"], []):
        assert dispatch(["report", f"runs={tmp_path}", *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 5


def test_yaml_that_is_none_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [1\nb: }")
    assert read_yaml(tmp_path / "a.yaml") == read_yaml(tmp_path / "none.yaml") == {}


needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="chromium is not installed: apt-get install chromium"
)


def shown(page: Path, width: int, at: Path) -> tuple[str, str]:
    """Return the document as the browser has it after a moment, and what it wrote to its console."""
    assert CHROMIUM is not None, "chromium is missing: .ci/run installs it"
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={at}", f"--window-size={width},2000"]
    words += ["--enable-logging=stderr", "--log-level=0", "--virtual-time-budget=1000", "--dump-dom", f"file://{page}"]
    done = subprocess.run([CHROMIUM, *words], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, "\n".join(text for text in done.stderr.splitlines() if "CONSOLE" in text)


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_whole(width: int, tmp_path: Path) -> None:
    make_run(tmp_path, "first", course(lives=2), LOG)
    make_run(tmp_path, "a-name-" + "that-goes-on" * 8, course())
    run(load("report", [f"runs={tmp_path}", "run=first", f"against=[a-name-{'that-goes-on' * 8}]"]))
    text = (tmp_path / "first" / "report.html").read_text()
    # The page itself may run nothing; a copy that may is asked for its measures, in a frame of the asked width:
    # windows of a browser cannot be as narrow as a phone.
    open_page = re.sub(r"<meta http-equiv=[^>]+>", "", text)
    frame = (
        f'<!doctype html><body style="margin:0"><iframe id="f" style="border:0;width:{width}px;height:900px" '
        'srcdoc="' + open_page.replace("&", "&amp;").replace('"', "&quot;") + '"></iframe><p id="said"></p><script>'
        'document.getElementById("f").onload = () => { const d = document.getElementById("f").contentDocument;'
        "const wide = [...d.querySelectorAll('svg')]"
        ".filter(s => s.getBoundingClientRect().right > d.body.clientWidth + 1);"
        "document.getElementById('said').textContent = JSON.stringify([d.documentElement.scrollWidth, "
        "d.documentElement.clientWidth, wide.length, d.querySelectorAll('svg').length]); };</script>"
    )
    (tmp_path / "frame.html").write_text(frame)
    dom, console = shown(tmp_path / "frame.html", max(width, 600), tmp_path / "profile")
    measured = re.search(r'<p id="said">(\[[\d,]+\])</p>', dom)
    assert measured, dom[-300:]
    needed, there, outside, pictures = json.loads(measured[1])
    assert there <= width
    assert needed <= there
    assert (outside, console) == (0, "")
    assert pictures > 12
    dom, console = shown(tmp_path / "first" / "report.html", max(width, 600), tmp_path / "profile")
    assert dom.count("<svg") == pictures
    assert console == ""
