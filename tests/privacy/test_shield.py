"""No call path sends what did not go through the party's defences."""

import pytest
import torch

from tests.privacy.house import defended
from tests.tiny import tiny_rows
from vflair_flower.errors import ConfigurationError, PolicyError, SessionError
from vflair_flower.partition import Mode, PartitionPlan
from vflair_flower.privacy import Defence, MayLeave, Needs, Place, Policy, defence
from vflair_flower.privacy.defence import _DEFENCES
from vflair_flower.remote.protocol import MODEL_PARTY
from vflair_flower.settings import TaskKind, TaskSettings

ROWS = tiny_rows(0)
WRITES = TaskSettings(kind=TaskKind.CAUSAL_LM)


@pytest.fixture
def marked():
    """A defence that leaves a mark in everything that it may touch."""

    @defence("marked", places=tuple(Place), paper="of these tests")
    class Marked(Defence):
        def __init__(self, scene, *, by=1000.0):
            super().__init__(scene)
            self.by = by
            self.weight = torch.nn.Parameter(torch.ones(()))
            self.counts = dict.fromkeys(("ids", "embedding", "smashed", "answer", "gradient", "labels"), 0)
            self.training_terms = 0

        def ids(self, ids_BT, moment):
            self.counts["ids"] += 1
            return torch.where(moment.mask_BT.bool(), 5, ids_BT)

        def embedding(self, embeds_BTD, moment):
            self.counts["embedding"] += 1
            return embeds_BTD

        def smashed(self, hidden_BTD, moment):
            self.counts["smashed"] += 1
            return hidden_BTD * self.weight + self.by

        def answer(self, answer, moment):
            self.counts["answer"] += 1
            return answer

        def gradient(self, gradient, moment):
            self.counts["gradient"] += 1
            return gradient + self.by

        def labels(self, labels, ids_BT, mask_BT):
            self.counts["labels"] += 1
            return labels

        def penalty(self):
            return self.weight * 100.0

    yield Marked
    del _DEFENCES.by_name["marked"]


@pytest.mark.parametrize("mode", [Mode.HBT, Mode.HT])
def test_training_and_evaluation_send_nothing_that_went_round_a_defence(bert, marked, mode):
    plan = PartitionPlan(mode=mode, head_blocks=1, tail_blocks=1 if mode is Mode.HBT else 0)
    with defended(bert, "marked", plan=plan) as party:
        batch = party.batch(ROWS)
        loss = party.model(**batch.inputs).loss
        loss.backward()
        with torch.no_grad():
            party.model(**batch.inputs)
        (own,) = party.shield
        assert own.counts == {"ids": 2, "embedding": 2, "smashed": 2, "answer": 2, "gradient": 1, "labels": 1}
        assert loss > 100
        assert own.weight.grad is not None
        assert own.weight.grad != 0
        assert len(party.values("hidden")) == 2
        assert all(bool((hidden > 500).all()) for hidden in party.values("hidden"))
        assert bool((party.values("grad")[0] > 500).all())
        covers = {entry.tensor: entry.covers for entry in party.link.ledger.entries() if entry.direction == "up"}
        assert covers["hidden"] == covers["grad"] == "marked"
        assert covers["attention_mask"] == ""


def test_every_step_of_writing_goes_through_the_defences(llama, marked):
    with defended(llama, "marked", task=WRITES, training=False) as party:
        ids_BT = torch.tensor([[2, 6, 7, 8], [0, 2, 9, 10]])
        mask_BT = (ids_BT != 0).long()
        for use_cache in (True, False):
            party.seen.clear()
            party.model.generate(
                input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=5, min_new_tokens=5, do_sample=False,
                use_cache=use_cache, pad_token_id=0,
            )  # fmt: skip
            sent = party.values("hidden")
            assert len(sent) == 5
            assert [tensor.shape[1] for tensor in sent] == ([4, 1, 1, 1, 1] if use_cache else [4, 5, 6, 7, 8])
            assert all(bool((hidden > 500).all()) for hidden in sent)
        (own,) = party.shield
        assert own.counts["ids"] == own.counts["smashed"] == own.counts["answer"] == 10


def test_a_call_of_ones_own_is_refused_and_nothing_is_sent(bert):
    with defended(bert, "quantize:bits=4") as party:
        hidden_BTD = party.head(*(party.batch(ROWS).inputs[name] for name in ("input_ids", "attention_mask")))
        mask_BT = torch.ones(hidden_BTD.shape[:2], dtype=torch.uint8)
        for tensor in (
            hidden_BTD,
            party.shield.smashed(hidden_BTD, party.remote._moment(hidden_BTD, None, None, "only")),
        ):
            with pytest.raises(PolicyError, match=r"'hidden'.*quantize:bits=4"):
                party.link.call(
                    MODEL_PARTY, "forward", {"hidden": tensor, "attention_mask": mask_BT}, {"call": 9, "keep": False}
                )
        marked = party.remote._sent("hidden", hidden_BTD)
        marked += 1.0  # changed after it was covered
        with pytest.raises(PolicyError, match="'hidden'"):
            party.link.call(
                MODEL_PARTY, "forward", {"hidden": marked, "attention_mask": mask_BT}, {"call": 9, "keep": False}
            )
        with pytest.raises(PolicyError, match="'grad'"):
            party.link.call(MODEL_PARTY, "backward", {"grad": hidden_BTD}, {"call": 9, "wants_grad": True})
        assert party.sent == []
        assert party.link.ledger.total("up") == 0


