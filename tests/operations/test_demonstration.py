"""A run's life on a cluster, with the real command, scripts, Slurm and Prometheus: two tasks, two blows, one end."""

import json
import os
import re
import shutil

import pytest
from operations.account import RESOLUTION
from operations.demonstration import RUN, TASK, opened, play, train
from operations.retelling import picture, text
from slurm.cluster import missing_programs

from monitoring import dashboards
from monitoring.node_panels import GPUS, QUEUE

STEPS = 90
# So that every panel has something to show.
WORDS = ("batch_size=16", "engine.layer_norms=true", "probe.share=0.2", "probe.support=60", "probe.queries=20")
WORDS += ("monitor.peak_teraflops=0.1",)
# Of DINO, of LocalMIM, of a GPU, of exporters.
OF_OTHERS = {"Teacher's entropy", "Loss by tap", "Memory of the GPU"}
OF_OTHERS |= {panel.title for row in (GPUS, QUEUE) for panel in row.panels}
PANELS = [
    panel
    for content in dashboards.texts().values()
    for panel in json.loads(content)["panels"]
    if panel["type"] != "row"
]


@pytest.fixture
def stage(tmp_path):
    """Where it takes place, or a skip; CI must have the programs."""
    missing = [*missing_programs(), *(["prometheus"] if shutil.which("prometheus") is None else [])]
    if missing:
        reason = f"not installed: {', '.join(missing)} (Debian packages munge slurmctld slurmd slurm-client prometheus)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with opened(tmp_path, shutil.which("prometheus")) as it:
            yield it


# One test: whatever runs tests side by side plays it once.
def test_a_life_on_a_cluster(stage, subtests):
    account = play(stage, steps=STEPS, words=WORDS)
    for check in CHECKS:
        with subtests.test(check.__name__):
            check(account, stage)


def the_run_finishes_as_if_nothing_had_happened(account, stage):
    log = (stage.root / "train.log").read_text()
    assert (account.job["JobState"], account.job["Restarts"]) == ("COMPLETED", "2" if crashed(stage) else "1"), log
    run = stage.runs / RUN
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    assert steps == sorted(steps)
    assert not list((stage.runs / ".targets").iterdir())
    assert not os.listdir(stage.runs / ".lives")


def a_preempted_run_loses_no_step(account, stage):
    restart = account.restarts[0]
    assert restart.saved is not None
    assert restart.lost == 0
    assert "tasks ended with 75\n" in (stage.root / "train.log").read_text()


def a_lost_node_costs_what_followed_the_last_checkpoint(account, stage):
    if not crashed(stage):
        return
    restart = account.restarts[1]
    assert restart.saved is None
    # One checkpoint may have been on its way.
    assert 0 <= restart.lost <= 2 * (STEPS // 15) + 1
    log = (stage.root / "train.log").read_text()
    assert re.search(r"process 1 \(pid \d+ on n2[^)]*\) ended without a word in \w+ after step \d+", log)
    begin, end = next((a.begin, a.end) for a in account.alerts if a.name == "TrainingRankDown of rank 1")
    resumed = next(e.time for e in account.events if e.text.startswith("resumed") and e.time > restart.blow.time)
    assert restart.blow.time < begin < end < resumed + 15


def prometheus_saw_all_lives(account, stage):
    assert set(account.curves["restarts"].values()) == ({0, 1, 2} if crashed(stage) else {0, 1})
    assert max(account.curves["ranks that answer"].values()) == 2
    assert max(account.curves["step"].values()) >= STEPS - 5


def who_and_what_a_rank_is_is_known(account, stage):
    series = stage.server.history("coldpress_run_info", account.begin, account.events[-1].time, RESOLUTION)
    assert {s["metric"]["rank"] for s in series} == {"0", "1"}
    assert {s["metric"]["job_id"] for s in series} == {account.job["JobId"]}
    assert {s["metric"]["world_size"] for s in series} == {"2"}


def every_panel_shows_something_of_it(account, stage):
    empty = [
        f"{panel['title']}: {target['expr']}"
        for panel in PANELS
        for target in panel["targets"]
        if panel["title"] not in OF_OTHERS and not shown(target["expr"], account, stage)
    ]
    assert not empty


def shown(query, account, stage):
    expression = query.replace("$__rate_interval", "5s").replace("$run", RUN)
    assert "$" not in expression
    return stage.server.history(expression, account.begin, account.events[-1].time, RESOLUTION)


def a_job_that_follows_evaluates_what_there_is_and_ends_with_the_run(account, stage):
    job = stage.submit("evaluate.sbatch", f"run={RUN}", f"runs={stage.runs}", "k=[5]", "follow=true", options=TASK)
    ended = stage.cluster.wait(job, timeout=120)
    said = (stage.root / "evaluate.log").read_text()
    assert ended["JobState"] == "COMPLETED", said
    assert "the run has finished" in said
    evaluated = {path.stem.removeprefix("knn-") for path in (stage.runs / RUN / "eval").iterdir()}
    assert evaluated == {path.name for path in (stage.runs / RUN / "checkpoints").glob("step_*")}


def a_budget_that_is_spent_ends_the_next_job_at_once(account, stage):
    before = (stage.runs / RUN / "metrics.jsonl").read_text()
    job = train(stage, STEPS, WORDS)
    ended = stage.cluster.wait(job, timeout=120)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), (stage.root / "train.log").read_text()
    assert (stage.runs / RUN / "metrics.jsonl").read_text() == before


def it_can_be_told(account, stage):
    said = text(account)
    assert f"job {account.job['JobId']}: COMPLETED" in said
    assert "resumed at step" in said
    assert "because\n" in said
    picture(account, stage.root / "a.png")
    assert (stage.root / "a.png").stat().st_size > 10_000


CHECKS = (
    the_run_finishes_as_if_nothing_had_happened,
    a_preempted_run_loses_no_step,
    a_lost_node_costs_what_followed_the_last_checkpoint,
    prometheus_saw_all_lives,
    who_and_what_a_rank_is_is_known,
    every_panel_shows_something_of_it,
    it_can_be_told,
    a_job_that_follows_evaluates_what_there_is_and_ends_with_the_run,
    a_budget_that_is_spent_ends_the_next_job_at_once,
)


def crashed(stage):
    """Return whether a node could be lost: nodes of their own take namespaces."""
    return len(stage.cluster.nodes) > 1
