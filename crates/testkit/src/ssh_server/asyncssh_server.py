"""An SSH server that isn't OpenSSH, for tests: asyncssh's own, with its SFTP, no shell, on loopback.

usage: asyncssh_server.py PORT HOST_KEY AUTHORIZED_KEYS [--no-copies]

Ends when its standard input ends. It has the extension copy-data, which asyncssh has since 2.13 and
an older one gets here.
"""
import asyncio
import sys

import asyncssh


COPY_DATA = b"copy-data"


async def copy_data(handler, packet):
    """draft-ietf-secsh-filexfer-extensions-00, section 7, within one file or between two."""
    source, offset, length = packet.get_string(), packet.get_uint64(), packet.get_uint64()
    target, to = packet.get_string(), packet.get_uint64()
    packet.check_end()
    if source not in handler._file_handles or target not in handler._file_handles:
        raise asyncssh.SFTPFailure("no such handle")
    source, target = handler._file_handles[source], handler._file_handles[target]
    end = offset + length if length else None
    while end is None or offset < end:
        piece = handler._server.read(source, offset, min(1 << 20, end - offset) if end else 1 << 20)
        if not piece:
            return
        handler._server.write(target, to, piece)
        offset, to = offset + len(piece), to + len(piece)


def choose_copies():
    handler = asyncssh.sftp.SFTPServerHandler
    if "--no-copies" in sys.argv:
        handler._extensions = [(n, v) for n, v in handler._extensions if n != COPY_DATA]
    elif COPY_DATA not in handler._packet_handlers:
        handler._extensions = [*handler._extensions, (COPY_DATA, b"1")]
        handler._packet_handlers = {**handler._packet_handlers, COPY_DATA: copy_data}


async def main():
    choose_copies()
    server = await asyncssh.listen(
        "127.0.0.1",
        int(sys.argv[1]),
        server_host_keys=[sys.argv[2]],
        authorized_client_keys=sys.argv[3],
        sftp_factory=True,
        # The test keeps the port bound.
        reuse_address=True,
    )
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


asyncio.run(main())
