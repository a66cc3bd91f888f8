"""Certificates for tests, of an authority of their own."""

import trustme

from msjax.distributed.rpc.security import TlsFiles


class Authority:
    """Issues certificates as files under `path`."""

    def __init__(self, path):
        self._ca, self._path = trustme.CA(), path
        self._ca.cert_pem.write_to_path(path / "ca.pem")

    def issue(self, name, **options):
        """Returns the files of a new certificate."""
        cert = self._ca.issue_cert(name, **options)
        cert.cert_chain_pems[0].write_to_path(self._path / f"{name}.pem")
        cert.private_key_pem.write_to_path(self._path / f"{name}.key")
        return TlsFiles(*(str(self._path / file) for file in (f"{name}.pem", f"{name}.key", "ca.pem")))
