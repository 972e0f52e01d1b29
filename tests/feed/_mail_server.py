"""A real SMTP server as its own process, and what it is told to do wrong.

As a script: ``_mail_server.py FOLDER PORT [CERTIFICATE [tls]]`` prints its port and serves until it
is killed; with ``tls`` it speaks TLS from the first octet, else it offers STARTTLS. A message is
written to ``FOLDER/taken.jsonl`` before it is answered with 250. Each entry of
``FOLDER/faults.json`` is done as often as its ``times`` says, at ``connect``, ``mail``, ``rcpt``
(of ``who``), ``data`` (its end) or ``taken`` (after the message was written down): ``answer`` with
that line, ``drop`` the connection, or be ``slow`` for so many seconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import sys
from collections import Counter
from pathlib import Path


class Server:
    """The process, seen from a test."""

    def __init__(
        self, folder: Path, *, certificate: Path | None = None, tls: bool = False, port: int = 0
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.faults()
        command = [sys.executable, __file__, str(folder), str(port)]
        command += [str(certificate)] if certificate else []
        command += ["tls"] if tls else []
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def faults(self, *faults: dict) -> None:
        temporary = self.folder / "faults.tmp"
        temporary.write_text(json.dumps(faults))
        temporary.replace(self.folder / "faults.json")

    @property
    def taken(self) -> list[dict]:
        """The messages that the server took, in order: to, content."""
        log = self.folder / "taken.jsonl"
        return [json.loads(line) for line in log.open()] if log.exists() else []

    def count(self) -> Counter[str]:
        return Counter(message["to"] for message in self.taken)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def certificate(folder: Path) -> Path:
    """Make a certificate for localhost; the file holds the key as well."""
    path = folder / "localhost.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    options = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(path)]
    subprocess.run([*command.split(), *options, *files], check=True, capture_output=True)
    path.write_text(path.read_text() + (folder / "key.pem").read_text())
    return path


def _serve(folder: Path, port: int, certified: str | None = None, tls: str = "") -> None:
    from aiosmtpd.smtp import SMTP, AuthResult

    used: Counter[int] = Counter()

    async def fault(server: SMTP, at: str, who: str = "") -> str | None:
        for number, entry in enumerate(json.loads((folder / "faults.json").read_text())):
            same = entry["at"] == at and entry.get("who", who) == who
            if not same or used[number] >= entry.get("times", 1):
                continue
            used[number] += 1
            await asyncio.sleep(entry.get("slow", 0))
            if entry.get("drop"):
                server.transport.abort()
                return "421 gone"
            return entry.get("answer")
        return None

    class Handler:
        async def handle_EHLO(self, server, session, envelope, hostname, responses):
            session.host_name = hostname
            refused = await fault(server, "connect")
            return [refused] if refused else responses

        async def handle_MAIL(self, server, session, envelope, sender, options):
            if refused := await fault(server, "mail"):
                return refused
            envelope.mail_from = sender
            return "250 OK"

        async def handle_RCPT(self, server, session, envelope, recipient, options):
            if refused := await fault(server, "rcpt", recipient):
                return refused
            envelope.rcpt_tos.append(recipient)
            return "250 OK"

        async def handle_DATA(self, server, session, envelope):
            who = envelope.rcpt_tos[0]
            if refused := await fault(server, "data", who):
                return refused
            entry = {
                "from": envelope.mail_from,
                "to": who,
                "content": envelope.content.decode(),
                "tls": session.ssl is not None or bool(tls),
                "user": session.auth_data and session.auth_data.login.decode(),
            }
            with (folder / "taken.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
                log.flush()
                os.fsync(log.fileno())
            return await fault(server, "taken", who) or "250 taken"

    def authenticate(server, session, envelope, mechanism, data):
        good = data.password == b"right"
        return AuthResult(success=good, handled=False, auth_data=data)

    context = None
    if certified:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certified)

    def connection() -> SMTP:
        return SMTP(
            Handler(),
            hostname="localhost",
            tls_context=None if tls else context,
            authenticator=authenticate,
            auth_require_tls=False,
        )

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            connection, "127.0.0.1", port, ssl=context if tls else None
        )
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(main())


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
