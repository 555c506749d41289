"""Which kind of run an audit is of: one that cuts a model in segments, or one that spreads its experts."""

import json
from pathlib import Path

from vflair_flower.audit.experts import ROWS, ExpertSubject
from vflair_flower.audit.subject import Subject

AnySubject = Subject | ExpertSubject


def open_subject(run: Path | str, *, rows: int = 32, auxiliary_rows: int = 400) -> AnySubject:
    """Return a finished run as the subject of an audit; raises ConfigurationError if it is none."""
    kind = ExpertSubject if (Path(run) / ROWS).is_file() else Subject
    return kind(run=str(run), rows=rows, auxiliary_rows=auxiliary_rows)


def read_subject(text: str) -> AnySubject:
    """Return the subject that its `to_json` wrote."""
    values = json.loads(text)
    kind = ExpertSubject if values.pop("kind") == "experts" else Subject
    return kind(**values)
