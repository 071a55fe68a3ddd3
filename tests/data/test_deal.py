import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.deal import Deal, Part, read_part

COUNTS = st.integers(1, 40)


@given(parts=COUNTS, sizes=st.lists(st.integers(1, 9), max_size=60))
def test_every_shard_is_of_one_part_and_parts_are_equal(parts, sizes):
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    dealt = Deal(None, [(end - size, end) for size, end in zip(sizes, ends, strict=True)])
    all_parts = [Part(number, parts) for number in range(1, parts + 1)]
    owners = [[part for part in all_parts if part.has(shard)] for shard in range(len(sizes))]
    assert all(len(owner) == 1 for owner in owners)
    shares = [sum(part in owner for owner in owners) for part in all_parts]
    assert max(shares) - min(shares) <= 1
    assert sum(map(dealt.images, all_parts)) == sum(sizes) == dealt.images(Part())


@given(before=COUNTS, after=COUNTS, done=st.integers(0, 10))
def test_what_an_interrupted_job_of_other_parts_has_done_is_shared_by_all(before, after, done):
    # Each part of the first job has packed its first `done` shards: the front of the set, whatever the parts are.
    left = range(before * done, before * done + 200)
    shares = [sum(map(Part(number, after).has, left)) for number in range(1, after + 1)]
    assert max(shares) - min(shares) <= 1


@given(parts=COUNTS, number=COUNTS)
def test_a_part_is_read_as_it_is_written(parts, number):
    text = f"{number}/{parts}"
    if number <= parts:
        assert read_part(text) == Part(number, parts)
    else:
        with pytest.raises(ValueError, match=rf"^shard\.part: must be NUMBER/PARTS.*'{text}'"):
            read_part(text)


@pytest.mark.parametrize("text", ["0/4", "2", "2/", "/4", "-1/4", "2 of 4", "1/0", "2/4/8", "½"])
def test_other_words_are_no_part(text):
    with pytest.raises(ValueError, match=r"^shard\.part: must be NUMBER/PARTS, from 1/4 to 4/4"):
        read_part(text)


def test_a_task_of_slurm_knows_its_part_and_the_batch_shell_is_none(monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert read_part("") == Part()
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert read_part("") == Part()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert read_part("") == Part(4, 4)
    assert read_part("1/1") == Part()
