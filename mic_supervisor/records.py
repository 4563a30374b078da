"""Data classes that are quick to make.

`@dataclass(frozen=True)` compiles two methods more for each class and a slower `__init__`; with
more than a hundred classes that is a tenth of what `mic-supervisor plan` takes. Frozen is therefore
what the type checker holds everybody to, and the interpreter makes plain slotted classes that hash
by value. Everything else is as in the standard library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:
    import dataclasses

    def dataclass(cls=None, /, *, frozen=False, **options):
        """As `dataclasses.dataclass`, but that `frozen` only makes instances hashable."""
        if frozen:
            options["unsafe_hash"] = True
        return dataclasses.dataclass(cls, **options)
