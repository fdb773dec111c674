"""The order of kernel versions: 6.1.0-9 before 6.1.0-10, 6.12~rc1 before 6.12, -rt after plain."""

_TILDE, _END, _TEXT, _NUMBER = range(4)


def version_key(version: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts versions as people mean them, close to deb-version(7).

    Runs of digits compare as numbers, what lies between as text; a `~` comes before the end.
    """
    key: list[tuple[int, int, str]] = []
    position = 0
    while position < len(version):
        start = position
        kind = _kind(version[start])
        while position < len(version) and _kind(version[position]) == kind:
            position += 1
        run = version[start:position]
        key.append((kind, int(run), "") if kind == _NUMBER else (kind, 0, run))
    key.append((_END, 0, ""))
    return key


def _kind(character: str) -> int:
    if character == "~":
        return _TILDE
    return _NUMBER if "0" <= character <= "9" else _TEXT
