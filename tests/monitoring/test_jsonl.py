import json

import pytest

from monitoring.jsonl import JsonlSink


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_objects_with_step_and_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resume_step=0)
    sink.write(1, {"loss": 0.5, "eta_seconds": float("nan")})
    [line] = read(path)  # before close: a killed process loses nothing
    sink.close()
    assert (line["step"], line["loss"], line["eta_seconds"]) == (1, 0.5, None)
    assert line["time"] > 1e9


def test_resume_drops_what_a_killed_life_left_ahead(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonlSink(path, resume_step=0)
    for step in (10, 20, 30):
        first.write(step, {"loss": step})
    first.close()
    path.write_text(path.read_text() + '{"loss": 4')  # torn

    second = JsonlSink(path, resume_step=20)
    second.write(30, {"loss": -1})
    second.close()

    assert [(line["step"], line["loss"]) for line in read(path)] == [(10, 10), (20, 20), (30, -1)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_failure_while_truncating_leaves_the_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resume_step=0)
    sink.write(10, {"loss": 1.0})
    sink.close()
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        JsonlSink(path, resume_step=0)
    assert path.read_bytes() == before


def test_names_outside_the_catalogue_are_refused(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl", resume_step=0)
    with pytest.raises(AssertionError, match="accuracy"):
        sink.write(1, {"accuracy": 1.0})
    sink.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_on_a_full_disk_lines_wait_and_one_sentence_says_so(tmp_path, monkeypatch, caplog):
    sink = JsonlSink(tmp_path / "metrics.jsonl", resume_step=0)
    real = sink._file

    class Full:
        name = real.name
        room = False

        def write(self, text):
            return real.write(text)

        def flush(self):
            if not self.room:
                raise OSError(28, "No space left on device")
            real.flush()

        def close(self):
            real.close()

    sink._file = Full()
    for step in (1, 2, 3):
        sink.write(step, {"loss": 0.5})
    assert caplog.text.count("No space left on device; its lines wait until there is room") == 1
    Full.room = True
    sink.write(4, {"loss": 0.5})
    sink.close()
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
