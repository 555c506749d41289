"""What the documentation says of each attack, from what it is registered with."""

from vflair_flower.attacks.registry import Attack, attacks

_DOING = {"inference": "", "training": "trains", "generation": "writes"}


def attacks_table() -> str:
    """Return a Markdown table of all attacks: what each is after, sees and needs, its settings, and its paper.

    Examples
    --------
    >>> "| `vmi` | text |" in attacks_table()
    True
    """
    lines = ["| attack | after | sees | needs | settings | from |", "|---|---|---|---|---|---|"]
    for name, one in attacks().items():
        settings = ", ".join(f"{key}={value}" for key, value in one.settings.items()) or "none"
        lines.append(f"| `{name}` | {one.goal} | `{one.sees.__name__}` | {_needs(one)} | {settings} | {one.paper} |")
    return "\n".join(lines)


def _needs(one: Attack) -> str:
    needs = [f"a victim that {_DOING[one.during]}"] if _DOING[one.during] else []
    needs += [f"{one.modes[0].value} cut"] if len(one.modes) == 1 else []
    needs += ["a causal model"] if one.causal_only else []
    return ", ".join(needs) or "–"
