"""An SSH server that isn't OpenSSH, for tests: asyncssh's own, with its SFTP, no shell, on loopback.

usage: asyncssh_server.py HOST_KEY AUTHORIZED_KEYS [--no-copies]

Prints its port, and 1 where it has the extension copy-data (asyncssh since 2.13), else 0; ends with its
standard input.
"""
import asyncio
import sys

import asyncssh


def has_copy_data():
    handler = asyncssh.sftp.SFTPServerHandler
    if "--no-copies" in sys.argv:
        handler._extensions = [(n, v) for n, v in handler._extensions if n != b"copy-data"]
    return any(name == b"copy-data" for name, _ in handler._extensions)


async def main():
    copies = int(has_copy_data())
    server = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_host_keys=[sys.argv[1]],
        authorized_client_keys=sys.argv[2],
        sftp_factory=True,
    )
    print(server.sockets[0].getsockname()[1], copies, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


asyncio.run(main())