def test_embeddings_in_place_of_tokens_are_refused_where_tokens_are_defended(bert, marked):
    with defended(bert, "marked") as party:
        batch = party.batch(ROWS)
        embeds_BTD = party.model.get_input_embeddings()(batch.inputs["input_ids"]).detach()
        party.seen.clear()
        rest = {name: value for name, value in batch.inputs.items() if name != "input_ids"}
        with pytest.raises(SessionError, match="input_ids"):
            party.model(inputs_embeds=embeds_BTD, **rest)
        assert party.sent == []


def test_a_model_trained_without_labels_is_refused_where_labels_are_defended(bert, marked):
    with defended(bert, "marked") as party:
        batch = party.batch(ROWS)
        rest = {name: value for name, value in batch.inputs.items() if name != "labels"}
        with pytest.raises(SessionError, match="labels"):
            party.model(**rest)


def test_defences_that_were_not_prepared_send_nothing(bert):
    @defence("pupil", places=(Place.SMASHED,), paper="of these tests", needs=Needs.OWN_TEXTS)
    class Pupil(Defence):
        def prepare(self, preparation):
            assert preparation.encoded
            super().prepare(preparation)

    try:
        with defended(bert, "pupil") as party:
            with pytest.raises(SessionError, match="prepare_defences"):
                party.model(**party.batch(ROWS).inputs)
            assert party.sent == []
            party.prepare(ROWS)
            party.model(**party.batch(ROWS).inputs)
            state = party.shield.state_dict()
        with defended(bert, "pupil") as party:
            party.shield.load_state_dict(state)
            party.model(**party.batch(ROWS).inputs)
    finally:
        del _DEFENCES.by_name["pupil"]


def test_a_policy_keeps_what_it_does_not_name_or_what_is_not_covered(bert):
    masks = MayLeave(tensor=("attention_mask", "position_ids"))
    covered = MayLeave(tensor=("hidden", "grad"), to=MODEL_PARTY, precision="bfloat16", covered_by=("quantize",))

    def run(policy, defences="quantize", wire="bfloat16"):
        def change(spec):
            return spec.from_json(spec.to_json().replace('"wire_dtype":"float32"', f'"wire_dtype":"{wire}"'))

        with defended(bert, defences, policy=Policy(policy), change=change) as party:
            try:
                party.model(**party.batch(ROWS).inputs).loss.backward()
            finally:
                assert bool(party.values("hidden")) is (len(policy) == 2 and defences != "" and wire != "float32")

    run([masks, covered])
    with pytest.raises(PolicyError, match="no entry speaks of it"):
        run([masks])
    with pytest.raises(PolicyError, match="not covered by quantize"):
        run([masks, covered], defences="")
    with pytest.raises(PolicyError, match="at most bfloat16"):
        run([masks, covered], wire="float32")


def test_policy_files(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text('[[may_leave]]\ntensor = "hidden"\ncovered_by = ["dp:epsilon=8"]\n')
    policy = Policy.read(path)
    assert policy.rules[0].missing(torch.float32, ("dp:epsilon=8",)) == ""
    assert "dp:epsilon=8" in policy.rules[0].missing(torch.float32, ("dp:epsilon=80",))
    policy.check_names(["hidden"])
    for text, said in (
        ("", "no entry"),
        ("x = 1", "'x'"),
        ('[[may_leave]]\ntensor = "hidden"\nprecision = "float8"', "float8"),
        ('[[may_leave]]\ntensors = "hidden"', "tensor"),
        ("[[may_leave", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=said):
            Policy.read(path)
    with pytest.raises(ConfigurationError, match="hiden"):
        Policy([MayLeave(tensor="hiden")], name="it").check_names(["hidden"])


@pytest.mark.parametrize(
    ("text", "said"),
    [("nonsense", "known are"), ("quantize:bits=many", "bits"), ("quantize quantize:bits=2", "twice")],
)
def test_bad_names_of_defences_are_refused_before_work_starts(text, said):
    from vflair_flower.spec import SplitSpec

    with pytest.raises(ConfigurationError, match=said):
        SplitSpec(task=WRITES, defences=text)


def test_without_defences_nothing_changes(bert):
    with defended(bert) as party, defended(bert, "quantize:bits=16,rounding=nearest") as other:
        batch = party.batch(ROWS)
        torch.testing.assert_close(
            party.model(**batch.inputs).logits, other.model(**batch.inputs).logits, atol=1e-3, rtol=0
        )
        assert not torch.equal(party.values("hidden")[0], other.values("hidden")[0])
