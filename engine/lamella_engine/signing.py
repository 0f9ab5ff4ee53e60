"""Ed25519 keys: made, read from files that only their owner may read, and used to sign and to verify.

The only module that needs the package ``cryptography``, and only when a key is used.
"""

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from lamella_engine.errors import AlreadyExistsError, InvalidInputError, NotFoundError, UnsupportedFormatError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY_NBYTES = 32
"""Of a public key, which is also what a signature names its key by."""

SIGNATURE_NBYTES = 64

# Far more than a key takes; nothing else is worth reading to its end.
_FILE_NBYTES = 4096


class Signer:
    """A private key. Safe for several threads; shows no more of itself than its public key."""

    def __init__(self, key: "Ed25519PrivateKey") -> None:
        self._key = key
        self.public = key.public_key().public_bytes_raw()
        """The public key, 32 bytes."""

    def sign(self, data: bytes) -> bytes:
        """Return the signature of ``data``, 64 bytes."""
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"Signer({self.public.hex()})"

    def __reduce__(self) -> str:
        raise TypeError("a private key does not leave its process")


def generate_key(path: Path) -> bytes:
    """Write a new private key to ``path`` (PEM, PKCS 8, mode 0600) and return its public key, 32 bytes.

    Raises AlreadyExistsError rather than write over anything.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    data = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise AlreadyExistsError(
            f"{path} is there already: a key is never written over; choose another name", kind="file_exists"
        ) from None
    except OSError as error:
        raise InvalidInputError(f"cannot write {path}: {error.strerror}", kind="bad_key_file") from error
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    return key.public_key().public_bytes_raw()


def load_key(path: Path) -> Signer:
    """Read a private key.

    Raises NotFoundError, or InvalidInputError if others may read the file or it holds no Ed25519 key in PEM.
    """
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_FILE_NBYTES)
    except FileNotFoundError:
        raise NotFoundError(f"there is no key file {path}: make one with lamella keygen", kind="no_key_file") from None
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror}", kind="bad_key_file") from error
    if stat.S_IMODE(mode) & 0o077:
        raise InvalidInputError(
            f"{path} is open to others (mode {stat.S_IMODE(mode):04o}): chmod 600 it, and make a new key if somebody "
            "may have read it",
            kind="open_key_file",
        )
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidInputError(f"{path} holds no Ed25519 key in PEM, unencrypted", kind="bad_key_file")
    return Signer(key)


def is_signed(data: bytes, *, key: bytes, signature: bytes) -> bool:
    """Whether ``signature`` (64 bytes) is the signature of ``data`` by the owner of the public ``key`` (32 bytes).

    Raises UnsupportedFormatError without the package ``cryptography``.
    """
    _need_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def can_verify() -> bool:
    """Whether the package ``cryptography`` is there."""
    try:
        _need_cryptography()
    except UnsupportedFormatError:
        return False
    return True


def _need_cryptography() -> None:
    try:
        import cryptography.hazmat.primitives.asymmetric.ed25519  # noqa: F401
    except ImportError:
        raise UnsupportedFormatError(
            "signatures need the package cryptography: pip install 'lamella[service]'", kind="no_cryptography"
        ) from None
