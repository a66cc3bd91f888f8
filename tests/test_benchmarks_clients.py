"""Light clients take part in a run of a real server, and what they cost adds up."""

import argparse

import pytest

from benchmarks import clients
from msjax.split.traffic import run_traffic


@pytest.mark.slow
def test_light_clients_take_a_server_through_its_run():
    options = argparse.Namespace(requests=8, batch=2, seed=0)
    row = clients.measure(options, "whole", 2)
    spec = clients.case_of(options, 2).run.spec
    assert row["steps"] == 2 and spec.schedule.total_steps == 4
    assert row["cpu_seconds_per_client_step"] > 0 and row["seen"]["ended"]["seconds"] > row["seen"]["began"]["seconds"]
    # The server has received and sent all payloads, in messages that are a little longer.
    sent = run_traffic(spec, 1)
    payload = (sent.uplink_bytes + sent.downlink_bytes) / 4 / 2
    assert payload < row["message_bytes_per_client_step"] < 1.2 * payload + 5000
    assert "| whole, 2 |" in clients.table([row])
