"""An SSH server that isn't OpenSSH, for tests: asyncssh's own, with its SFTP, no shell, on loopback.

usage: asyncssh_server.py HOST_KEY AUTHORIZED_KEYS      prints its port; ends with its standard input
"""
import asyncio
import sys

import asyncssh


async def main():
    server = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_host_keys=[sys.argv[1]],
        authorized_client_keys=sys.argv[2],
        sftp_factory=True,
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


asyncio.run(main())
