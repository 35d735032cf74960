"""Public names of the rooms, for the documentation site: they are imported in stub files."""

from __future__ import annotations

from typing import Any

import griffe


class Doors(griffe.Extension):
    """Exports what an `__init__.pyi` imports."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        self._export(pkg)

    def _export(self, module: griffe.Module) -> None:
        if module.is_init_module and module.exports is None:
            names = [name for name, member in module.members.items() if of_a_room(member)]
            module.exports = names or None
        for child in module.members.values():
            if not child.is_alias and child.is_module:
                self._export(child)


def of_a_room(member: griffe.Object | griffe.Alias) -> bool:
    return member.is_alias and member.target_path.startswith("plad_fast.")
