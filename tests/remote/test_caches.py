"""Caches at both ends of a cut: what a new token costs, who may reach what, and when a cache is gone."""

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Thread

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    TextIteratorStreamer,
    TextStreamer,
)

from tests.tiny import WORDS
from vflair_flower.errors import PartitionError, RemoteError, SessionError
from vflair_flower.partition import Mode, ModelSource, PartitionPlan, Segment, SplitCache, load_segment
from vflair_flower.remote import MODEL_PARTY, BodyMode, RemoteSegment, SegmentServer, agreement_for
from vflair_flower.remote.caches import PartyCaches
from vflair_flower.remote.protocol import FORWARD
from vflair_flower.session import Hub, HubSession, Link
from vflair_flower.settings import GenerationSettings, TaskKind, TaskSettings
from vflair_flower.spec import SplitSpec

BLOCKS, WIDTH, VOCABULARY, NEW = 4, 32, 64, 8
MAX_LENGTH = 48
TASK = TaskSettings(kind=TaskKind.CAUSAL_LM)
HEADER_BYTES = 448
"""More than the header of any call; each is padded to a multiple of 64 bytes."""

GREEDY = {"do_sample": False}
SAMPLING = {"do_sample": True, "top_k": 10}
BEAM = {"do_sample": False, "num_beams": 3}


@dataclass
class Room:
    """An open session with a body at the hub."""

    spec: SplitSpec
    server: SegmentServer
    session: HubSession
    source: ModelSource
    whole: PreTrainedModel
    models: dict[str, PreTrainedModel] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    remotes: dict[str, RemoteSegment] = field(default_factory=dict)

    def bytes(self, direction: str) -> dict[str, int]:
        """Bytes of forward calls by tensor."""
        entries = [e for e in self.session.ledger.entries() if (e.operation, e.direction) == (FORWARD, direction)]
        return {entry.tensor: entry.bytes for entry in entries}

    def messages(self, direction: str) -> dict[str, int]:
        entries = [e for e in self.session.ledger.entries() if (e.operation, e.direction) == (FORWARD, direction)]
        return {entry.tensor: entry.messages for entry in entries}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    sources = {}
    for name, family in (("llama", LlamaConfig), ("mistral", MistralConfig)):
        torch.manual_seed(5)
        config = family(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            eos_token_id=2,
            **({"sliding_window": 6} if name == "mistral" else {}),
        )
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        sources[name] = ModelSource(name=name, location=str(folder))
    return sources


@pytest.fixture
def open_room(checkpoints: dict[str, ModelSource]) -> Iterator[Callable[..., Room]]:
    with ExitStack() as stack:

        def make(*parties: str, **settings: object) -> Room:
            return stack.enter_context(_room(checkpoints, parties or ("a",), **settings))

        yield make


@contextmanager
def _room(
    checkpoints: dict[str, ModelSource],
    parties: tuple[str, ...],
    *,
    mode: Mode = Mode.HBT,
    wire_dtype: str = "float32",
    plane: str = "inproc",
    family: str = "llama",
    deadline_s: float = 20.0,
    max_caches: int = 4,
) -> Iterator[Room]:
    source = checkpoints[family]
    spec = SplitSpec(
        model=source.name,
        plan=PartitionPlan(mode=mode, head_blocks=1, tail_blocks=1 if mode is Mode.HBT else 0),
        task=TASK,
        tuning=None,
        generation=GenerationSettings(max_rows=12, max_length=MAX_LENGTH, max_caches=max_caches),
        wire_dtype=wire_dtype,
    )
    body = load_segment(source, spec.plan.model_party(BLOCKS), TASK)
    whole = load_segment(source, Segment.whole(BLOCKS), TASK).model.eval()
    server = SegmentServer(body, spec, body_mode=BodyMode.SYNCHRONOUS, deadline_s=deadline_s)
    agreement = agreement_for(spec, whole.config)
    with ExitStack() as stack:
        hub = stack.enter_context(Hub(bind="inproc" if plane == "inproc" else "127.0.0.1:0"))
        session = stack.enter_context(
            hub.open_session(
                parties,
                agreement,
                hosts={MODEL_PARTY: server},
                deadline_s=20,
                on_lost=lambda party, _reason: server.leave(party, lost=True),
            )
        )
        server.begin(parties, server_round=1, training=False)
        room = Room(spec, server, session, source, whole)
        for party in parties:
            own = load_segment(source, spec.plan.data_party(BLOCKS), TASK)
            link = hub.connect(session, party)
            stack.callback(link.close)
            remote = RemoteSegment(link, spec)
            own.channel.call = remote
            room.models[party], room.links[party], room.remotes[party] = own.model.eval(), link, remote
        yield room


