"""Numbers formatted for readers: 12.3k, 1:02:03."""

from collections.abc import Mapping


def short(value: float | None, digits: int = 3) -> str:
    """A count with the suffix k, M, G or T: 12345 → "12.3k"; None → "–"."""
    if value is None:
        return "–"
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{_significant(value / size, digits)}{suffix}"
    return str(value) if isinstance(value, int) else _significant(value, digits)


def number(value: float | None, digits: int = 4) -> str:
    """A measured number, rounded to `digits` significant digits: 0.123456 → "0.1235"; None → "–"."""
    if value is None:
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 2}e}"
    return _significant(value, digits)


def duration(seconds: float | None) -> str:
    """A duration in seconds as m:ss, h:mm:ss or "N d h:mm"; None → "–"."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    if days:
        return f"{days} d {hours}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def percent(share: float | None, digits: int = 1) -> str:
    """A fraction as a percentage: 0.4123 → "41.2 %"; None → "–"."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def counted(number: int, noun: str, ending: str = "s") -> str:
    """A number of things: (1, "step") → "1 step", (1200, "process", "es") → "1,200 processes"."""
    return f"{number:,} {noun}{ending if number != 1 else ''}"


def stepwise(table: Mapping[int, int], afterwards: int) -> str:
    """Numbers that change in a run: ({100: 8}, 16) → "8 up to step 100, then 16"; ({}, 16) → "16"."""
    before = ", ".join(f"{value:,} up to step {last:,}" for last, value in sorted(table.items()))
    return f"{before}, then {afterwards:,}" if before else f"{afterwards:,}"


def _significant(value: float, digits: int) -> str:
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")  # "#" keeps the trailing zeros of 0.3000
