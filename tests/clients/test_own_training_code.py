"""A team's own training code in a session: its own loop, and Hugging Face's Trainer."""

import pytest
import torch
from flwr.clientapp import ClientApp
from peft import PeftModel
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from simulations.local_grid import LocalGrid
from tests.jobs import fedavg, job_spec, state_of
from tests.tiny import tiny_rows
from vflair_flower.clients import DataParty, split_session
from vflair_flower.errors import SessionClosedError, SessionError
from vflair_flower.partition import Segment, load_segment, load_tokenizer, make_trainable, resolve_model, trained_state
from vflair_flower.settings import LoraSettings, OptimizerSettings, TrainingSettings
from vflair_flower.strategies import HubSettings, SplitLearning
from vflair_flower.tasks import collate, encode

RATE = 5e-3


class Encoded(Dataset):
    def __init__(self, tokenizer):
        batch = collate(encode(tiny_rows(0).train, tokenizer, max_tokens=16), pad_token_id=0)
        self.items = [
            {"input_ids": i, "attention_mask": m, "labels": y}
            for i, m, y in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True)
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.fixture
def spec(tiny_bert):
    return job_spec(
        tiny_bert,
        tuning=LoraSettings(rank=4),
        optimizer=OptimizerSettings(learning_rate=RATE, schedule="constant"),
        training=TrainingSettings(rounds=1, batch_size=4, max_tokens=16),
    )


def run(spec, train, tmp_path, **settings):
    app = ClientApp()
    party = DataParty(lambda _context: tiny_rows(0), state_dir=tmp_path)
    party.register(app, train=False)
    app.train()(train)
    strategy = SplitLearning(spec=spec, aggregator=fedavg(), hub=HubSettings(bind="inproc"), **settings)
    with strategy:
        strategy.start(LocalGrid(app, [{"party": "acme"}]))
    return strategy


def whole(spec):
    source = resolve_model(spec.model)
    segment = Segment(blocks=(0, 1, 2, 3), num_blocks=4, embedding=True, task_head=True)
    model = make_trainable(load_segment(source, segment, spec.task), spec.tuning, spec.task, seed=0)
    return model.train(), Encoded(load_tokenizer(source))


def assert_equal(strategy, model):
    split, expected = state_of(strategy), trained_state(model)
    assert split.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(expected[name], split[name])] == []


def loop(model, data, optimizer):
    for start in range(0, len(data), 4):
        items = [data[i] for i in range(start, start + 4)]
        model(**{k: torch.stack([item[k] for item in items]) for k in items[0]}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_own_loop_equals_the_same_loop_on_the_whole_model(spec, tmp_path):
    def train(message, context):
        with split_session(message, context) as session:
            optimizer = session.attach(torch.optim.AdamW(session.trainable_parameters(), lr=RATE, weight_decay=0.0))
            loop(session.model, Encoded(session.tokenizer), optimizer)
            return session.reply(num_examples=24, metrics={"loss": 0.0})

    strategy = run(spec, train, tmp_path)
    model, data = whole(spec)
    own = [p for p in model.parameters() if p.requires_grad]
    loop(model, data, torch.optim.AdamW(own, lr=RATE, weight_decay=0.0))
    assert_equal(strategy, model)


def test_hugging_face_trainer_equals_the_trainer_on_the_whole_model(spec, tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="adamw_torch",  # the one that the body runs: the fused one rounds differently
        gradient_accumulation_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )

    def train(message, context):
        with split_session(message, context) as session:
            data = Encoded(session.tokenizer)
            trainer = Trainer(session.model, arguments, train_dataset=data, callbacks=[session.trainer_callback()])
            loss = trainer.train().training_loss
            return session.reply(num_examples=len(data), metrics={"loss": loss})

    strategy = run(spec, train, tmp_path)
    model, data = whole(spec)
    Trainer(model, arguments, train_dataset=data).train()
    assert_equal(strategy, model)
    assert strategy.reports["acme"].steps == 3


def test_merged_adapter_loads_with_plain_peft(spec, tmp_path):
    def train(message, context):
        with split_session(message, context) as session:
            optimizer = session.attach(torch.optim.AdamW(session.trainable_parameters(), lr=RATE, weight_decay=0.0))
            loop(session.model, Encoded(session.tokenizer), optimizer)
            return session.reply(num_examples=24, metrics={"loss": 0.0})

    strategy = run(spec, train, tmp_path)
    assert strategy.save_adapter(tmp_path / "adapter")
    full = AutoModelForSequenceClassification.from_pretrained(spec.model)
    loaded = PeftModel.from_pretrained(full, tmp_path / "adapter").eval()
    expected, data = whole(spec)
    optimizer = torch.optim.AdamW([p for p in expected.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    loop(expected, data, optimizer)
    ids = data[0]["input_ids"][None]
    mask = data[0]["attention_mask"][None]
    logits = [m.eval()(input_ids=ids, attention_mask=mask).logits for m in (loaded, expected)]
    assert torch.equal(*logits)


def test_model_without_a_session_says_so(spec, tmp_path):
    kept = {}

    def train(message, context):
        with split_session(message, context) as session:
            kept["model"] = session.model
            optimizer = session.attach(torch.optim.AdamW(session.trainable_parameters(), lr=RATE, weight_decay=0.0))
            loop(session.model, Encoded(session.tokenizer), optimizer)
            return session.reply(num_examples=24)

    run(spec, train, tmp_path)
    with pytest.raises(SessionClosedError, match="no session is open"):
        kept["model"](input_ids=torch.ones(1, 3, dtype=torch.int64))


def test_step_without_a_gradient_is_refused(spec, tmp_path):
    seen = []

    def train(message, context):
        with split_session(message, context) as session:
            with pytest.raises(SessionError, match="no rows went through the model") as caught:
                session.step()
            seen.append(caught.value)
            return session.reply(num_examples=1)

    run(spec, train, tmp_path)
    assert len(seen) == 1
