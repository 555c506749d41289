"""What protects tokens on their way to experts: layers that stay at home, and calls of one size; with controls."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.attacks.test_experts import MATCHING, WRITE, Victim, accuracy, made_up_rows, tiny  # noqa: F401
from vflair_flower.attacks import find_attack, run_attack
from vflair_flower.attacks.experts.rehearsal import MoeRehearsal
from vflair_flower.attacks.experts.wire import WireView, wire_view
from vflair_flower.errors import DataError
from vflair_flower.remote.protocol import FORWARD
from vflair_flower.session import Sighting
from vflair_flower.tasks import encode_task


class TestLocalLayers:
    """Four layers with experts; with ``local_layers=1`` hosts see the two in the middle."""

    @pytest.fixture(scope="class")
    def open_training(self, tiny) -> MoeRehearsal:  # noqa: F811
        return tiny.rehearse(phase="training")

    @pytest.fixture(scope="class")
    def training(self, tiny) -> MoeRehearsal:  # noqa: F811
        return tiny.rehearse(phase="training", spec=tiny.spec(local_layers=1))

    def test_without_them_text_is_read_at_the_first_layer_and_labels_at_the_last(self, tiny, open_training):  # noqa: F811
        truth, knows, view = open_training.truth, tiny.knows(open_training), open_training.view()
        tokens = run_attack(find_attack(MATCHING), view.at(0), knows, settings={"exhaustive": True})
        assert accuracy(truth, view.at(0), tokens.guess) >= 0.97
        labels = run_attack(find_attack("label-readout-expert"), view.at(3), knows)
        assert accuracy(truth, view.at(3), labels.guess, truth.asked(view.at(3))) >= 0.97

    def test_nothing_of_them_crosses(self, training, open_training):
        def layers(rehearsal):
            calls = [one for one in rehearsal.sightings if one.operation == FORWARD and "layer" in one.meta]
            return {one.meta["layer"] for one in calls}

        assert layers(open_training) == {0, 1, 2, 3}
        assert layers(training) == {1, 2}
        assert training.view().layers == (1, 2)
        for layer in (0, 3):
            with pytest.raises(DataError, match="saw no token"):
                training.view().at(layer)

    def test_hosts_see_of_other_layers_what_they_saw_before(self, training, open_training):
        """Middle layers leak as they did: they are no defence of what is sent."""
        for layer in (1, 2):
            pairs = zip(training.view().at(layer).calls, open_training.view().at(layer).calls, strict=True)
            for found, before in pairs:
                assert torch.equal(found.tokens_UD, before.tokens_UD)
                assert torch.equal(found.grad_UD, before.grad_UD)


def equally_long(count: int, seed: int):
    return made_up_rows(count, seed=seed, least=9, most=9)


def sizes(sightings: tuple[Sighting, ...]) -> dict[tuple[str, str], list[tuple[str, int]]]:
    """Return what a watcher of the network has: each stream's frames, in their order, by size."""
    found = defaultdict(list)
    for one in sightings:
        if one.tensors:
            found[one.party, one.direction].append((one.operation, one.num_bytes))
    return found


class TestPadding:
    @pytest.fixture(scope="class")
    def alike(self, tiny) -> Victim:  # noqa: F811
        """Sixteen texts of nine words each, of which the first twelve are sent."""
        return Victim(tiny.source.location, equally_long(16, seed=1), tiny.auxiliary_rows)

    def seen(self, victim, alone) -> WireView:
        encoded = encode_task(WRITE.kind, victim.rows, victim.tokenizer, max_tokens=16)
        more = {"placement": alone.placement, "spec": alone.spec, "hidden": 64}
        return wire_view(alone.sightings, hosts=alone.others, candidates=encoded, **more)

    def identified(self, victim, padding, **experts) -> tuple[float, float]:
        """Return the share of texts that sizes give away, to who knows of the padding and to who does not."""
        alone = victim.rehearse(count=12, batch_rows=1, spec=victim.spec(padding=padding, **experts))
        values = []
        for view in (self.seen(victim, alone), self.unaware(self.seen(victim, alone))):
            found = run_attack(find_attack("size-time"), view, victim.knows(alone))
            pairs = zip(found.guess.ids, alone.truth.texts.ids, strict=False)
            values.append(sum(torch.equal(ids, true) for ids, true in pairs) / len(alone.truth.texts.ids))
        return values[0], values[1]

    def unaware(self, view: WireView) -> WireView:
        return replace(view, padding="none")

    def test_sizes_tell_texts_of_one_length_apart_until_calls_are_whole(self, alike):
        assert self.identified(alike, "none")[0] >= 0.9
        assert max(self.identified(alike, "whole")) <= 3 / 12  # of sixteen; chance is 1/16

    def test_lengths_stay_visible(self, tiny):  # noqa: F811
        aware, _ = self.identified(tiny, "whole")
        assert 2 / 16 < aware < 0.9  # six lengths over sixteen texts

    @pytest.mark.parametrize(
        ("phase", "combine"),
        [("inference", "owner"), ("training", "host"), ("training", "owner"), ("generation", "owner")],
    )
    def test_streams_of_two_texts_of_one_length_are_alike(self, tiny, phase, combine):  # noqa: F811
        def streams(padding: str) -> list[dict[tuple[str, str], list[tuple[str, int]]]]:
            spec = tiny.spec(padding=padding, combine=combine)
            found = []
            for seed in (1, 2):
                rows = equally_long(2, seed=seed)
                if phase == "generation":
                    rows = [type(row)(prompt=row.response, response="x", id=row.id) for row in rows]
                victim = Victim(tiny.source.location, rows, tiny.auxiliary_rows)
                rehearsal = victim.rehearse(count=2, phase=phase, batch_rows=2, spec=spec, new_tokens=3)
                found.append(sizes(rehearsal.sightings))
            return found

        one, other = streams("whole")
        assert one == other
        assert sum(map(len, one.values())) > 0
        one, other = streams("none")
        assert one != other

    def test_hosts_see_what_they_saw_without(self, tiny):  # noqa: F811
        """Filling protects from the network alone."""
        views = [
            tiny.rehearse(phase="training", spec=tiny.spec(padding=padding)).view() for padding in ("none", "whole")
        ]
        for found, before in zip(views[1].calls, views[0].calls, strict=True):
            for name in ("tokens_UD", "expert_R", "token_R", "weight_R", "grad_UD"):
                one, other = getattr(found, name), getattr(before, name)
                assert isinstance(one, Tensor)
                assert torch.equal(one, other), name