def prompt(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows of the given lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids_BT = torch.randint(3, VOCABULARY, (len(lengths), longest), generator=generator)
    mask_BT = (torch.arange(longest)[None] >= longest - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids_BT.masked_fill(mask_BT == 0, 0), "attention_mask": mask_BT}


def write(model: PreTrainedModel, inputs: dict[str, Tensor], new: int = NEW, **settings: object) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return model.generate(**inputs, max_new_tokens=new, eos_token_id=None, pad_token_id=0, **settings)


# ---- what a new token costs ----


@pytest.mark.parametrize("plane", ["inproc", "grpc"])
@pytest.mark.parametrize(("wire_dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_a_new_token_costs_two_hidden_vectors_and_two_headers(
    open_room: Callable[..., Room], plane: str, wire_dtype: str, item: int
) -> None:
    room = open_room(plane=plane, wire_dtype=wire_dtype)
    inputs, rows = prompt(5, 5), 2
    first = write(room.models["a"], inputs, new=1)
    up, down = room.bytes("up"), room.bytes("down")
    assert set(up) == set(down) == {"hidden", "header"}
    assert up["hidden"] == down["hidden"] == rows * 5 * WIDTH * item
    whole = write(room.models["a"], inputs, new=1 + NEW)
    # The second text went through the prompt as well, then once per further token: the last is not read again.
    more_up, more_down = room.bytes("up"), room.bytes("down")
    assert more_up["hidden"] - 2 * up["hidden"] == NEW * rows * WIDTH * item
    assert more_down["hidden"] - 2 * down["hidden"] == NEW * rows * WIDTH * item
    assert set(more_up) == set(more_down) == {"hidden", "header"}
    for direction, bytes_of in (("up", more_up), ("down", more_down)):
        assert bytes_of["header"] <= HEADER_BYTES * room.messages(direction)["header"]
    assert torch.equal(whole[:, :6], first)
    if wire_dtype == "float32":
        assert torch.equal(whole, write(room.whole, inputs, new=1 + NEW))


def test_headers_do_not_grow_with_the_text(open_room: Callable[..., Room]) -> None:
    room = open_room()
    sizes = []
    inputs, cache = prompt(4), SplitCache(room.models["a"].config, (0, BLOCKS - 1))
    ids_BT = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(30):
            before = room.bytes("up").get("header", 0), room.bytes("down").get("header", 0)
            logits = room.models["a"](input_ids=ids_BT, past_key_values=cache, use_cache=True).logits
            ids_BT = logits[:, -1:].argmax(-1)
            sizes.append((room.bytes("up")["header"] - before[0], room.bytes("down")["header"] - before[1]))
    assert len(set(sizes[1:])) <= 2  # a number gets a digit more, and with it 64 bytes of padding
    assert max(map(sum, sizes)) <= 2 * HEADER_BYTES


def test_head_tail_sends_one_hidden_vector_and_gets_one_position_of_logits(open_room: Callable[..., Room]) -> None:
    room = open_room(mode=Mode.HT)
    inputs = prompt(5, 5, 5)
    assert torch.equal(write(room.models["a"], inputs), write(room.whole, inputs))
    assert room.bytes("up")["hidden"] == 3 * (5 + NEW - 1) * WIDTH * 4
    assert room.bytes("down")["logits"] == 3 * NEW * VOCABULARY * 4  # of the prompt too, the last position alone


def test_a_padded_prompt_sends_its_mask_once(open_room: Callable[..., Room]) -> None:
    room = open_room()
    inputs = prompt(3, 6, 4)
    assert torch.equal(write(room.models["a"], inputs), write(room.whole, inputs))
    assert room.messages("up")["attention_mask"] == 1
    assert room.bytes("up")["attention_mask"] == 3 * 6
    assert "position_ids" not in room.bytes("up")


def test_beams_send_row_numbers_after_the_first_choice_only(open_room: Callable[..., Room]) -> None:
    room = open_room()
    inputs, rows = prompt(3, 5), 2 * BEAM["num_beams"]
    assert torch.equal(write(room.models["a"], inputs, **BEAM), write(room.whole, inputs, **BEAM))
    assert room.messages("up")["hidden"] == NEW
    assert room.messages("up")["cache_rows"] == NEW - 1
    assert room.bytes("up")["cache_rows"] == (NEW - 1) * rows * 4


# ---- same tokens ----


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLING, BEAM], ids=["greedy", "sampling", "beam"])
def test_tokens_are_those_of_the_whole_model(
    open_room: Callable[..., Room], mode: Mode, family: str, settings: dict
) -> None:
    room = open_room(mode=mode, family=family)
    inputs = prompt(3, 7, 5)
    assert torch.equal(write(room.models["a"], inputs, **settings), write(room.whole, inputs, **settings))


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prompt_lookup_takes_tokens_back_at_both_parties(
    open_room: Callable[..., Room], mode: Mode, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = open_room(mode=mode, family=family)
    taken = _watch_crops(monkeypatch)
    ids_BT = prompt(4)["input_ids"].repeat(1, 3)
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    settings = {"prompt_lookup_num_tokens": 3, "new": 20}
    split = write(room.models["a"], inputs, **settings)
    assert any(taken), "nothing was taken back, so nothing is tested"
    assert torch.equal(split, write(room.whole, inputs, **settings))
    assert torch.equal(split, write(room.whole, inputs, new=20))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_an_assistant_drafts_and_the_split_model_decides(
    open_room: Callable[..., Room], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = open_room(family=family)
    assistant = load_segment(room.source, Segment.whole(BLOCKS), TASK).model.eval()
    with torch.no_grad():
        for parameter in assistant.parameters():  # a model that is often right, and sometimes not
            parameter.add_(torch.randn_like(parameter) * 0.01)
    taken = _watch_crops(monkeypatch)
    inputs = prompt(6)
    split = write(room.models["a"], inputs, new=16, assistant_model=assistant)
    assert any(taken)
    assert room.messages("up")["hidden"] < 16
    assert torch.equal(split, write(room.whole, inputs, new=16))


def _watch_crops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    taken: list[int] = []
    original = SplitCache.crop

    def crop(self: SplitCache, tokens_to_remove: int) -> None:
        taken.append(tokens_to_remove)
        original(self, tokens_to_remove)

    monkeypatch.setattr(SplitCache, "crop", crop)
    return taken


def test_a_cache_can_be_gone_on_from(open_room: Callable[..., Room]) -> None:
    """As a chat does: the second question is read alone, the first one and its answer are in the cache."""
    room = open_room()
    cache = SplitCache(room.models["a"].config, (0, BLOCKS - 1))
    first = write(room.models["a"], prompt(6), past_key_values=cache)
    second = torch.cat([first, prompt(3, seed=1)["input_ids"]], dim=1)
    inputs = {"input_ids": second, "attention_mask": torch.ones_like(second)}
    before = room.bytes("up")["hidden"]
    assert torch.equal(write(room.models["a"], inputs, past_key_values=cache), write(room.whole, inputs))
    assert room.bytes("up")["hidden"] - before == (4 + NEW - 1) * WIDTH * 4  # the last token of the answer, 3 new ones


def test_a_cache_that_was_reset_begins_anew(open_room: Callable[..., Room]) -> None:
    room = open_room()
    cache = SplitCache(room.models["a"].config, (0, BLOCKS - 1))
    for seed in (0, 1):
        inputs = prompt(6, seed=seed)
        assert torch.equal(write(room.models["a"], inputs, past_key_values=cache), write(room.whole, inputs))
        cache.reset()
    assert len(room.server._caches) == 1


@pytest.mark.parametrize("plane", ["inproc", "grpc"])
def test_two_parties_at_once_write_what_each_writes_alone(
    open_room: Callable[..., Room], at_once: Callable[..., list[object]], plane: str
) -> None:
    room = open_room("a", "b", plane=plane)
    jobs = {"a": (prompt(3, 6, seed=1), GREEDY), "b": (prompt(7, 2, 4, seed=2), BEAM)}
    alone = {party: write(room.whole, inputs, new=20, **settings) for party, (inputs, settings) in jobs.items()}
    order = _turns(room)
    works = [
        lambda party=party: [write(room.models[party], jobs[party][0], new=20, **jobs[party][1]) for _ in range(3)]
        for party in jobs
    ]
    for party, texts in zip(jobs, at_once(*works), strict=True):
        assert all(torch.equal(text, alone[party]) for text in texts)
    assert sum(one != other for one, other in itertools.pairwise(order)) > 10, "they took no turns"


def _turns(room: Room) -> list[str]:
    order: list[str] = []
    original = room.server._write

    def noted(request: object, hidden_BTD: Tensor) -> object:
        order.append(request.source)
        return original(request, hidden_BTD)

    room.server._write = noted
    return order


# ---- when a cache is gone ----


def test_gone_when_its_party_leaves_and_when_the_session_ends(open_room: Callable[..., Room]) -> None:
    room = open_room("a", "b", "c")
    caches = {p: SplitCache(m.config, (0, BLOCKS - 1)) for p, m in room.models.items()}
    for party, model in room.models.items():
        write(model, prompt(4), past_key_values=caches[party])
    assert len(room.server._caches) == 3
    assert room.server._caches.state_bytes() > 0
    room.remotes["a"].finish()
    assert {party for party, _ in room.server._caches._caches} == {"b", "c"}
    room.links["b"].abandon()
    _wait(lambda: len(room.server._caches) == 1)
    room.server.end()
    assert len(room.server._caches) == 0
    assert room.server._caches.state_bytes() == 0
    with pytest.raises(SessionError, match="has left this session"):
        write(room.models["c"], prompt(4))


def test_gone_after_the_deadline_though_nobody_calls(open_room: Callable[..., Room]) -> None:
    room = open_room(deadline_s=0.2)
    cache = SplitCache(room.models["a"].config, (0, BLOCKS - 1))
    text = write(room.models["a"], prompt(4), past_key_values=cache)
    _wait(lambda: len(room.server._caches) == 0)
    with pytest.raises(RemoteError, match=r"nobody used it for 0\.2 s.*Generate again from the start"):
        write(room.models["a"], {"input_ids": text, "attention_mask": torch.ones_like(text)}, past_key_values=cache)
    assert torch.equal(write(room.models["a"], prompt(4)), text)


def test_deadline_counts_from_the_last_use() -> None:
    now = [0.0]
    config = LlamaConfig(num_hidden_layers=2)
    caches = PartyCaches(config, (0, 1), GenerationSettings(), 10.0, clock=lambda: now[0])
    caches.get("a", 0, tokens=0)
    for now[0] in (9.0, 18.0):
        caches.get("a", 0, tokens=1)
    now[0] = 28.0
    with pytest.raises(SessionError, match="no cache 0 of 'a'"):
        caches.get("a", 0, tokens=1)
    assert len(caches) == 0
    caches.clear()


def test_gone_with_the_data_partys_own(open_room: Callable[..., Room]) -> None:
    room = open_room()
    for _ in range(3):
        write(room.models["a"], prompt(4))
        gc.collect()
        assert len(room.server._caches) == 1  # the last one's end is told by the next call


def test_the_oldest_goes_when_there_are_too_many(open_room: Callable[..., Room]) -> None:
    room = open_room(max_caches=2)
    model = room.models["a"]
    caches = [SplitCache(model.config, (0, BLOCKS - 1)) for _ in range(3)]
    texts = [write(model, prompt(4, seed=i), past_key_values=cache) for i, cache in enumerate(caches)]
    assert len(room.server._caches) == 2
    onwards = [{"input_ids": text, "attention_mask": torch.ones_like(text)} for text in texts]
    with pytest.raises(RemoteError, match=r"more than 2 were open \(max_caches\)"):
        write(model, onwards[0], past_key_values=caches[0])
    for i in (1, 2):
        assert torch.equal(write(model, onwards[i], past_key_values=caches[i]), write(room.whole, onwards[i]))


def test_a_failure_in_the_middle_drops_the_cache_and_says_so(
    open_room: Callable[..., Room], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = open_room()
    model, inputs = room.models["a"], prompt(4)
    cache = SplitCache(model.config, (0, BLOCKS - 1))
    calls, run = [], room.server._run

    def failing(*args: object, **kwargs: object) -> Tensor:
        calls.append(1)
        output = run(*args, **kwargs)  # its layers have grown
        if len(calls) == 4:
            raise MemoryError("no room")
        return output

    monkeypatch.setattr(room.server, "_run", failing)
    with pytest.raises(RemoteError, match="no room"):
        write(model, inputs, past_key_values=cache)
    assert len(room.server._caches) == 0
    with pytest.raises(SessionError, match=r"broke off.*Begin a new cache"):
        write(model, inputs, past_key_values=cache)
    assert torch.equal(write(model, inputs), write(room.whole, inputs))


def test_a_cache_of_another_session_is_refused(open_room: Callable[..., Room]) -> None:
    one, other = open_room(), open_room()
    cache = SplitCache(one.models["a"].config, (0, BLOCKS - 1))
    text = write(one.models["a"], prompt(4), past_key_values=cache)
    with pytest.raises(RemoteError, match="or it is of another session"):
        write(other.models["a"], {"input_ids": text, "attention_mask": torch.ones_like(text)}, past_key_values=cache)


def _wait(ready: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not ready():
        assert time.monotonic() < limit, "it never came"
        time.sleep(0.01)


# ---- peers that lie ----

LIES = {
    "rows out of range": ({"cache_rows": torch.tensor([0, 2], dtype=torch.int32)}, {}, r"rows 0\.\.2 were asked for"),
    "rows below zero": ({"cache_rows": torch.tensor([-1, 0], dtype=torch.int32)}, {}, r"rows -1\.\.0 were asked for"),
    "fewer rows": ({"hidden": torch.zeros(1, 1, WIDTH)}, {}, "1 rows came for a cache of 2"),
    "more rows": ({"hidden": torch.zeros(3, 1, WIDTH)}, {}, "3 rows came for a cache of 2"),
    "rows of another number": ({"cache_rows": torch.zeros(3, dtype=torch.int32)}, {}, "2 rows came for a cache of 3"),
    "too long": ({"hidden": torch.zeros(2, MAX_LENGTH, WIDTH)}, {}, "would reach 52 tokens, and 48 were agreed"),
    "too much taken back": ({}, {"taken_back": 5}, "5 tokens were to be taken back, and the cache holds 4"),
    "less than nothing taken back": ({}, {"taken_back": -1}, "-1 tokens were to be taken back"),
    "fewer tokens counted on": ({}, {"cached": 3}, "holds 4 tokens here and 3 at the data party"),
    "more tokens counted on": ({}, {"cached": 9}, "holds 4 tokens here and 9 at the data party"),
    "taken back and not counted": ({}, {"taken_back": 1}, "holds 3 tokens here and 4 at the data party"),
    "a cache that never was": ({}, {"cache": 10**9}, "no cache 1000000000 of 'a'"),
    "a mask of another shape": ({"attention_mask": torch.ones(2, 2, dtype=torch.uint8)}, {}, "one value per token"),
    "positions of another shape": ({"position_ids": torch.ones(1, 1, dtype=torch.int32)}, {}, "one value per token"),
    "no number": ({}, {"finished": "1,x"}, "invalid literal"),
}


@pytest.mark.parametrize(("tensors", "meta", "message"), LIES.values(), ids=LIES)
def test_a_lie_is_refused_and_costs_the_liars_cache_alone(
    open_room: Callable[..., Room], tensors: dict[str, Tensor], meta: dict, message: str
) -> None:
    room = open_room("a", "b")
    honest = SplitCache(room.models["b"].config, (0, BLOCKS - 1))
    text = write(room.models["b"], prompt(4), past_key_values=honest)

    def call(tensors: dict[str, Tensor], meta: dict) -> Tensor:
        return room.links["a"].call(MODEL_PARTY, FORWARD, tensors, meta).tensors["hidden"]

    hidden = torch.randn(2, 4, WIDTH)
    call({"hidden": hidden}, {"cache": 7, "cached": 0})
    with pytest.raises(RemoteError, match=message):
        call({"hidden": torch.zeros(2, 1, WIDTH), **tensors}, {"cache": 7, "cached": 4, **meta})
    onwards = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    assert torch.equal(write(room.models["b"], onwards, past_key_values=honest), write(room.whole, onwards))


def test_another_partys_number_reaches_nothing(open_room: Callable[..., Room]) -> None:
    room = open_room("a", "b")
    cache = SplitCache(room.models["b"].config, (0, BLOCKS - 1))
    text = write(room.models["b"], prompt(4), past_key_values=cache)
    meta = {"cache": cache.number, "cached": cache.tokens}
    with pytest.raises(RemoteError, match=f"no cache {cache.number} of 'a'"):
        room.links["a"].call(MODEL_PARTY, FORWARD, {"hidden": torch.zeros(1, 1, WIDTH)}, meta)
    meta = {"cache": 0, "cached": 0, "finished": str(cache.number)}
    room.links["a"].call(MODEL_PARTY, FORWARD, {"hidden": torch.zeros(1, 1, WIDTH)}, meta)
    onwards = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    assert torch.equal(write(room.models["b"], onwards, past_key_values=cache), write(room.whole, onwards))


# ---- what the data party may not do ----


def test_a_foreign_cache_is_refused(open_room: Callable[..., Room]) -> None:
    room = open_room()
    model = room.models["a"]
    with pytest.raises(PartitionError, match=r"the cache is a DynamicCache.*Leave it out"):
        write(model, prompt(4), past_key_values=DynamicCache(config=model.config))
    with pytest.raises(PartitionError, match="the cache is a DynamicCache"), torch.no_grad():
        model(**prompt(4), past_key_values=DynamicCache(config=model.config))


def test_a_static_cache_is_refused(open_room: Callable[..., Room]) -> None:
    with pytest.raises(PartitionError, match=r"cache_implementation is 'static'.*Leave it out"):
        write(open_room().models["a"], prompt(4), cache_implementation="static")


def test_a_cache_with_gradients_on_is_refused(open_room: Callable[..., Room]) -> None:
    room = open_room()
    with pytest.raises(PartitionError, match=r"under torch\.no_grad\(\), or pass use_cache=False"):
        room.models["a"](**prompt(4), use_cache=True)


def test_a_mask_that_changes_is_refused(open_room: Callable[..., Room]) -> None:
    room = open_room()
    model, inputs = room.models["a"], prompt(4, 4)
    cache = SplitCache(model.config, (0, BLOCKS - 1))
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
        mask_BT = torch.ones(2, 5, dtype=torch.int64)
        mask_BT[0, 0] = 0
        with pytest.raises(PartitionError, match=r"differs from the one that the cached tokens came with.*new cache"):
            model(input_ids=torch.ones(2, 1, dtype=torch.int64), attention_mask=mask_BT, past_key_values=cache)


@pytest.mark.parametrize("tokens", [1, -5])
def test_a_crop_that_cannot_be_is_refused(open_room: Callable[..., Room], tokens: int) -> None:
    room = open_room()
    cache = SplitCache(room.models["a"].config, (0, BLOCKS - 1))
    with torch.no_grad():
        room.models["a"](**prompt(4), past_key_values=cache, use_cache=True)
    with pytest.raises(PartitionError, match=f"crop was called with {tokens} on a cache of 4 tokens"):
        cache.crop(tokens)


# ---- streaming ----


def test_text_streams_token_by_token(open_room: Callable[..., Room], capsys: pytest.CaptureFixture[str]) -> None:
    room = open_room()
    tokenizer = _Words()
    text = write(room.models["a"], prompt(4), streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == tokenizer.decode(text[0, 4:]).split()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    thread = Thread(target=lambda: write(room.models["a"], prompt(4), streamer=streamer), daemon=True)
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join(20)
    assert len(pieces) > NEW // 2
    assert "".join(pieces).split() == tokenizer.decode(text[0, 4:]).split()


class _Words:
    """As much of a tokenizer as a streamer asks for."""

    def decode(self, ids: object, **_: object) -> str:
        return " ".join(WORDS[int(i) % len(WORDS)] for i in ids)


def test_settings_of_the_job_bound_what_is_written(open_room: Callable[..., Room]) -> None:
    room = open_room()
    with pytest.raises(RemoteError, match=f"{MAX_LENGTH} were agreed; ask for fewer new tokens, or raise max_length"):
        write(room.models["a"], prompt(4), new=MAX_LENGTH)
    write(room.models["a"], prompt(4), new=MAX_LENGTH - 3)  # the last one is written and not read
