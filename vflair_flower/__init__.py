"""vflair_flower: split learning of large language models as a Flower plugin.

Companies fine-tune and use one model together although none shows its text and none holds the whole model.
The library lies in this package; Flower strategies and clients are `vflair_flower.strategies` and
`vflair_flower.clients`.
"""

import logging as _logging
from pathlib import Path as _Path

# In a checkout, and in the copy of it that a Flower App Bundle carries, `strategies` and `clients` lie beside this
# folder (docs/decisions/0001-layout.md).  Installed, they lie inside it and nothing is added.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

# PEFT imports bitsandbytes wherever it is installed, which then says that it lacks a faster kernel, and on CPUs says
# of each 8-bit product that it casts.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    _logging.getLogger(_name).setLevel(_logging.ERROR)

__version__ = "0.1.0"
