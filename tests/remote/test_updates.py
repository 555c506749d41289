"""Updates of a shared body against references in plain torch: joined batch, one after another, averaged copies."""

import io
import threading
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from vflair_flower.errors import PartyLostError
from vflair_flower.remote.updates import UPDATES, BodyMode, StepRequest, Update
from vflair_flower.settings import OptimizerSettings

ADAMW = OptimizerSettings(learning_rate=0.01, weight_decay=0.1, warmup_fraction=0.2)
SGD = OptimizerSettings(name="sgd", learning_rate=0.1)
TOTAL = 6
ROWS = {"p0": 2, "p1": 5, "p2": 1, "p3": 4}
PATIENCE_S = 20.0
FORWARD = threading.Lock()  # functional_call swaps the module's parameters; the segment's runner has a lock as well


def make_module(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def batch_of(party: str, step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * int(party[1:]) + step)
    rows = ROWS[party]
    inputs = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.randn(rows, 2, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return ((module(batch[0]) - batch[1]) ** 2).mean(-1).mean()


def gradients_of(
    module: nn.Module, parameters: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    with FORWARD:
        loss = loss_of(lambda x: torch.func.functional_call(module, dict(parameters), x), batch)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def take_step(update: Update, party: str, step: int, dtype: torch.dtype = torch.float64) -> None:
    update.before_forward(party)
    gradients = gradients_of(update.module, update.parameters_of(party), batch_of(party, step, dtype))
    update.add_gradients(party, gradients)
    update.step(party, StepRequest(rows=ROWS[party], step=step, total_steps=TOTAL))


def run_session(update: Update, parties: list[str], steps: range, dtype: torch.dtype = torch.float64) -> None:
    """All parties at once, each on a thread of its own."""
    update.begin(parties, PATIENCE_S)
    errors: list[BaseException] = []

    def act(party: str) -> None:
        try:
            for step in steps:
                take_step(update, party, step, dtype)
            update.leave(party, lost=False)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=act, args=(party,)) for party in reversed(parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not errors, errors
    update.end()


def reference_steps(module: nn.Module, optimizer: torch.optim.Optimizer, batches: list, rates: list[float]) -> None:
    for batch, rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss_of(module, batch).backward()
        optimizer.step()


def rates(settings: OptimizerSettings, steps: range) -> list[float]:
    return [settings.rate(step, TOTAL) for step in steps]


def assert_close(module: nn.Module, reference: nn.Module, tolerance: float = 1e-12) -> None:
    for (name, parameter), other in zip(module.named_parameters(), reference.parameters(), strict=True):
        assert (parameter - other).abs().max() <= tolerance, name


@pytest.mark.parametrize("settings", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_synchronous_is_training_on_the_joined_batch(settings: OptimizerSettings) -> None:
    """Float64, tolerance 1e-12: only the order of the sum over rows differs."""
    module, reference = make_module(), make_module()
    run_session(UPDATES[BodyMode.SYNCHRONOUS](module, settings), list(ROWS), range(TOTAL))
    joined = []
    for step in range(TOTAL):
        parts = [batch_of(party, step) for party in ROWS]
        joined.append((torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])))
    reference_steps(reference, settings.build(list(reference.parameters())), joined, rates(settings, range(TOTAL)))
    assert_close(module, reference)
    assert (module[0].weight - make_module()[0].weight).abs().max() > 1e-3


def test_synchronous_weighs_by_rows() -> None:
    """Negative control: an unweighted mean over parties is far from the joined batch."""
    module, reference = make_module(), make_module()
    run_session(UPDATES[BodyMode.SYNCHRONOUS](module, SGD), list(ROWS), range(1))
    grads = [gradients_of(reference, dict(reference.named_parameters()), batch_of(party, 0)) for party in ROWS]
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.sub_(SGD.rate(0, TOTAL) * sum(g[name] for g in grads) / len(grads))
    assert (module[0].weight - reference[0].weight).abs().max() > 1e-4


@pytest.mark.parametrize("mode", list(BodyMode))
def test_one_party_is_bit_equal_to_plain_training(mode: BodyMode) -> None:
    module, reference = make_module(torch.float32), make_module(torch.float32)
    run_session(UPDATES[mode](module, ADAMW), ["p1"], range(TOTAL), torch.float32)
    batches = [batch_of("p1", step, torch.float32) for step in range(TOTAL)]
    reference_steps(reference, ADAMW.build(list(reference.parameters())), batches, rates(ADAMW, range(TOTAL)))
    assert_close(module, reference, tolerance=0.0)


def test_sequential_is_training_on_one_batch_after_another() -> None:
    module, reference = make_module(), make_module()
    run_session(UPDATES[BodyMode.SEQUENTIAL](module, ADAMW), list(ROWS), range(3))
    order = [(party, step) for step in range(3) for party in sorted(ROWS)]
    batches = [batch_of(party, step) for party, step in order]
    steps = [ADAMW.rate(step, TOTAL) for _, step in order]
    reference_steps(reference, ADAMW.build(list(reference.parameters())), batches, steps)
    assert_close(module, reference, tolerance=0.0)


def replicated_by_hand(parties: list[str], rounds: int) -> nn.Module:
    merged = make_module()
    copies = {party: make_module() for party in parties}
    optimizers = {party: ADAMW.build(list(copies[party].parameters())) for party in parties}
    for number in range(rounds):
        steps = range(2 * number, 2 * number + 2)
        for party in parties:
            copies[party].load_state_dict(merged.state_dict())
            batches = [batch_of(party, step) for step in steps]
            reference_steps(copies[party], optimizers[party], batches, rates(ADAMW, steps))
        all_rows = sum(ROWS[party] for party in parties)
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                parameter.copy_(sum(copies[p].get_parameter(name) * (ROWS[p] / all_rows) for p in parties))
    return merged


def test_replicated_is_training_apart_and_averaging_by_rows() -> None:
    module = make_module()
    update = UPDATES[BodyMode.REPLICATED](module, ADAMW)
    for number in range(3):
        before = module[0].weight.detach().clone()
        run_session(update, list(ROWS), range(2 * number, 2 * number + 2))
        assert not torch.equal(module[0].weight, before)
    assert_close(module, replicated_by_hand(list(ROWS), 3))


def test_replicated_drops_the_copy_of_a_lost_party() -> None:
    module = make_module()
    update = UPDATES[BodyMode.REPLICATED](module, ADAMW)
    update.begin(["p0", "p1", "p2"], PATIENCE_S)
    for party in ("p0", "p1", "p2"):
        for step in range(2):
            take_step(update, party, step)
    update.leave("p1", lost=True)
    with pytest.raises(PartyLostError):
        take_step(update, "p1", 1)  # was under way when the party was lost; must not bring its copy back
    update.leave("p0", lost=False)
    update.leave("p2", lost=False)
    update.end()
    assert_close(module, replicated_by_hand(["p0", "p2"], 1))


@pytest.mark.parametrize("mode", list(BodyMode))
def test_all_lost_changes_nothing_at_the_end(mode: BodyMode) -> None:
    module = make_module()
    update = UPDATES[mode](module, ADAMW)
    update.begin(["p0", "p1"], PATIENCE_S)
    for party in ("p0", "p1"):
        update.add_gradients(party, gradients_of(module, dict(module.named_parameters()), batch_of(party, 0)))
        update.leave(party, lost=True)
    update.end()
    assert_close(module, make_module(), tolerance=0.0)
    assert update.gradient_bytes() == 0


def test_synchronous_goes_on_without_a_lost_party_and_without_its_gradient() -> None:
    module, reference = make_module(), make_module()
    update = UPDATES[BodyMode.SYNCHRONOUS](module, ADAMW)
    update.begin(["p0", "p1"], PATIENCE_S)
    update.add_gradients("p1", gradients_of(module, dict(module.named_parameters()), batch_of("p1", 0)))
    update.leave("p1", lost=True)
    take_step(update, "p0", 0)
    optimizer = ADAMW.build(list(reference.parameters()))
    reference_steps(reference, optimizer, [batch_of("p0", 0)], rates(ADAMW, range(1)))
    assert_close(module, reference, tolerance=0.0)


@pytest.mark.parametrize("mode", list(BodyMode))
def test_saved_and_loaded_training_goes_on_bit_identically(mode: BodyMode) -> None:
    parties = ["p0", "p1", "p2"]
    straight, first, resumed = make_module(), make_module(), make_module()
    whole = UPDATES[mode](straight, ADAMW)
    before = UPDATES[mode](first, ADAMW)
    run_session(whole, parties, range(2))
    run_session(before, parties, range(2))
    file = io.BytesIO()
    kept = before.state()
    torch.save({"update": kept, "module": first.state_dict()}, file)
    run_session(before, parties, range(2, 3))  # must not reach into what `state` returned
    again = io.BytesIO()
    torch.save({"update": kept, "module": {}}, again)
    file.seek(0)
    again.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["module"])
    after = UPDATES[mode](resumed, ADAMW)
    after.load_state(torch.load(again, weights_only=True)["update"])
    assert after.steps_taken == whole.steps_taken > 0
    run_session(whole, parties, range(2, 4))
    run_session(after, parties, range(2, 4))
    assert_close(resumed, straight, tolerance=0.0)
    fresh = UPDATES[mode](make_module(), ADAMW)  # negative control: without the optimiser's state it is another run
    fresh.module.load_state_dict(saved["module"])
    run_session(fresh, parties, range(2, 4))
    assert (fresh.module[0].weight - straight[0].weight).abs().max() > 1e-6


@pytest.mark.parametrize("mode", list(BodyMode))
def test_gradients_of_several_backward_passes_add_up(mode: BodyMode) -> None:
    module, reference = make_module(), make_module()
    update = UPDATES[mode](module, SGD)
    update.begin(["p0"], PATIENCE_S)
    for step in range(2):
        update.before_forward("p0")
        update.add_gradients("p0", gradients_of(module, update.parameters_of("p0"), batch_of("p0", step)))
    assert update.has_gradients("p0")
    update.step("p0", StepRequest(rows=4, step=0, total_steps=0))
    assert not update.has_gradients("p0")
    update.leave("p0", lost=False)
    update.end()
    optimizer = torch.optim.SGD(reference.parameters(), lr=SGD.learning_rate)
    for step in range(2):
        loss_of(reference, batch_of("p0", step)).backward()
    optimizer.step()
    assert_close(module, reference, tolerance=0.0)
