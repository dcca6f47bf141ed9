"""Fleets with a simulated clock: against times, commits and schedules that are computed by other means."""

import json
import sys
from itertools import product

import pytest

import fleet
import fleet_simulation
from fleet_simulation import (
    COMMIT_SECONDS,
    HOUR,
    LOOK_SECONDS,
    Limit,
    Region,
    SimulationArguments,
    fewest_seconds,
    shared_files,
    simulate,
)
from noprop_hf import NoPropConfig
from noprop_hf.planning import Sizes


ALONE = {"arrival_hours": 0, "failure_hours": 1e9, "fault_rate": 0}  # and no failures


def test_one_worker_takes_the_time_of_its_requests_and_blocks(monkeypatch, tmp_path):
    """A block takes 5.5 hours with ten checkpoints, so that its claim is renewed at the fourth and eighth."""
    trip, up, down = 0.2, 1e6, 1e7
    monkeypatch.setattr(fleet_simulation, "REGIONS", {"one": Region(1, 2, 0, trip, up, down)})
    args = SimulationArguments(num_blocks=3, steps=1000, save_steps=100, step_seconds=2 * 5.5 * 3.6, **ALONE)
    row = simulate(args, 1, 0)
    config = {"num_layers_per_block": 1, "num_attention_heads": 16, "intermediate_size": round(8 / 3 * 1024)}
    sizes = Sizes.of(NoPropConfig(vocab_size=50_257, hidden_size=1024, num_blocks=3, **config))
    small = [content for name, content in shared_files(tmp_path).items() if "safetensors" not in name]

    commits = 3 * (1 + 2 + 1)  # of a block: the claim, two renewals, the shard
    # The table: state of the repository; again with a probe to compare it and to check the token; the blocks.
    api = 1 + 2 + 1
    # Of a block: the choice; a claim and two renewals (state, kind of file); a shard (state, kind, address).
    api += 3 * (1 + 2 + 2 * 2 + 3)
    resolvers = 2 * (len(small) + 2) + 1  # hash and content of each file, the header of the table
    seconds = 3 * 5.5 * HOUR + (api + resolvers) * (trip + LOOK_SECONDS) + commits * (trip + COMMIT_SECONDS)
    seconds += 3 * (trip + sizes.block / up)  # to the storage
    received = sum(map(len, small)) + sizes.table + sizes.phase1 + 100_000
    seconds += received / down - trip / 2  # the last answer does not count
    assert row["hours"] == pytest.approx(seconds / HOUR, rel=1e-9)
    assert row["commits"] == commits and row["bytes_up"] == 3 * sizes.block and row["bytes_down"] == received
    for kind, number in {"api": api + commits, "resolvers": resolvers, "commits": commits}.items():
        assert row["requests_per_minute"][kind]["mean"] == pytest.approx(number / (seconds / 60))
    assert row["hours_best"] == pytest.approx(3 * 5.5) == row["hours_fluid"]
    assert row["steps_lost_share"] == 0 and not any(row["refused"].values())


def test_a_fleet_depends_on_its_seed_only_and_ends_with_all_blocks(monkeypatch, tmp_path):
    rows = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        path = tmp_path / f"{name}.json"
        command = ["fleet.py", "--simulate", "--small", "--seed", str(seed), "--results", str(path)]
        monkeypatch.setattr(sys, "argv", [*command, "--failure_hours", "1", "--steps", "2000"])
        fleet.main()
        (rows[name],) = json.loads(path.read_text())
    assert rows["one"] == rows["again"] != rows["other"]
    for row in (rows["one"], rows["other"]):
        assert row["published"] == row["states"][-1][1] == 6
        assert row["hours"] > row["hours_best"] > row["hours_fluid"]
        assert row["bytes_up"] >= 6 * row["block_bytes"] and row["steps_lost_share"] > 0


def test_idle_workers_repeat_slow_work():
    args = SimulationArguments(num_blocks=6, **ALONE)
    without, row = (simulate(args, 24, 0, back_up) for back_up in (False, True))
    assert row["published"] == without["published"] == 6
    assert row["hours_best"] == without["hours_best"] < row["hours"] < 0.8 * without["hours"]
    assert row["workers_that_trained"] == 24 and row["commits"] <= without["commits"]
    assert row["steps_lost_share"] > without["steps_lost_share"] == 0


@pytest.mark.parametrize("workers", [1, 12])
def test_no_hour_has_more_commits_than_the_hub_allows(workers):
    limits = {"commit_limit": 2, "num_blocks": 4, "steps": 100, "save_steps": 50}
    row = simulate(SimulationArguments(**limits, **ALONE), workers, 0)
    assert row["published"] == 4 and row["commits"] >= 8 and row["commits_per_hour"]["peak"] == 2
    assert row["refused"]["commits"] > 0 and row["hours"] > 3


def test_the_best_schedule_is_that_of_all_schedules():
    for seconds in ([3.0], [1.0, 2.5], [1.0, 1.1, 7.0], [2.0, 3.0, 3.0]):
        for blocks in (1, 3, 5):
            schedules = product(range(len(seconds)), repeat=blocks)
            best = min(max(s.count(w) * seconds[w] for w in range(len(seconds))) for s in schedules)
            assert fewest_seconds(seconds, blocks) == pytest.approx(best)


def test_a_limit_counts_by_window_and_key():
    limit = Limit(2, 300)
    for now in (0, 10):
        assert limit.wait("a", now) == 0
        limit.count("a", now)
    assert [limit.wait("a", now) for now in (20, 299, 300)] == [280, 1, 0] and limit.wait("b", 20) == 0
