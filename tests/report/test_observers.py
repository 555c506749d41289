"""The observer table comes from the ledger: nothing dropped, nothing promised that the ledger contradicts."""

import logging
from dataclasses import replace

import pytest

from tests.report.samples import HBT_FLOWS, HT_FLOWS, entries
from vflair_flower.errors import ConfigurationError
from vflair_flower.report import ControlTraffic, TrafficEntry, observer_table
from vflair_flower.report.observers import grave_rows, text_stayed, turn

HBT = {"partition": "HBT", "num_blocks": 6, "head_blocks": 1, "tail_blocks": 1, "tls": True}
HT = {**HBT, "partition": "HT", "tail_blocks": 0}
CONTROL = ControlTraffic(bytes=1000, messages=4)


def find(rows, observer, tensor):
    return [row for row in rows if row.observer == observer and row.tensor.startswith(tensor)]


def one(rows, observer, tensor):
    (row,) = find(rows, observer, tensor)
    return row


def entry(**changes):
    fields = {
        "party": "alpha", "peer": "model-party", "direction": "up", "operation": "forward", "tensor": "hidden",
        "dtype": "float32", "max_shape": (1, 2, 3), "messages": 1, "bytes": 24,
    }  # fmt: skip
    return TrafficEntry(**{**fields, **changes})


def test_hbt_says_what_the_model_party_can_do():
    rows = observer_table(entries(), **HBT)
    smashed = one(rows, "model party", "smashed data")
    assert smashed.tensor == "smashed data: hidden states at the cut, after block 0"
    assert "model inversion" in smashed.allows
    assert smashed.covered_by is None
    assert "the text of every row" in smashed.uncovered
    assert "infer labels" in one(rows, "model party", "returned gradient").allows
    assert "length" in one(rows, "model party", "attention mask").allows
    assert "membership" in one(rows, "data party", "the body's answers").allows
    assert {row.tensor for row in find(rows, "no one", "")} == {
        "text and its token numbers",
        "labels",
        "weights of the body, by anyone but the model party",
    }
    assert not [row for row in rows if row.tensor.startswith("undescribed")]


def test_ht_does_not_claim_that_labels_are_hidden():
    rows = observer_table(entries(HT_FLOWS), **HT)
    assert "answer to every row" in one(rows, "model party", "logits").allows
    assert "exactly" in one(rows, "model party", "returned gradient").allows
    assert not find(rows, "no one", "labels")
    assert text_stayed(rows)
    assert not [row for row in rows if row.tensor.startswith("undescribed")]


def test_ht_without_training_keeps_labels():
    rows = observer_table([entry(), entry(direction="down", tensor="logits")], **HT)
    assert find(rows, "no one", "labels")


def test_seen_is_the_sum_over_parties():
    rows = observer_table(entries(parties=("alpha", "beta")), **HBT)
    seen = one(rows, "model party", "smashed data").seen
    assert (seen.bytes, seen.messages) == (312_000_000, 3600)
    total = one(rows, "network", "").seen
    assert total.bytes == sum(flow[-1] for flow in HBT_FLOWS)
    assert total.messages == 3600 + 3600 + 480 + 480, "messages are counted by their headers"


def test_what_the_hub_passes_on_is_not_counted_twice():
    first = entries(parties=("alpha", "beta"))
    second = [turn(item) for item in first]
    once = observer_table(first, **HBT, body_host="node")
    twice = observer_table([*first, *second], **HBT, body_host="node")
    assert [row for row in twice if row.observer in ("model party", "data party")] == [
        row for row in once if row.observer in ("model party", "data party")
    ]
    assert one(twice, "hub operator", "").seen.bytes == 2 * one(once, "hub operator", "").seen.bytes


def test_what_only_the_second_leg_has_is_not_dropped():
    rows = observer_table([entry(party="model-party", peer="alpha", direction="down", tensor="odd")], **HBT)
    assert find(rows, "model party", "undescribed tensor")


def test_each_ledger_kind_has_its_row():
    ledger = entries()
    rows = observer_table(ledger, **HBT)
    for direction, observer in (("up", "model party"), ("down", "data party")):
        sent = sum(item.bytes for item in ledger if item.direction == direction)
        shown = sum(row.seen.bytes for row in find(rows, observer, "") if "computes itself" not in row.tensor)
        assert shown == sent


def test_the_strategy_is_hub_and_model_party_in_one():
    rows = observer_table(entries(), **HBT, adapters=("alpha",), control=CONTROL)
    hub = one(rows, "hub operator", "")
    assert "one process" in hub.tensor
    assert "trained head" in hub.allows
    assert "trained tail" in hub.allows


def test_a_body_at_a_node_still_passes_the_hub_in_the_clear():
    rows = observer_table(entries(), **HBT, body_host="lab", adapters=("alpha",), control=CONTROL)
    hub = one(rows, "hub operator", "")
    assert "'lab'" in hub.tensor
    assert "TLS ends at the hub" in hub.tensor
    assert hub in grave_rows(rows)
    assert "'lab'" in one(rows, "no one", "weights").covered_by


@pytest.mark.parametrize("parties", [("alpha",), ("alpha", "beta"), ("alpha", "beta", "gamma")])
def test_averaged_adapters_are_seen_by_the_others(parties):
    rows = observer_table(entries(parties=parties), **HBT, adapters=parties, control=CONTROL)
    server = one(rows, "aggregating server", "adapters")
    assert (server.seen.bytes, server.seen.messages) == (1000, 4)
    others = find(rows, "other data parties", "")
    assert bool(others) == (len(parties) > 1)
    assert any("subtract its own" in row.allows for row in others) == (len(parties) == 2)


