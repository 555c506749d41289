"""pass@k by hand, and programs in the sandbox: right, wrong, endless, greedy, leaving early, and not allowed."""

import itertools
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks import (
    PromptRow,
    SandboxSettings,
    cut_completion,
    pass_at_k,
    run_completions,
    run_program,
    score_pass_at_k,
)
from vflair_flower.tasks.sandbox import namespaces_command

ALLOWED = SandboxSettings(allow_generated_code=True, timeout_s=10.0)
ADD = PromptRow(
    "def add(a, b):\n", "    return a + b\n", "x", tests="def check(f):\n    assert f(2, 3) == 5\n\ncheck(add)\n"
)


@given(passed=st.lists(st.booleans(), min_size=1, max_size=7), k=st.integers(1, 7))
def test_pass_at_k_is_the_mean_over_all_ways_to_draw_k(passed, k):
    if k > len(passed):
        with pytest.raises(DataError, match="k is"):
            pass_at_k(len(passed), sum(passed), k)
        return
    draws = list(itertools.combinations(passed, k))
    assert pass_at_k(len(passed), sum(passed), k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_completions_end_where_the_function_does():
    assert cut_completion("    return 1\n") == "    return 1\n"
    assert cut_completion("    x = 1\n    return x\nprint(f())\ndef g(): pass") == "    x = 1\n    return x"
    assert cut_completion("    if x:\n        return 1\n") == "    if x:\n        return 1\n"


def test_generated_code_is_off_by_default():
    with pytest.raises(ConfigurationError, match="allow_generated_code is False"):
        run_program("pass", SandboxSettings())
    with pytest.raises(ConfigurationError, match="allow_generated_code is False"):
        run_completions([ADD], [["    return a + b"]], settings=SandboxSettings())
    with pytest.raises(ConfigurationError, match="timeout_s is 0"):
        SandboxSettings(timeout_s=0)
    with pytest.raises(ConfigurationError, match="memory_bytes is 1"):
        SandboxSettings(memory_bytes=1)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 + 1 == 2", "passed"),
        ("assert 1 + 1 == 3", "AssertionError"),
        ("def broken(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended early"),
        ("print('passed'); import os; os._exit(0)", "ended early"),
        ("x = bytearray(2**30)", "MemoryError"),
        ("open('big', 'wb').write(b'0' * 2**22)", "OSError"),
        ("import os\nassert os.listdir() == ['program.py'] and 'HOME' not in os.environ", "passed"),
        ("input()", "EOFError"),
    ],
)
def test_programs_in_the_sandbox(program, reason):
    outcome = run_program(program, ALLOWED)
    assert outcome.reason == reason
    assert outcome.passed == (reason == "passed")


def test_endless_programs_and_their_children_are_ended():
    short = SandboxSettings(allow_generated_code=True, timeout_s=1.0)
    assert run_program("import time\nwhile True: time.sleep(1)", short).reason == "timeout"
    forks = "import os, time\nos.fork()\nwhile True: time.sleep(1)"
    assert run_program(forks, short).reason == "timeout"


def test_there_is_no_network_where_the_platform_allows():
    if not namespaces_command():
        pytest.skip("unshare is missing or may not make namespaces here")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        reach = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=2)"
        assert run_program(reach, ALLOWED).reason in ("OSError", "ConnectionRefusedError", "TimeoutError")


def test_without_namespaces_a_network_can_be_made_a_must(monkeypatch):
    monkeypatch.setattr("vflair_flower.tasks.sandbox.namespaces_command", lambda: ())
    assert run_program("pass", ALLOWED).passed
    with pytest.raises(ConfigurationError, match="need_no_network"):
        run_program("pass", SandboxSettings(allow_generated_code=True, need_no_network=True))


def test_pass_at_one_over_rows():
    outcomes = run_completions(
        [ADD, ADD], [["    return a + b", "    return a"], ["    return a - b", "    return 7"]], settings=ALLOWED
    )
    assert [[one.passed for one in row] for row in outcomes] == [[True, False], [False, False]]
    score = score_pass_at_k(outcomes)
    assert (score.name, score.value, score.count, score.note) == ("pass_at_1", 0.25, 2, "2 samples per row")
    assert score_pass_at_k(outcomes, k=2).value == 0.5
    with pytest.raises(DataError, match="has no tests"):
        run_completions([PromptRow("a", "b", "x")], [["c"]], settings=ALLOWED)
    with pytest.raises(DataError, match="1 rows and 0 lists"):
        run_completions([ADD], [], settings=ALLOWED)
