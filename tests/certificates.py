"""Certificate authorities and certificates in files, for tests of TLS."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from baton.service.tls import TlsFiles


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA, with its certificate in a file."""

    ca: trustme.CA
    directory: Path

    @classmethod
    def make(cls, directory: Path) -> "Authority":
        directory.mkdir(parents=True, exist_ok=True)
        authority = cls(trustme.CA(), directory)
        authority.ca.cert_pem.write_to_path(str(authority.ca_file))
        return authority

    @property
    def ca_file(self) -> Path:
        return self.directory / "ca.pem"

    def issue(self, name: str, *hosts: str, expired: bool = False) -> TlsFiles:
        """Writes NAME.pem and NAME-key.pem, in place of what is there. Without hosts it is for this machine."""
        until = datetime.now(UTC) + timedelta(days=-1 if expired else 1)
        issued = self.ca.issue_cert(*(hosts or ("127.0.0.1", "localhost")), not_after=until)
        cert, key = self.directory / f"{name}.pem", self.directory / f"{name}-key.pem"
        # As a careful tool does it: nobody sees half a file.
        for path, content in (
            (key, issued.private_key_pem.bytes()),
            (cert, b"".join(each.bytes() for each in issued.cert_chain_pems)),
        ):
            fresh = path.with_suffix(".new")
            fresh.write_bytes(content)
            fresh.replace(path)
        return TlsFiles(cert=str(cert), key=str(key), ca=str(self.ca_file))


def put(there: TlsFiles, content: TlsFiles) -> None:
    """Certificate and key of one stand where the other's stood."""
    Path(content.key).replace(there.key)
    Path(content.cert).replace(there.cert)


def spoil(files: TlsFiles) -> None:
    """The certificate is none any more."""
    Path(files.cert).write_text("not a certificate")


def remove(files: TlsFiles) -> None:
    Path(files.cert).unlink()
