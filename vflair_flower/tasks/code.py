"""pass@k: the chance that one of k programs a model wrote passes its tests (Chen et al. 2021, arXiv:2107.03374).

The programs run in `sandbox.py`, which refuses unless generated code is allowed.

Invariant: pass@1 is the share of programs that pass, and pass@k never falls as k grows.
"""

import math
from collections.abc import Sequence

from vflair_flower.errors import DataError
from vflair_flower.tasks.examples import PromptRow
from vflair_flower.tasks.sandbox import Outcome, SandboxSettings, run_program
from vflair_flower.tasks.scores import Score, mean_score

# Where a completion of a function has left it, in the paper's own experiments (section 3.2).
_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Return the unbiased estimate 1 - C(n - c, k) / C(n, k) of equation 1.

    Raises
    ------
    DataError
        The counts are impossible, or k exceeds the samples.

    Examples
    --------
    >>> pass_at_k(5, 2, 1)
    0.4
    """
    if not 0 <= num_passed <= num_samples or not 1 <= k <= num_samples:
        raise DataError(
            f"{num_passed} of {num_samples} samples passed and k is {k}; pass@k needs 1 <= k <= samples. "
            "Draw more samples, or choose a smaller k."
        )
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def cut_completion(completion: str) -> str:
    r"""Return a completion up to where the function it continues is over.

    Examples
    --------
    >>> cut_completion("    return 1\n\ndef other():")
    '    return 1\n'
    """
    return completion[: min((at for stop in _STOPS if (at := completion.find(stop)) >= 0), default=len(completion))]


def run_completions(
    rows: Sequence[PromptRow], completions: Sequence[Sequence[str]], *, settings: SandboxSettings
) -> list[list[Outcome]]:
    """Run each row's prompt and completions against its tests.

    Parameters
    ----------
    rows : sequence of PromptRow
        With tests.
    completions : sequence of sequence of str
        What the model wrote after each prompt, as often as it was asked.
    settings : SandboxSettings
        Must allow generated code.

    Raises
    ------
    DataError
        A row has no tests, or rows and completions are not as many.
    ConfigurationError
        Generated code is not allowed.
    """
    if len(rows) != len(completions):
        raise DataError(f"There are {len(rows)} rows and {len(completions)} lists of completions. Pass one per row.")
    outcomes = []
    for row, written in zip(rows, completions, strict=True):
        if not row.tests:
            raise DataError(f"Row {row.id!r} has no tests, so nothing can pass. Use a set with tests: 'humaneval'.")
        outcomes.append([run_program(f"{row.prompt}{cut_completion(one)}\n{row.tests}", settings) for one in written])
    return outcomes


def score_pass_at_k(outcomes: Sequence[Sequence[Outcome]], *, k: int = 1, seed: int = 0) -> Score:
    """Return pass@k over rows.

    Raises
    ------
    DataError
        There are no rows, or a row has fewer than k samples.
    """
    values = [pass_at_k(len(row), sum(one.passed for one in row), k) for row in outcomes]
    samples = sorted({len(row) for row in outcomes})
    return mean_score(f"pass_at_{k}", values, seed=seed, note=f"{'/'.join(map(str, samples))} samples per row")
