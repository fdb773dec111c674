"""Machines for asyncio: `tinyvmm.run` and `tinyvmm.Machine`, to be awaited.

    async with AsyncMachine(memory="512M") as vm:
        first, second = await asyncio.gather(vm.run(["uname"]), vm.run(["id"]))

What waits does so on a thread of its own, so any number may be under way. A cancelled `run` kills
its command, and ends when that has; a cancelled start is undone once it is done.
"""

import asyncio
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from tinyvmm import vm
from tinyvmm.process import KILL_PATIENCE, Process, complete
from tinyvmm.process_streams import Completion, take_complete
from tinyvmm.vm_options import CommandOptions, MachineOptions, RunCommandOptions, RunOwnOptions

T = TypeVar("T")


async def in_thread(
    work: Callable[[], T],
    *,
    cancel: Callable[[], None] | None = None,
    undo: Callable[[T], None] | None = None,
) -> T:
    """Await `work`, which is done on a thread.

    If this is cancelled, `cancel` hurries it up; its end is awaited, and `undo` takes its result.
    Not asyncio.to_thread, which has only so many threads: those who wait must not keep out those
    they wait for.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def body() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 (whoever awaits raises it)
            _tell(loop, future.set_exception, error)
        else:
            _tell(loop, future.set_result, result)

    threading.Thread(target=body, name="aio", daemon=True).start()
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if cancel is not None:
            cancel()
        await asyncio.wait([future])
        if undo is not None and future.exception() is None:
            undo(future.result())
        raise


def _tell(loop: asyncio.AbstractEventLoop, settle: Callable[[Any], None], value: object) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody awaits any more
        loop.call_soon_threadsafe(settle, value)


async def _complete(process: Process, given: Completion) -> "subprocess.CompletedProcess[Any]":
    giving_up = threading.Timer(KILL_PATIENCE, process.give_up)
    giving_up.daemon = True

    def cancel() -> None:
        process.kill()
        giving_up.start()

    try:
        return await in_thread(lambda: complete(process, given), cancel=cancel)
    finally:
        giving_up.cancel()


async def run(
    args: Sequence[str], **options: Unpack[RunOwnOptions]
) -> "subprocess.CompletedProcess[Any]":
    """Run a command in a machine of its own: as `tinyvmm.run`, whose arguments it takes."""
    given, rest = take_complete(options)
    process = await in_thread(lambda: vm.popen(args, **rest), undo=Process.abandon)
    return await _complete(process, given)


class AsyncMachine:
    """A `tinyvmm.Machine` for asyncio; `machine` is that, for what does not wait."""

    def __init__(self, **options: Unpack[MachineOptions]) -> None:
        """Take what `tinyvmm.Machine` does."""
        self.machine = vm.Machine(**options)

    async def start(self) -> Self:
        """Boot; as Machine.start."""

        def close(_started: object) -> None:
            self.machine.close()

        await in_thread(self.machine.start, undo=close)
        return self

    async def close(self) -> None:
        """End it; as Machine.close."""
        await in_thread(self.machine.close)

    async def run(
        self, args: Sequence[str], **options: Unpack[RunCommandOptions]
    ) -> "subprocess.CompletedProcess[Any]":
        """Run a command to its end; as Machine.run."""
        given, rest = take_complete(options)
        return await _complete(await self.popen(args, **rest), given)

    async def popen(self, args: Sequence[str], **options: Unpack[CommandOptions]) -> Process:
        """Start a command; as Machine.popen. To wait for it: `await in_thread(process.wait)`."""
        return await in_thread(lambda: self.machine.popen(args, **options), undo=Process.abandon)

    async def put(self, source: "str | os.PathLike[str]", dest: str) -> None:
        """Copy into the guest; as Machine.put."""
        await in_thread(lambda: self.machine.put(source, dest))

    async def get(self, source: str, dest: "str | os.PathLike[str]") -> None:
        """Copy out of the guest; as Machine.get."""
        await in_thread(lambda: self.machine.get(source, dest))

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        await self.close()
