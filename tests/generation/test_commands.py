"""`vflair serve`, `vflair generate` and `vflair chat`: real processes, and a small model that was really trained."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tests.stories import save_stories
from tests.writers import save_writer
from vflair_flower.cli import app

pytestmark = pytest.mark.timeout(240)
PROMPT = "Once upon a time"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
START_S = 120


@pytest.fixture(scope="module")
def stories(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_stories(shared / "models" / "stories260K", tmp_path_factory.mktemp("stories")))


def story(folder: str, prompt: str = PROMPT, new: int = 24, **settings: object) -> str:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=new, pad_token_id=2, **{"do_sample": False, **settings})
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def vflair(*arguments: str, said: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "vflair_flower.cli", *arguments],
        input=said,
        capture_output=True,
        text=True,
        timeout=200,
        env=ENVIRONMENT,
        check=False,
    )
    assert not check or result.returncode == 0, result.stderr
    return result


@pytest.fixture
def serve() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a model party, and waits until it serves; what it says is in its `said`."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "vflair_flower.cli", "serve", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        started.append(process)
        process.said = ""
        limit = time.monotonic() + START_S
        while "serving " not in process.said:
            line = process.stderr.readline()
            assert line, f"it ended: {process.said}"
            assert time.monotonic() < limit
            process.said += line
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_one_line_shows_both_sides(stories: str) -> None:
    result = vflair(
        "generate", "--model", stories, "--head", "1", "--tail", "1", "--prompt", PROMPT, "--max-new-tokens", "24"
    )
    assert result.stdout == story(stories) + "\n"
    assert "24 tokens in " in result.stderr
    assert "bytes per token on the wire (header" in result.stderr
    assert f"hidden {2 * 64 * 4})" in result.stderr


def test_two_parties_with_tickets_one_after_the_other(stories: str, serve: Callable, tmp_path: Path) -> None:
    process = serve("--model", stories, "--party", "ann", "--party", "bob", "--tickets", str(tmp_path))
    assert f"ticket for ann: {tmp_path / 'ann.ticket'}" in process.said
    assert "serving blocks 1-3 of" in process.said
    address = process.said.split(" at ")[1].split(";")[0]
    reply = vflair(
        "generate", "--hub", address, "--ticket", str(tmp_path / "ann.ticket"), "--max-new-tokens", "24", said=PROMPT
    )
    assert reply.stdout == story(stories) + "\n"
    beams = vflair(
        "generate",
        "--ticket",
        str(tmp_path / "bob.ticket"),
        "--prompt",
        PROMPT,
        "--beams",
        "3",
        "--max-new-tokens",
        "24",
    )
    assert beams.stdout == story(stories, num_beams=3) + "\n"
    # The first ticket is used up, and a new one lies in its place.
    again = vflair(
        "chat", "--ticket", str(tmp_path / "ann.ticket"), "--max-new-tokens", "12", said=f"{PROMPT}\n Tom\n\n"
    )
    first = story(stories, new=12)
    assert again.stdout == f"{first}\n{story(stories, PROMPT + first + ' Tom', new=12)}\n"
    assert "no chat template" in again.stderr
    assert again.stderr.count("tokens/s") == 2
    process.send_signal(signal.SIGTERM)  # as Ctrl-C
    assert process.wait(30) == 130


def test_a_wrong_ticket_and_a_wrong_model_end_at_once(stories: str, serve: Callable, tmp_path: Path) -> None:
    serve("--model", stories, "--party", "ann", "--tickets", str(tmp_path))
    ticket = tmp_path / "ann.ticket"
    other = str(save_writer(tmp_path / "other"))
    wrong = vflair("generate", "--ticket", str(ticket), "--model", other, "--prompt", PROMPT, check=False)
    assert wrong.returncode == 1
    assert "is not the model party's: here llama, 4 blocks, 32 wide" in wrong.stderr
    forged = tmp_path / "forged.ticket"
    forged.write_text(ticket.read_text().replace('"ticket": "', '"ticket": "x'))
    result = vflair("generate", "--ticket", str(forged), "--prompt", PROMPT, check=False)
    assert result.returncode == 1
    assert "ticket" in result.stderr
    assert "Traceback" not in wrong.stderr + result.stderr
    assert wrong.stdout == result.stdout == ""


def test_a_model_party_that_dies_in_the_middle_ends_the_text_with_a_word(
    stories: str, serve: Callable, tmp_path: Path
) -> None:
    process = serve("--model", stories, "--tickets", str(tmp_path))
    command = [sys.executable, "-m", "vflair_flower.cli", "generate", "--ticket", str(tmp_path / "me.ticket")]
    talking = subprocess.Popen(
        [*command, "--prompt", PROMPT, "--max-new-tokens", "500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert talking.stdout.read(5), "nothing was written"
    process.kill()
    _, said = talking.communicate(timeout=60)
    assert talking.returncode == 1
    assert "party 'hub' is lost" in said
    assert "Traceback" not in said


def test_what_cannot_work_is_said_with_an_exit_code(stories: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    cases = [
        (["generate", "--prompt", "x"], "neither --ticket nor --model is given"),
        (["chat", "--hub", "127.0.0.1:1"], "no --ticket is given"),
        (["generate", "--ticket", str(tmp_path / "x"), "--prompt", "x"], "no ticket of `vflair serve`"),
        (
            ["generate", "--model", stories, "--head", "4", "--tail", "1", "--prompt", "x"],
            "the model party would hold none",
        ),
        (["serve", "--model", stories, "--bind", "0.0.0.0:0"], "in plain text, where others can read"),
        (["generate", "--model", stories, "--temperature", "0.5", "--prompt", "x"], "do_sample is False"),
    ]
    for arguments, words in cases:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1, arguments
        assert words in " ".join(result.stderr.split()), arguments