def test_no_adapters_no_rows_for_them():
    rows = observer_table(entries(parties=("alpha", "beta")), **HBT)
    assert not [row for row in rows if row.tensor.startswith("adapters")]
    assert one(rows, "aggregating server", "row counts").seen is None


def test_tls_covers_the_outsider_and_no_one_else():
    rows = observer_table(entries(), **HBT)
    assert [row.observer for row in rows if row.covered_by and row.covered_by.startswith("TLS")] == ["network"]
    plain = one(observer_table(entries(), **{**HBT, "tls": False}), "network", "")
    assert plain.covered_by is None
    assert "in the clear" in plain.tensor
    assert plain in grave_rows([plain])
    alone = one(observer_table(entries(), **{**HBT, "tls": False}, loopback=True), "network", "")
    assert alone.seen.bytes == 0
    assert "use TLS" in alone.uncovered


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize(("operation", "tensor"), [("forward", "keys"), ("gossip", "hidden"), ("step", "secret")])
def test_an_undescribed_tensor_warns_and_is_not_dropped(direction, operation, tensor, caplog):
    odd = entry(direction=direction, operation=operation, tensor=tensor, bytes=77)
    with caplog.at_level(logging.WARNING):
        rows = observer_table([*entries(), odd], **HBT)
    row = one(rows, "model party" if direction == "up" else "data party", "undescribed tensor")
    assert tensor in row.tensor
    assert row.seen.bytes == 77
    assert row.covered_by is None
    assert row in grave_rows(rows)
    assert tensor in caplog.text


def test_logits_in_hbt_are_not_expected():
    rows = observer_table([entry(direction="down", tensor="logits")], **HBT)
    assert find(rows, "data party", "undescribed tensor")


def test_the_ledger_overrules_the_promise():
    rows = observer_table([entry(tensor="input_ids"), entry(tensor="labels")], **HBT)
    assert "read the text itself" in one(rows, "model party", "text").allows
    assert not text_stayed(rows)
    assert not find(rows, "no one", "labels")


def test_text_that_leaves_by_another_way_is_a_warning():
    rows = observer_table(entries(), **HBT, text_stays=False, labels_stay=False)
    assert not text_stayed(rows)
    assert {row.tensor.split(":")[0] for row in grave_rows(rows)} >= {"text", "labels"}


def test_a_defence_covers_its_tensor_and_claims_no_more():
    rows = observer_table(
        [
            replace(one, covers="dp:epsilon=8" if one.tensor == "hidden" and one.direction == "up" else "")
            for one in entries()
        ],
        **HBT,
        adapters=("alpha",),
        adapters_cover="dp-sgd:epsilon=3",
    )
    smashed = one(rows, "model party", "smashed data")
    assert smashed.covered_by == "dp:epsilon=8 (all messages)"
    assert "measure it" in smashed.uncovered
    assert one(rows, "data party", "the body's answers").covered_by is None
    assert one(rows, "model party", "returned gradient").covered_by is None
    assert one(rows, "aggregating server", "adapters").covered_by == "dp-sgd:epsilon=3"


@pytest.mark.parametrize("noise", [None, "dp-sgd:epsilon=3"])
def test_secure_aggregation_covers_single_adapters_and_not_their_sum(noise):
    rows = observer_table(
        entries(), **HBT, adapters=("alpha", "beta", "gamma"), adapters_cover=noise, adapters_summed=True
    )
    single, summed = find(rows, "aggregating server", "adapters")
    assert "before averaging" in single.tensor
    assert single.covered_by.startswith("secagg")
    assert (noise or "secagg") in single.covered_by
    assert "summed over a round's parties" in summed.tensor
    assert summed.covered_by == noise
    assert (summed in grave_rows(rows)) is (noise is None)
    assert one(rows, "other data parties", "adapters").covered_by == noise
    assert one(rows, "aggregating server", "row counts").covered_by is None


def test_messages_that_went_round_a_defence_are_counted():
    up = [one for one in entries() if one.tensor == "hidden" and one.direction == "up"]
    rows = observer_table([*entries(), *(replace(one, covers="dp", messages=1) for one in up)], **HBT)
    messages = sum(one.messages for one in up)
    covered_by = one(rows, "model party", "smashed data").covered_by
    assert covered_by == f"dp ({len(up)} of {messages + len(up)} messages)"


def test_entries_may_be_the_ledger_s_dicts():
    fields = dict(vars(entry()), max_shape=[1, 2, 3])
    assert observer_table([fields], **HBT) == observer_table([entry()], **HBT)
    with pytest.raises(ConfigurationError, match="bytes"):
        observer_table([{key: value for key, value in fields.items() if key != "bytes"}], **HBT)


@pytest.mark.parametrize(("head", "tail", "before", "after"), [(0, 0, "after the embedding", "before the task head")])
def test_names_without_blocks(head, tail, before, after):
    rows = observer_table(entries(), **{**HBT, "head_blocks": head, "tail_blocks": tail})
    assert one(rows, "model party", "smashed data").tensor.endswith(before)
    assert one(rows, "data party", "the body's answers").tensor.endswith(after)


def test_averaged_gradients_are_read_by_the_aggregating_server_not_by_a_model_party_elsewhere():
    flows = [
        TrafficEntry(
            party="a", peer="averager", direction=direction, operation="average", tensor="gradient", dtype="float32",
            max_shape=(10,), messages=1, bytes=40,
        )
        for direction in ("up", "down")
    ]  # fmt: skip
    rows = observer_table(
        flows, partition="HBT", num_blocks=6, head_blocks=1, tail_blocks=1, body_host="node", tls=True
    )
    told = {row.observer for row in rows if "trained parameters" in row.tensor}
    assert told == {"aggregating server"}
    assert not any(row.tensor.startswith("undescribed") for row in rows)
