"""Configuration of Sphinx, which builds these pages and the API reference (`make docs`, without a network)."""

from typing import Any

from lit_lipschitz import __version__

project = "lit-lipschitz"
release = version = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["build"]

nitpicky = True  # an unresolved name in a docstring is a warning, and `make docs` treats warnings as errors
nitpick_ignore_regex = [
    # Names of other projects, types as napoleon splits them, and internal classes.
    (
        r"py:.*",
        r"(torch|lightning|collections|argparse|pathlib|typing|nn|L|Tensor|Optimizer|Path|Iterable|dict|list|array)\b.*",
    ),
    (r"py:class", r"lit_lipschitz\.recognition\.loss_patterns\..*"),
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # as GitHub has them, so that links hold in both places

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False

linkcheck_timeout = 30
linkcheck_retries = 2

html_theme = "furo"
html_title = f"lit-lipschitz {version}"
html_copy_source = False
highlight_language = "none"  # of blocks without a name: commands, messages and tables


def _skip_fields(app: Any, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of a NamedTuple, which the docstring of its class has."""
    return True if type(thing).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    """Connects to Sphinx."""
    app.connect("autodoc-skip-member", _skip_fields)
