"""An SMTP server for tests: aiosmtpd's own, on loopback.

usage: smtp_server.py plain|starttls|tls FOLDER [USER PASSWORD]

Prints its port. Writes each mail that it accepted as a line of JSON to FOLDER/received. FOLDER has cert.pem
and key.pem. Refuses every address that begins with "nobody@". With USER it wants a login. Ends when its
standard input ends.
"""
import asyncio
import json
import ssl
import sys

from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword

MODE, FOLDER = sys.argv[1:3]
LOGIN = [text.encode() for text in sys.argv[3:5]]


class Handler:
    async def handle_RCPT(self, server, session, envelope, address, options):
        if address.startswith("nobody@"):
            return "550 no such user"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        mail = {
            "from": envelope.mail_from,
            "to": envelope.rcpt_tos,
            "tls": server.transport.get_extra_info("ssl_object") is not None,
            "login": session.authenticated,
            "content": envelope.content.decode("utf-8", "replace"),
        }
        with open(FOLDER + "/received", "a") as received:
            received.write(json.dumps(mail) + "\n")
        return "250 OK"


def authenticate(server, session, envelope, mechanism, login):
    right = isinstance(login, LoginPassword) and [login.login, login.password] == LOGIN
    return AuthResult(success=right, handled=False)


async def main():
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(FOLDER + "/cert.pem", FOLDER + "/key.pem")
    options = {}
    if MODE == "starttls":
        options.update(tls_context=context, require_starttls=True)
    if LOGIN:
        options.update(authenticator=authenticate, auth_required=True, auth_require_tls=MODE == "starttls")

    def connection():
        return SMTP(Handler(), loop=asyncio.get_running_loop(), **options)

    tls = context if MODE == "tls" else None
    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0, ssl=tls)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


asyncio.run(main())
