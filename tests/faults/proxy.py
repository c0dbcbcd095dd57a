"""A network that can be cut: a TCP proxy on the loopback, on the test's event loop.

Cut, it passes nothing on and tells neither side, as a network does that drops every packet. Healed, what was sent meanwhile
arrives, as TCP would have sent it again.
"""

import asyncio
from contextlib import suppress
from typing import Self


class Proxy:
    """Between its address and a target."""

    def __init__(self, target: str) -> None:
        """`target` is host:port."""
        self._target = target
        self._passes = asyncio.Event()
        self._passes.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> Self:
        """Listens; port 0 takes a free one."""
        self._server = await asyncio.start_server(self._serve, host, port)
        bound = self._server.sockets[0].getsockname()
        self.address = f"{bound[0]}:{bound[1]}"
        return self

    def cut(self) -> None:
        self._passes.clear()

    def heal(self) -> None:
        self._passes.set()

    async def stop(self) -> None:
        """Breaks all connections. Idempotent."""
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        host, _, port = self._target.rpartition(":")
        try:
            await self._passes.wait()
            there, onward = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        except asyncio.CancelledError:
            writer.close()
            return
        try:
            async with asyncio.TaskGroup() as group:
                ways = [
                    group.create_task(self._pump(reader, onward)),
                    group.create_task(self._pump(there, writer)),
                ]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()
        except asyncio.CancelledError:
            pass  # `stop`; a server's callback that ends cancelled is logged as an error
        finally:
            for each in (writer, onward):
                each.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Until one side ends, which is passed on as everything else is."""
        with suppress(OSError):
            while data := await source.read(65536):
                await self._passes.wait()
                sink.write(data)
                await sink.drain()
        await self._passes.wait()
