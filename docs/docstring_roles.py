"""The few marks of reStructuredText in our docstrings, as Markdown, for the site's reference."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod):`(~?)([\w.]+)`")


class DocstringRoles(griffe.Extension):
    """Turns ``:class:`~a.b.C``` into a link to C where it has a page, and ``::`` into a colon."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of everything that is loaded."""
        if obj.docstring is None:
            return
        parent = obj if obj.is_class or obj.is_module else obj.parent

        def link(match: re.Match[str]) -> str:
            short, name = match.groups()
            text = name.rpartition(".")[2] if short else name
            # A name without dots is of the same class, or of the same module.
            here = parent
            while here is not None and name.partition(".")[0] not in here.members:
                here = here.parent
            target = name if here is None or "." in name else f"{here.path}.{name}"
            return f'<autoref identifier="{target}" optional><code>{text}</code></autoref>'

        value = _ROLE.sub(link, obj.docstring.value)
        obj.docstring.value = re.sub(r"::$", ":", value, flags=re.MULTILINE)
