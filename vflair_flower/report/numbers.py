"""Numbers as people read them: thousands separators, MB, %, minutes.

Sizes are decimal (1 MB is 1,000,000 bytes).  Spaces inside a figure are no-break spaces, so that it stays on one line.
"""

from vflair_flower.report.result import Interval

NBSP = "\u00a0"
MINUS = "\u2212"
DASH = "\u2013"


def count(value: int) -> str:
    """``2400`` is ``2,400``."""
    return f"{value:,}"


def counted(value: int, noun: str) -> str:
    """``1`` row, ``2,400`` rows."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def large(value: int) -> str:
    """``22713216`` is ``22.7 M``: for counts of parameters."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= 0.99995 * limit:  # 999,950 would be shown as 1000.0 of the unit below
            return f"{value / limit:.1f}{NBSP}{unit}"
    return str(value)


def size(value: float) -> str:
    """``54_000_000`` bytes are ``54.0 MB``."""
    for limit, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if value >= 0.99995 * limit:  # 999,950 would be shown as 1000.0 of the unit below
            return f"{value / limit:.1f}{NBSP}{unit}"
    return f"{value:.0f}{NBSP}B"


def percent(fraction: float, *, digits: int = 1) -> str:
    """``0.961`` is ``96.1 %``."""
    return f"{100 * fraction:.{digits}f}{NBSP}%"


def share(part: float, whole: float) -> str:
    """``1`` of ``4`` is ``25 %``; a share that is there but rounds to nothing is ``< 0.1 %``."""
    if whole <= 0 or part <= 0:
        return f"0{NBSP}%"
    fraction = part / whole
    if fraction < 0.001:
        return f"<{NBSP}0.1{NBSP}%"
    return percent(fraction, digits=1 if fraction < 0.1 else 0)


def points(difference: float) -> str:
    """``0.002`` is ``0.2 points``."""
    return f"{100 * difference:.1f}{NBSP}points"


def interval(value: Interval) -> str:
    """``94.1–97.5 %``, from fractions."""
    return f"{100 * value.low:.1f}{DASH}{percent(value.high)}"


def interval_of_difference(value: Interval) -> str:
    """``−1.2 to +0.8 points``, from fractions."""
    return f"{_signed(value.low)} to {_signed(value.high)}{NBSP}points"


def setting(value: str | int | float | bool | None) -> str:
    """Show a setting: ``None`` as a dash, ``True`` as yes, an empty text as empty."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) or "(empty)"


def duration(seconds: float) -> str:
    """``163`` seconds are ``2 min 43 s``."""
    if seconds < 10:
        return f"{seconds:.1f}{NBSP}s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours}{NBSP}h {minutes:02d}{NBSP}min".replace(" ", NBSP)
    return f"{minutes}{NBSP}min {rest:02d}{NBSP}s".replace(" ", NBSP) if minutes else f"{rest}{NBSP}s"


def _signed(fraction: float) -> str:
    figure = f"{abs(100 * fraction):.1f}"
    if figure == "0.0":
        return "±0.0"
    return f"{MINUS if fraction < 0 else '+'}{figure}"
