#!/usr/bin/env python3
"""A slow wire that counts: forwards one TCP port to another with delay and a rate limit.

    wire.py LISTEN_PORT TARGET_PORT RTT_MS [--mbit-per-s N] [--counts SOCKET]

Both ports are on 127.0.0.1. Every byte arrives RTT/2 later, each way; with --mbit-per-s all connections
together share a line of that rate in each direction. Whoever connects to the Unix socket SOCKET is told,
as one line of JSON, what has been taken in since the start: bytes each way, and connections.
SIGUSR1 cuts all open connections at once (a lost line); SIGUSR2 toggles refusing new ones; SIGHUP toggles
a stall: nothing is cut, nothing passes. Stop with SIGTERM.
"""
import argparse
import asyncio
import json
import os
import signal
import time

BUFFER_BYTES_MAX = 64 << 20


class Wire:
    def __init__(self, target_port, rtt_s, bytes_per_s):
        self.target_port, self.rtt_s, self.bytes_per_s = target_port, rtt_s, bytes_per_s
        self.writers, self.refuse = set(), False
        self.line_free_at = {"up": 0.0, "down": 0.0}
        self.counts = {"up_bytes": 0, "down_bytes": 0, "connections": 0}
        self.flowing = asyncio.Event()
        self.flowing.set()

    async def pump(self, way, reader, writer):
        queue, buffered, room = asyncio.Queue(), 0, asyncio.Event()
        room.set()

        async def deliver():
            nonlocal buffered
            while True:
                due, block = await queue.get()
                if block is None:
                    if writer.can_write_eof():
                        writer.write_eof()
                    return
                if self.bytes_per_s:
                    due = max(due, self.line_free_at[way]) + len(block) / self.bytes_per_s
                    self.line_free_at[way] = due
                wait = due - time.monotonic()
                if wait > 0.0005:
                    await asyncio.sleep(wait)
                await self.flowing.wait()
                writer.write(block)
                await writer.drain()
                buffered -= len(block)
                if buffered < BUFFER_BYTES_MAX:
                    room.set()

        sender = asyncio.create_task(deliver())
        try:
            while block := await reader.read(1 << 18):
                self.counts[way + "_bytes"] += len(block)
                buffered += len(block)
                queue.put_nowait((time.monotonic() + self.rtt_s / 2, block))
                if buffered >= BUFFER_BYTES_MAX:
                    room.clear()
                    await room.wait()
        except OSError:
            pass
        queue.put_nowait((0.0, None))
        try:
            await sender
        except OSError:
            pass

    async def accept(self, reader, writer):
        if self.refuse:
            writer.transport.abort()
            return
        self.counts["connections"] += 1
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target_port, limit=1 << 20)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, far_writer}
        self.writers |= ends
        try:
            await asyncio.gather(self.pump("up", reader, far_writer), self.pump("down", far_reader, writer))
        finally:
            for end in ends:
                end.close()
            self.writers -= ends

    async def tell_counts(self, _reader, writer):
        writer.write(json.dumps(self.counts).encode() + b"\n")
        writer.close()

    def cut(self):
        for end in list(self.writers):
            end.transport.abort()

    def toggle_refuse(self):
        self.refuse = not self.refuse

    def toggle_stall(self):
        if self.flowing.is_set():
            self.flowing.clear()
        else:
            self.flowing.set()


async def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("listen_port", type=int)
    parser.add_argument("target_port", type=int)
    parser.add_argument("rtt_ms", type=float)
    parser.add_argument("--mbit-per-s", type=float)
    parser.add_argument("--counts", metavar="SOCKET")
    given = parser.parse_args()
    wire = Wire(given.target_port, given.rtt_ms / 1000, given.mbit_per_s and given.mbit_per_s * 1e6 / 8)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, wire.cut)
    loop.add_signal_handler(signal.SIGUSR2, wire.toggle_refuse)
    loop.add_signal_handler(signal.SIGHUP, wire.toggle_stall)
    loop.add_signal_handler(signal.SIGTERM, lambda: os._exit(0))
    if given.counts:
        await asyncio.start_unix_server(wire.tell_counts, given.counts)
    server = await asyncio.start_server(wire.accept, "127.0.0.1", given.listen_port, limit=1 << 20)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
