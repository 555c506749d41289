"""Certificates: is a model, cut, bit for bit the model itself?  Tried on a tiny configuration of its own family."""

from vflair_flower.certificate.compare import Certificate, certify
from vflair_flower.certificate.matrix import admit, certify_all, certify_model, load_admitted_config, markdown
from vflair_flower.certificate.tiny import TINY, shrink

__all__ = [
    "TINY",
    "Certificate",
    "admit",
    "certify",
    "certify_all",
    "certify_model",
    "load_admitted_config",
    "markdown",
    "shrink",
]
