"""Numbers with their units, as a person reads them; bytes in larger units.

Example: duration(125), size(43_100_000), plural(3000, "file")      # 2 min 5 s, 43.1 MB, 3,000 files
"""

MIB, GIB = 2**20, 2**30
"""Bytes."""


def duration(seconds: float) -> str:
    """A length of time for a person: 48 s, 2 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: int) -> str:
    """A number of bytes for a person, in powers of 1,000: 812 bytes, 43.1 MB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return plural(count, "byte")


def plural(count: int, noun: str) -> str:
    """A number with the noun that it counts: 1 file, 3,000 files."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def ceil_div(a: int, b: int) -> int:
    """A / b, rounded up, without the rounding of a float."""
    return -(-a // b)
