"""Where the hub listens and how parties reach it."""

from dataclasses import dataclass
from pathlib import Path

from vflair_flower.session import Hub, LinkEmulation, TlsServerFiles


@dataclass(frozen=True, kw_only=True)
class HubSettings:
    """The strategy's hub.

    Parameters
    ----------
    bind : str
        host:port to listen on; port 0 takes a free one, ``"inproc"`` none (parties in this very process, for tests).
    advertise : str or None
        host or host:port under which parties reach it, when that is not `bind`.
    tls : TlsServerFiles or None
        Certificate and key; required anywhere but on loopback.
    root_certificates : pathlib.Path or None
        PEM file that parties trust for the hub's certificate; by default the certificate itself.
    allow_plaintext : bool
        Whether to listen beyond loopback without TLS, for instance inside an encrypted tunnel.
    emulate : LinkEmulation or None
        Slower links to parties than there are, for measurements.
    """

    bind: str = "127.0.0.1:0"
    advertise: str | None = None
    tls: TlsServerFiles | None = None
    root_certificates: Path | None = None
    allow_plaintext: bool = False
    emulate: LinkEmulation | None = None

    def build(self) -> Hub:
        """Return a hub, not yet listening; raises ConfigurationError if it may not listen there."""
        return Hub(
            bind=self.bind,
            advertise=self.advertise,
            tls=self.tls,
            allow_plaintext=self.allow_plaintext,
            emulate=self.emulate,
        )

    def trusted_pem(self) -> str:
        """Return the PEM text that parties are told to trust; empty without TLS."""
        if self.tls is None:
            return ""
        return (self.root_certificates or self.tls.certificate_chain).read_text()
