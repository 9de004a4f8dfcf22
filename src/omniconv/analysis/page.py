"""Tables as one self-contained page: no network, no scripts, light and dark. Needs jinja2, of the extra ``plot``."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from omniconv.analysis.tables import Table

TEMPLATE = "page.html.jinja"


def check_extra(command: str) -> None:
    """Raises ValueError unless jinja2 is installed."""
    if find_spec("jinja2") is None:
        raise ValueError(f"{command}: a page needs the extra 'plot' (pip install \"omniconv[plot]\"), got no jinja2")


def environment(*packages: str) -> Any:
    """Where templates are found: in the packages named and here, for theirs to extend ours."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader

    loader = ChoiceLoader([PackageLoader(package, ".") for package in (*packages, "omniconv.analysis")])
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def as_html(title: str, tables: Sequence[Table], remarks: Sequence[str] = ()) -> str:
    """The page.

    >>> "<h1>Layers &amp; costs</h1>" in as_html("Layers & costs", [])
    True
    """
    return str(environment().get_template(TEMPLATE).render(title=title, tables=tables, remarks=remarks)).rstrip("\n")
