"""How much longer a JSON tokenizer's normalizer and pre-tokenizer can make a text.

A few bytes of JSON can turn every letter into megabytes, and the library ends the process where memory runs out.
"""

MAXIMUM_GROWTH = 64  # times as many characters
MAXIMUM_STEPS = 100
BYTE_LEVEL_GROWTH = 2  # a byte becomes a character of up to two bytes


def growth(step: dict | None) -> int:
    """The largest factor by which ``step`` of a tokenizer, one after the other with all inside it, lengthens a text."""
    if not isinstance(step, dict):
        return 1
    inner = [*_steps(step, "normalizers"), *_steps(step, "pretokenizers")]
    if len(inner) > MAXIMUM_STEPS:
        return MAXIMUM_GROWTH + 1
    factor = _of_one(step)
    for one in inner:
        factor = min(factor * growth(one), MAXIMUM_GROWTH + 1)
    return factor


def _of_one(step: dict) -> int:
    kind = step.get("type")
    if kind == "ByteLevel":
        return BYTE_LEVEL_GROWTH
    if kind != "Replace":
        return 1
    content, pattern = step.get("content"), step.get("pattern")
    length = len(content) if isinstance(content, str) else 0
    plain = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(plain, str) and plain:
        return max(1, -(-length // len(plain)))
    return 1 + length  # a regular expression may match between any two characters


def _steps(step: dict, key: str) -> list:
    steps = step.get(key)
    return steps if isinstance(steps, list) else []
