"""Machines awaited."""

import asyncio
import signal
import subprocess
import threading
import time

import pytest

from tests.local_guest import LocalGuests
from tests.local_guest import local_guests as local_guests  # noqa: PLC0414 (a fixture)
from tests.local_guest import runtime as runtime  # noqa: PLC0414 (a fixture)
from tinyvmm import PIPE
from tinyvmm.aio import AsyncMachine, in_thread

pytestmark = pytest.mark.usefixtures("local_guests")


def test_many_commands_are_awaited_at_once() -> None:
    async def main() -> list[bytes]:
        async with AsyncMachine(memory="64M") as vm:
            cats = [vm.run(["cat"], input=b"%d" % n, capture_output=True) for n in range(40)]
            return [done.stdout for done in await asyncio.gather(*cats)]

    assert asyncio.run(main()) == [b"%d" % n for n in range(40)]


def test_errors_are_subprocess_own() -> None:
    async def main() -> None:
        async with AsyncMachine() as vm:
            with pytest.raises(subprocess.CalledProcessError):
                await vm.run(["false"], check=True)
            with pytest.raises(subprocess.TimeoutExpired):
                await vm.run(["sleep", "100"], timeout=1)
            with pytest.raises(FileNotFoundError):
                await vm.run(["nothing-there"])
            with pytest.raises(ValueError, match="stdin and input"):
                await vm.run(["true"], input=b"", stdin=PIPE)

    asyncio.run(main())


def test_a_cancelled_command_is_killed(local_guests: LocalGuests) -> None:
    async def main() -> None:
        async with AsyncMachine() as vm:
            command = asyncio.create_task(vm.run(["sleep", "100"]))
            while not local_guests.executors[0].processes:  # noqa: ASYNC110 (nothing tells us)
                await asyncio.sleep(0.01)
            command.cancel()
            with pytest.raises(asyncio.CancelledError):
                await command
            (process,) = local_guests.executors[0].processes.values()
            assert process.wait(60) == 128 + signal.SIGKILL

    asyncio.run(main())


def test_a_process_is_awaited() -> None:
    async def main() -> tuple[bytes | None, int]:
        async with AsyncMachine() as vm:
            process = await vm.popen(["cat"], stdin=PIPE, stdout=PIPE)
            output = await in_thread(lambda: process.communicate(b"word"))
            return output[0], await in_thread(process.wait)

    assert asyncio.run(main()) == (b"word", 0)


def test_what_a_cancelled_wait_made_is_undone() -> None:
    undone: list[str] = []
    goes_on = threading.Event()

    def work() -> str:
        goes_on.wait()
        return "made"

    async def main() -> None:
        task = asyncio.create_task(in_thread(work, cancel=goes_on.set, undo=undone.append))
        await asyncio.sleep(0.1)
        begin = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - begin < 60

    asyncio.run(main())
    assert undone == ["made"]
