"""A run's life on a cluster, with the real command, scripts, Slurm and Prometheus: two tasks, two blows, one end."""

import json
import os
import re
import shutil

import pytest
from operations.account import RESOLUTION
from operations.demonstration import RUN, opened, play
from operations.retelling import picture, text
from slurm.cluster import missing_programs

from monitoring import dashboards

STEPS = 90
# So that every panel has something to show.
WORDS = ("batch_size=16", "engine.layer_norms=true", "probe.share=0.5", "probe.support=60", "probe.queries=20")
OF_OTHERS = {
    "Teacher's entropy": "DINO has one",
    "Loss by tap": "LocalMIM has taps",
    "Memory of the GPU": "no GPU here",
}
PANELS = [
    pytest.param(panel, id=f"{name}-{panel['title']}")
    for name, content in dashboards.texts().items()
    for panel in json.loads(content)["panels"]
    if panel["type"] != "row"
]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Where it takes place, or a skip; CI must have the programs."""
    missing = [*missing_programs(), *(["prometheus"] if shutil.which("prometheus") is None else [])]
    if missing:
        reason = f"not installed: {', '.join(missing)} (Debian packages munge slurmctld slurmd slurm-client prometheus)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with opened(tmp_path_factory.mktemp("cluster"), shutil.which("prometheus")) as it:
            yield it


@pytest.fixture(scope="module")
def account(stage):
    return play(stage, steps=STEPS, words=WORDS)


@pytest.fixture(scope="module")
def crashed(stage):
    """Whether a node could be lost: nodes of their own take namespaces."""
    return len(stage.cluster.nodes) > 1


def test_the_run_finishes_as_if_nothing_had_happened(account, stage, crashed):
    log = (stage.root / "train.log").read_text()
    assert (account.job["JobState"], account.job["Restarts"]) == ("COMPLETED", "2" if crashed else "1"), log
    run = stage.runs / RUN
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    assert steps == sorted(steps)
    assert not list((stage.runs / ".targets").iterdir())
    assert not os.listdir(stage.runs / ".lives")


def test_a_preempted_run_loses_no_step(account, stage):
    restart = account.restarts[0]
    assert restart.saved is not None
    assert restart.lost == 0
    assert "tasks ended with 75\n" in (stage.root / "train.log").read_text()


def test_a_lost_node_costs_what_followed_the_last_checkpoint(account, stage, crashed):
    if not crashed:
        pytest.skip("no namespaces, so one node")
    restart = account.restarts[1]
    assert restart.saved is None
    # One checkpoint may have been on its way.
    assert 0 <= restart.lost <= 2 * (STEPS // 15) + 1
    log = (stage.root / "train.log").read_text()
    assert re.search(r"process 1 \(pid \d+ on n2[^)]*\) ended without a word in \w+ after step \d+", log)
    begin, end = next((a.begin, a.end) for a in account.alerts if a.name == "TrainingRankDown of rank 1")
    resumed = next(e.time for e in account.events if e.text.startswith("resumed") and e.time > restart.blow.time)
    assert restart.blow.time < begin < end < resumed + 15


def test_prometheus_saw_all_lives(account, crashed):
    assert set(account.curves["restarts"].values()) == ({0, 1, 2} if crashed else {0, 1})
    assert max(account.curves["ranks that answer"].values()) == 2
    assert max(account.curves["step"].values()) >= STEPS - 5


def test_who_and_what_a_rank_is_is_known(account, stage):
    series = stage.server.history("coldpress_run_info", account.begin, account.events[-1].time, RESOLUTION)
    assert {s["metric"]["rank"] for s in series} == {"0", "1"}
    assert {s["metric"]["job_id"] for s in series} == {account.job["JobId"]}
    assert {s["metric"]["world_size"] for s in series} == {"2"}


@pytest.mark.parametrize("panel", PANELS)
def test_every_panel_shows_something_of_it(panel, account, stage):
    if panel["title"] in OF_OTHERS:
        pytest.skip(OF_OTHERS[panel["title"]])
    for target in panel["targets"]:
        expression = target["expr"].replace("$__rate_interval", "5s").replace("$run", RUN)
        assert "$" not in expression
        assert stage.server.history(expression, account.begin, account.events[-1].time, RESOLUTION), expression


def test_it_can_be_told(account, tmp_path):
    said = text(account)
    assert f"job {account.job['JobId']}: COMPLETED" in said
    assert "resumed at step" in said
    assert "because\n" in said
    picture(account, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
