"""`python -m simulations.pretraining TEXTS FOLDER`: pretrain a small mixture-of-experts language model from plain text.

A recipe in one file: a byte-level BPE tokenizer, an OLMoE with random weights, next-token training with the router's
load-balancing loss, a checkpoint that everything else here loads by its folder.  T tokens per row, V vocabulary.
Invariant: the same texts and settings give the same batches in the same order.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from vflair_flower.errors import ConfigurationError, DataError

_END = "<|end|>"


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """What is built and how long it is trained.

    Parameters
    ----------
    vocabulary : int
        Tokens of the tokenizer.
    hidden, layers, heads, experts, per_token, expert_width : int
        The shape of the model: D, blocks, attention heads, experts per block, experts per token, their inner width.
    steps, batch_size, tokens : int
        Optimiser steps, rows per step, T.
    learning_rate : float
        At its highest; it falls along a cosine to a tenth.
    balance : float
        Weight of the load-balancing loss (Fedus et al., arXiv 2101.03961, as transformers computes it).
    seed : int
        Of weights and batches.
    """

    vocabulary: int = 4096
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    experts: int = 16
    per_token: int = 4
    expert_width: int = 128
    steps: int = 1200
    batch_size: int = 32
    tokens: int = 128
    learning_rate: float = 3e-3
    balance: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name not in ("seed", "balance") and value <= 0:
                raise ConfigurationError(f"{name} is {value}; choose a number above 0.")
        if self.per_token > self.experts or self.hidden % self.heads:
            raise ConfigurationError(
                f"per_token is {self.per_token} of {self.experts} experts, and hidden is {self.hidden} over "
                f"{self.heads} heads; take at most all experts, and heads that divide hidden."
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: a linear rise over the first twentieth, then half a cosine."""
        rise = max(1, self.steps // 20)
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        done = (step - rise) / max(1, self.steps - rise)
        return self.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))

    def config(self, end_token: int) -> OlmoeConfig:
        """Return the model's configuration."""
        return OlmoeConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.expert_width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            num_experts=self.experts,
            num_experts_per_tok=self.per_token,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            router_aux_loss_coef=self.balance,
            output_router_logits=True,
            pad_token_id=end_token,
            bos_token_id=end_token,
            eos_token_id=end_token,
        )


def pretrain(texts: Path, folder: Path, settings: PretrainSettings) -> float:
    """Pretrain on ``train.txt`` of a folder and save the model; returns the perplexity per token of ``validation.txt``.

    Parameters
    ----------
    texts : pathlib.Path
        A folder with ``train.txt`` and ``validation.txt``, such as WikiText-2's.
    folder : pathlib.Path
        Where the checkpoint goes, with the settings and the perplexity in ``pretraining.json``.
    settings : PretrainSettings
        What is built.

    Raises
    ------
    DataError
        If a file is missing, or too short for one batch.
    """
    train, validation = (_read(texts / f"{split}.txt") for split in ("train", "validation"))
    tokenizer = _tokenizer(train, settings.vocabulary)
    end = int(tokenizer.get_vocab()[_END])
    train_NT, validation_NT = (_rows(text, tokenizer, settings.tokens) for text in (train, validation))
    if len(train_NT) < settings.batch_size:
        raise DataError(
            f"{texts / 'train.txt'} has {len(train_NT)} rows of {settings.tokens} tokens, fewer than a batch of "
            f"{settings.batch_size}. Give more text, or smaller batches."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    model = OlmoeForCausalLM(settings.config(end))
    torch.nn.Module.to(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task("pretraining", total=settings.steps, loss=float("nan"))
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step)
            batch_BT = train_NT[_chosen(step, len(train_NT), settings)].to(device)
            loss = model(input_ids=batch_BT, labels=batch_BT).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.update(bar, advance=1, loss=float(loss.detach()))
    perplexity = measure_perplexity(model, validation_NT, settings.batch_size)
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    figures = {
        "perplexity": perplexity,
        "seconds": time.monotonic() - started,
        "tokens": settings.steps * settings.batch_size * settings.tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (folder / "pretraining.json").write_text(json.dumps({"settings": asdict(settings), **figures}, indent=1))
    return perplexity


@torch.no_grad()
def measure_perplexity(model: torch.nn.Module, rows_NT: torch.Tensor, batch_size: int) -> float:
    """Return the exponential of the mean loss per token of rows ``[N, T]``; the load-balancing loss does not count."""
    device = next(model.parameters()).device
    model.eval()
    losses = [model(input_ids=b.to(device), labels=b.to(device), output_router_logits=False).loss * len(b)
              for b in rows_NT.split(batch_size)]  # fmt: skip
    return math.exp(float(torch.stack(losses).sum()) / len(rows_NT))


def _read(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a folder with train.txt and validation.txt.")
    return path.read_text(encoding="utf-8")


def _tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=_END, bos_token=_END, pad_token=_END)


def _rows(text: str, tokenizer: PreTrainedTokenizerFast, tokens: int) -> torch.Tensor:
    """Return the whole text as rows ``[N, T]``; what is left at the end is dropped."""
    lines = tokenizer(text.splitlines(keepends=True)).input_ids
    ids = torch.tensor([token for line in lines for token in line])
    return ids[: len(ids) // tokens * tokens].view(-1, tokens)


def _chosen(step: int, rows: int, settings: PretrainSettings) -> torch.Tensor:
    """Return a step's rows: passes over all of them, each in an order of its own."""
    per_pass = rows // settings.batch_size
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step // per_pass)
    start = step % per_pass * settings.batch_size
    return torch.randperm(rows, generator=generator)[start : start + settings.batch_size]


def main(
    texts: Annotated[Path, typer.Argument(help="A folder with train.txt and validation.txt.")],
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint goes.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = PretrainSettings.steps,
    hidden: Annotated[int, typer.Option(help="Width of hidden states.")] = PretrainSettings.hidden,
    layers: Annotated[int, typer.Option(help="Blocks.")] = PretrainSettings.layers,
    experts: Annotated[int, typer.Option(help="Experts per block.")] = PretrainSettings.experts,
    per_token: Annotated[int, typer.Option(help="Experts per token.")] = PretrainSettings.per_token,
    expert_width: Annotated[int, typer.Option(help="Inner width of an expert.")] = PretrainSettings.expert_width,
    vocabulary: Annotated[int, typer.Option(help="Tokens of the tokenizer.")] = PretrainSettings.vocabulary,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = PretrainSettings.batch_size,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = PretrainSettings.seed,
) -> None:
    """Pretrain a small mixture-of-experts language model."""
    try:
        settings = PretrainSettings(
            steps=steps, hidden=hidden, layers=layers, experts=experts, per_token=per_token,
            expert_width=expert_width, vocabulary=vocabulary, batch_size=batch_size, seed=seed,
        )  # fmt: skip
        perplexity = pretrain(texts, folder, settings)
    except (ConfigurationError, DataError) as error:
        typer.secho(str(error), err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error
    typer.echo(f"{folder}: perplexity {perplexity:.1f} per token of the validation text.")


if __name__ == "__main__":
    typer.run(main)
