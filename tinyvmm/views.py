"""One stretch of bytes that lies in several pieces: a sequence of memoryviews, as iovecs are in C.

A descriptor chain's buffers are such a stretch (virtio 1.2, 2.7.4.2: no meaning lies in where one
ends), and so is what preadv(2) fills.
"""

import sys
from collections.abc import Sequence

Views = Sequence[memoryview]


def size_of(views: Views) -> int:
    """How many bytes there are in all."""
    return len(views[0]) if len(views) == 1 else sum([len(view) for view in views])


def cut(views: Views, start: int, count: int = sys.maxsize) -> list[memoryview]:
    """Give the views' bytes from `start` on, `count` at most, as views of the same memory."""
    pieces = []
    for view in views:
        size = len(view)
        if start >= size:
            start -= size
            continue
        if count <= 0:
            break
        piece = view[start : start + count] if start or count < size else view
        pieces.append(piece)
        count -= len(piece)
        start = 0
    return pieces


def scatter(views: Views, data: bytes | memoryview, start: int = 0) -> int:
    """Copy `data` into the views, from byte `start` on, as far as there is room: the bytes copied.

    Whoever must know beforehand that all of it fits asks `size_of`.
    """
    size = len(data)
    if not start and views and size <= len(views[0]):
        views[0][:size] = data
        return size
    done = 0
    for view in cut(views, start, size) if start else views:
        piece = data[done : done + len(view)]
        view[: len(piece)] = piece
        done += len(piece)
        if done == size:
            break
    return done
