"""Dotted names of modules and of their tensors."""

from __future__ import annotations

# What DataParallel, torch.compile and Lightning Fabric call the module that they wrap.
_WRAPPERS = ("module", "_orig_mod", "_forward_module")


def without_wrappers(name: str) -> str:
    """Return a dotted name without what wrappers put before it.

    >>> without_wrappers("module._orig_mod.layer1.bn"), without_wrappers("module")
    ('layer1.bn', '')
    """
    parts = name.split(".")
    while parts and parts[0] in _WRAPPERS:
        del parts[0]
    return ".".join(parts)
