"""Hosts: with which of them one may speak in the clear."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a host, without brackets, is this machine: what is said to it nobody else hears."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
